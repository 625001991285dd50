"""Problems and methods of `nodepint bench sweeps`, with what was tuned for each problem."""

from typing import NamedTuple

import diffrax
import lineax
import optimistix
from diffrax import Midpoint

from nodepint_mpi.core.problems import PROBLEMS, Problem, burgers_problem
from nodepint_mpi.core.propagators import FixedSteps, Propagator
from nodepint_mpi.core.runge_kutta import RK4, chebyshev
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.methods.parareal import Parareal
from nodepint_mpi.parallel.methods.reduced import Reduced
from nodepint_mpi.parallel.methods.tangent import Tangent
from nodepint_mpi.parallel.shared_basis import SharedBasis

SMALL = 8
"""Largest state for which all coordinates make a basis."""

_DIRECT = lineax.AutoLinearSolver(well_posed=None)
_KRYLOV = lineax.GMRES(rtol=1e-6, atol=1e-9, restart=60)


class SweepCase(NamedTuple):
    """A problem with its propagators; steps are per slice.

    `coarse` is what parareal takes by habit. `cheap` is a stable propagator of fewer evaluations
    than `fine`, which tangents are taken of. Bases have `rank` directions, `n_new` of them new in
    a sweep.
    """

    problem: Problem
    n_slices: int
    n_sweeps: int
    fine: FixedSteps
    coarse: FixedSteps
    cheap: FixedSteps
    rank: int
    n_new: int


def _implicit_euler(
    n_steps: int, linear_solver: lineax.AbstractLinearSolver = _DIRECT
) -> FixedSteps:
    newton = optimistix.Newton(rtol=1e-10, atol=1e-12, linear_solver=linear_solver)
    return FixedSteps(diffrax.ImplicitEuler(root_finder=newton), n_steps)


def _rk4(n_steps: int) -> FixedSteps:
    return FixedSteps(RK4(), n_steps)


SWEEP_CASES: dict[str, SweepCase] = {
    "burgers": SweepCase(
        burgers_problem(128, 0.02, (0.0, 2.0)), 32, 12,
        _rk4(40), _implicit_euler(1), _rk4(8), rank=48, n_new=8,
    ),
    "burgers_1024": SweepCase(
        PROBLEMS["burgers_1024"], 32, 12,
        _rk4(200), _implicit_euler(1, _KRYLOV), _rk4(50), rank=48, n_new=8,
    ),
    "heat": SweepCase(
        PROBLEMS["heat"], 32, 12,
        _rk4(100), _implicit_euler(1), FixedSteps(chebyshev(13), 2), rank=48, n_new=8,
    ),
    "kuramoto": SweepCase(
        PROBLEMS["kuramoto"], 32, 12,
        _rk4(40), FixedSteps(Midpoint(), 2), _rk4(2), rank=64, n_new=16,
    ),
    "image_field": SweepCase(
        PROBLEMS["image_field"], 16, 12,
        _rk4(20), FixedSteps(Midpoint(), 1), _rk4(2), rank=16, n_new=8,
    ),
    "fitzhugh_nagumo": SweepCase(
        PROBLEMS["fitzhugh_nagumo"], 40, 14,
        _rk4(400), FixedSteps(Midpoint(), 4), _rk4(10), rank=2, n_new=2,
    ),
    "lorenz": SweepCase(
        PROBLEMS["lorenz"]._replace(span=(0.0, 5.0)), 50, 20,
        _rk4(125), _rk4(2), _rk4(8), rank=3, n_new=3,
    ),
    "lotka_volterra": SweepCase(
        PROBLEMS["lotka_volterra"], 32, 14,
        _rk4(100), _rk4(2), _rk4(10), rank=2, n_new=2,
    ),
}  # fmt: skip
"""By name; Burgers is more viscous and shorter, Lorenz shorter than in the published runs."""


def make_methods(case: SweepCase) -> dict[str, AbstractMethod]:
    """The methods to compare, by name. Local."""
    field, size = case.problem.field, case.problem.initial.size
    fine, coarse, cheap = (
        Propagator(field, steps) for steps in (case.fine, case.coarse, case.cheap)
    )
    jumps = SharedBasis("jumps", case.rank, case.n_new)
    pod = SharedBasis("pod", case.rank, case.n_new)
    methods: dict[str, AbstractMethod] = {
        "parareal": Parareal(coarse),
        "parareal, cheap": Parareal(cheap),
    }
    if size <= SMALL:
        identity = SharedBasis("identity", size, 0)
        methods |= {
            "tangent, identity": Tangent(identity, fine, cheap, recycle=False),
            "tangent, identity, cheap": Tangent(identity, cheap, cheap, recycle=False),
        }
    methods |= {
        "tangent, jumps": Tangent(jumps, fine, cheap),
        "tangent, jumps, cheap": Tangent(jumps, cheap, cheap),
        "tangent, jumps, cheap, float32": Tangent(jumps, cheap, cheap, precision="float32"),
        "tangent, jumps, complement": Tangent(jumps, fine, cheap, use_complement=True),
        "reduced, pod": Reduced(pod, cheap),
        "reduced, pod, complement": Reduced(pod, cheap, use_complement=True),
    }
    return methods
