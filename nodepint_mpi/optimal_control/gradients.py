"""The two ways to the gradient of a control problem, as adjoints of a slice's steps."""

from typing import Any, Literal

from nodepint_mpi.core.propagators import AbstractIntegrator, AdaptiveSteps, AdjointKind, FixedSteps
from nodepint_mpi.errors import ProblemError

GradientKind = Literal["dp", "dal"]

ADJOINTS: dict[str, AdjointKind] = {"dp": "discrete", "dal": "continuous"}
"""Differentiable programming pulls back the discrete solve; direct adjoint looping solves the
adjoint equation backward."""


def with_gradient(steps: AbstractIntegrator, gradient: str) -> AbstractIntegrator:
    """The same steps with the adjoint of a kind of gradient. Local.

    Raises:
        ProblemError: for another kind, or steps without adjoint.
    """
    if gradient not in ADJOINTS:
        raise ProblemError(f"`gradient` is {gradient!r}; choose 'dp' or 'dal'.")
    adjoint: Any = ADJOINTS[gradient]
    checkpoints = None if gradient == "dal" else getattr(steps, "checkpoints", None)
    if isinstance(steps, FixedSteps):
        return FixedSteps(steps.solver, steps.n_steps, adjoint, checkpoints)
    if isinstance(steps, AdaptiveSteps):
        return AdaptiveSteps(
            steps.solver, steps.rtol, steps.atol, steps.max_steps, adjoint, checkpoints
        )
    raise ProblemError(
        f"`fine` is a {type(steps).__name__}; expected steps such as "
        "`FixedSteps(diffrax.Heun(), 16)`."
    )
