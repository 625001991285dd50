"""Work in fine solves of one slice, from field evaluations and exact counts. Local."""

from collections.abc import Mapping
from typing import Any

from nodepint_mpi.core.evaluations import evaluations
from nodepint_mpi.core.propagators import AbstractIntegrator
from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.methods.reduced import Reduced
from nodepint_mpi.parallel.methods.tangent import Tangent


def work_equivalents(solver: TimeSolver, tally: Tally) -> tuple[float | None, float | None]:
    """What was counted, in fine solves and in fine pull-backs of a slice. Local.

    By field evaluations; None where those of a solver that was used are not known.
    """
    method = solver.method
    coarse = getattr(method, "coarse", None)
    tangents = method.propagator if isinstance(method, Tangent) else None
    by = {
        "fine": solver.fine.integrator,
        "tangents": None if tangents is None else tangents.integrator,
        "coarse": None if coarse is None else coarse.integrator,
        "reduced": method.coarse.integrator if isinstance(method, Reduced) else None,
    }
    forward = {"fine": tally.fine, "tangents": tally.tangent_passes, "coarse": tally.coarse}
    back = {"fine": tally.fine_pulled, "coarse": tally.coarse_pulled}
    return (
        _weighed(by, forward | {"reduced": tally.reduced}),
        _weighed(by, back | {"reduced": tally.reduced_pulled}),
    )


def _weighed(
    by: Mapping[str, AbstractIntegrator | None], passes: Mapping[str, Any]
) -> float | None:
    """The sum of passes, each in fine ones."""
    total, fine = 0.0, by["fine"]
    for name, count in passes.items():
        integrator = by[name]
        if not count:
            continue
        if integrator is fine:
            total += count
            continue
        assert integrator is not None and fine is not None  # else nothing was counted
        one, other = evaluations(fine), evaluations(integrator)
        if one is None or other is None:
            return None
        total += count * other / one
    return total
