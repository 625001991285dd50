"""Names in a config become the solvers that they name."""

from nodepint_mpi.build.model import build_solver
from nodepint_mpi.config.time import StepsSection
from nodepint_mpi.core.runge_kutta import chebyshev


def test_a_chebyshev_method_has_the_stages_that_were_asked_for():
    steps = StepsSection(solver="chebyshev", n_stages=5, n_steps=2)
    assert build_solver(steps, "time.coarse") == chebyshev(5)
    assert build_solver(steps, "time.coarse") != chebyshev(6)
