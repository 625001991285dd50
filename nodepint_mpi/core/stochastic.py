"""Stochastic differential equations du = f(t, u) dt + g(t, u) dW as fields of a propagator."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import diffrax
import jax
from jaxtyping import Array, Float, Key, PyTree

from nodepint_mpi.core.keys import numbers_as_keys
from nodepint_mpi.core.noise import (
    GridNoise,
    GridPath,
    Increments,
    StepNoise,
    draw_increments,
    sum_increments,
)
from nodepint_mpi.errors import ProblemError

Calculus = Literal["ito", "stratonovich"]

_FITTING = {
    "ito": "`Euler()` or `ItoMilstein()`",
    "stratonovich": "`EulerHeun()`, `Heun()`, `StratonovichMilstein()` or `SlowRK()`",
    "additive": "`ShARK()`, `SRA1()` or `Euler()`",
}


class NoisyArgs(NamedTuple):
    """What drift and diffusion are given, and the key of the path as `core.keys` writes it.

    Among what has no derivative, the key is None.
    """

    args: PyTree
    key: Float[Array, "*paths bytes"] | None


@dataclass(frozen=True)
class OfArgs:
    """A function of the user's `args`, given these with the key of a path."""

    function: Any

    def __call__(self, t: Any, u: Any, given: NoisyArgs) -> Any:
        return self.function(t, u, given.args)


@dataclass(frozen=True)
class StochasticField:
    """Drift and diffusion, functions of (t, u, params), where a propagator takes a field.

    Called, it is the drift. `shape` is that of the Brownian motion, and `n_fine` the number of fine
    steps of a slice, of whose increments those of all other steps are sums.
    """

    drift: Callable
    diffusion: Callable
    shape: tuple[int, ...]
    is_matrix: bool
    n_fine: int
    levy: bool

    def __call__(self, t: Any, u: Any, params: PyTree) -> Any:
        return self.drift(t, u, params)

    def draw(self, params: Any, index: Array, length: Array, n_steps: int) -> Increments:
        """Increments of the `n_steps` equal steps of slice `index`. Local."""
        key = numbers_as_keys(params.key)
        fine = draw_increments(
            key, index * self.n_fine, self.n_fine, length / self.n_fine, self.shape, levy=self.levy
        )
        fine = jax.tree.map(lambda x: x.astype(length.dtype), fine)
        return fine if n_steps == self.n_fine else sum_increments(fine, n_steps)

    def terms(self, of_step: Increments) -> diffrax.MultiTerm:
        """As terms of diffrax, for one step. Local."""
        noise = StepNoise(
            diffusion=self.diffusion, w=of_step.w, h=of_step.h, is_matrix=self.is_matrix
        )
        return diffrax.MultiTerm(diffrax.ODETerm(self.drift), noise)


def terms_on_grid(
    field: StochasticField, key: Key[Array, ""], grid: Float[Array, " edges"]
) -> diffrax.MultiTerm:
    """Drift and diffusion as terms of a `diffrax.diffeqsolve` with the steps of a grid. Local.

    For serial solves of the whole horizon, with the increments of all other solves.

    Args:
        field: Its `n_fine` is not read.
        key: Of the path.
        grid: Ends of all fine steps in the horizon.
    """
    area = diffrax.SpaceTimeLevyArea if field.levy else diffrax.BrownianIncrement
    path = GridPath(key=key, ends=grid, shape=field.shape, levy_area=area)
    noise = GridNoise(diffusion=field.diffusion, path=path, is_matrix=field.is_matrix)
    return diffrax.MultiTerm(diffrax.ODETerm(field.drift), noise)


def through(field: Any, wrap: Callable[[Callable], Callable]) -> Any:
    """A field, or drift and diffusion of a stochastic one, each replaced by a function of it."""
    if not isinstance(field, StochasticField):
        return wrap(field)
    return replace(field, drift=wrap(field.drift), diffusion=wrap(field.diffusion))


def is_stochastic(solver: diffrax.AbstractSolver) -> bool:
    """Whether a solver of diffrax takes a drift and a diffusion. Local."""
    area = getattr(solver, "minimal_levy_area", None)
    if isinstance(area, type) and issubclass(area, diffrax.AbstractSpaceTimeTimeLevyArea):
        return False  # those of underdamped Langevin equations, whose terms are others
    return isinstance(solver, (diffrax.AbstractItoSolver, diffrax.AbstractStratonovichSolver))


def needs_levy(solver: diffrax.AbstractSolver) -> bool:
    """Whether a solver reads space-time Levy areas. Local."""
    kind = getattr(solver, "minimal_levy_area", None)
    return isinstance(kind, type) and issubclass(kind, diffrax.AbstractSpaceTimeLevyArea)


def check_noise_solver(
    name: str, solver: diffrax.AbstractSolver, calculus: str, *, additive: bool
) -> None:
    """Refuse a solver that does not converge to the solution asked for. Local.

    Args:
        name: Of the argument that the solver is part of.
        solver: Any of diffrax.
        calculus: "ito" or "stratonovich".
        additive: Whether the diffusion does not depend on the state: then both are the same.

    Raises:
        ProblemError: with the solvers that fit.
    """
    kind = type(solver).__name__
    fitting = _FITTING["additive" if additive else calculus]
    if not is_stochastic(solver):
        raise ProblemError(
            f"`{name}`: {kind} is not a solver for equations with a drift and a diffusion: "
            f"take {fitting}."
        )
    tableau = getattr(solver, "tableau", None)
    only_additive = isinstance(solver, diffrax.AbstractSRK) and tableau.is_additive_noise()  # type: ignore[union-attr]
    if only_additive and not additive:
        raise ProblemError(
            f"`{name}`: {kind} is for additive noise: if the diffusion does not depend on u, say "
            f"`Noise(..., additive=True)`, else take {fitting}."
        )
    ito = isinstance(solver, diffrax.AbstractItoSolver)
    if not additive and ito != (calculus == "ito"):
        raise ProblemError(
            f"`{name}`: {kind} converges to the solution in the sense of "
            f"{'Ito' if ito else 'Stratonovich'}, and `noise` says {calculus!r}: take {fitting}, "
            "or change the calculus, and the drift by the correction between them."
        )
