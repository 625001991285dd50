"""Terms of diffrax as vector fields: those of one ordinary differential equation."""

from typing import Any

import diffrax
import jax
from jax.core import Tracer

from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError

_NOT_YET = "stochastic differential equations cannot be solved in parallel in time yet."


def as_function(field: Field | diffrax.AbstractTerm) -> Field:
    """The function `f(t, u, args)` inside an ODE term; a function is returned unchanged. Local.

    Raises:
        ProblemError: for another term, or one that holds traced arrays, with what to write.
    """
    term: Any = field
    if not isinstance(term, diffrax.AbstractTerm):
        return term
    if isinstance(term, diffrax.ODETerm):
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(term)):
            raise ProblemError(
                "The ODETerm holds traced arrays, as it does when it is made inside `jax.jit` or "
                "`jax.grad` of a model or a control. Pass these in `args`, where they have "
                "derivatives: `ODETerm(lambda t, u, args: args(t, u))`, say."
            )
        return term.vector_field
    if isinstance(term, diffrax.MultiTerm):
        advice = (
            "Sum the parts in one function, `ODETerm(lambda t, u, args: f(t, u, args) + g(t, u, "
            f"args))`; {_NOT_YET}"
        )
    elif isinstance(term, diffrax.ControlTerm):
        advice = (
            "For a control with a derivative pass `ControlTerm(f, control).to_ode()`; with "
            f"Brownian motion it is stochastic, and {_NOT_YET}"
        )
    else:
        advice = f"Pass `ODETerm(f)`; {_NOT_YET}"
    raise ProblemError(
        f"A {type(term).__name__} of diffrax is not the field of one ordinary differential "
        f"equation. {advice}"
    )
