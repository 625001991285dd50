"""Solvers of diffrax: which of them can step what, and how they loop over their stages."""

from typing import Any

import diffrax
import equinox as eqx
import numpy as np
from jaxtyping import Array

from nodepint_mpi.core.stochastic import is_stochastic
from nodepint_mpi.errors import ProblemError


def check_solver(solver: Any, *, stochastic: bool = False) -> None:
    """Refuse what cannot step an ODE, or neither an ODE nor a stochastic equation. Local.

    Raises:
        ProblemError: with what it is and what was expected.
    """
    if isinstance(solver, type):
        raise ProblemError(f"`solver` is the class {solver.__name__}; call it to make a solver.")
    if not isinstance(solver, diffrax.AbstractSolver):
        kind = type(solver).__name__
        raise ProblemError(f"`solver` is a {kind}; expected a diffrax solver such as Tsit5().")
    if stochastic and is_stochastic(solver):
        return
    if solver.term_structure not in (diffrax.AbstractTerm, diffrax.ODETerm):
        kind = type(solver).__name__
        raise ProblemError(
            f"{kind} is a solver for stochastic equations or for fields in several parts, and the "
            "field is that of one ordinary differential equation: take another, such as "
            "`Tsit5()`, or `Kvaerno5()` for a stiff field."
        )


def with_stage_loop(solver: diffrax.AbstractSolver, kind: str) -> diffrax.AbstractSolver:
    """A Runge-Kutta solver with another loop over its stages, unless one was chosen. Local."""
    if getattr(solver, "scan_kind", "none to set") is not None:
        return solver
    return eqx.tree_at(lambda s: s.scan_kind, solver, kind, is_leaf=lambda leaf: leaf is None)


def borrows_tolerances(solver: diffrax.AbstractSolver) -> bool:
    """Whether a root finder would take its tolerances from a step size controller. Local."""
    finder = getattr(solver, "root_finder", None)
    return any(_is_borrowed(getattr(finder, name, None)) for name in ("rtol", "atol"))


def _is_borrowed(tolerance: Any) -> bool:
    return tolerance is not None and not isinstance(tolerance, (int, float, np.number, Array))
