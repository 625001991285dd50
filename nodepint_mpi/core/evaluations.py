"""Field evaluations of integrators: what work is counted in where a field is all that costs."""

import diffrax

from nodepint_mpi.core.propagators import AbstractIntegrator, FixedSteps, Stay
from nodepint_mpi.core.runge_kutta import AbstractExplicitRungeKutta


def evaluations(integrator: AbstractIntegrator) -> int | None:
    """Field evaluations for one slice; None for a solver that only time can tell of. Local."""
    if isinstance(integrator, Stay):
        return 0
    if not isinstance(integrator, FixedSteps):
        return None
    match integrator.solver:
        case diffrax.Euler():
            return integrator.n_steps
        case AbstractExplicitRungeKutta() as solver:
            return integrator.n_steps * len(solver.butcher.b)
        case diffrax.Midpoint() | diffrax.Heun():
            return integrator.n_steps * 2
    return None
