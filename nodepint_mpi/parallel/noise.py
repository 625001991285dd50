"""The noise of a stochastic equation, as the caller of `solve` states it."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from nodepint_mpi.core.keys import keys_as_numbers
from nodepint_mpi.core.noise import path_keys
from nodepint_mpi.core.propagators import AbstractIntegrator, FixedSteps, Propagator, Stay
from nodepint_mpi.core.stochastic import (
    Calculus,
    NoisyArgs,
    OfArgs,
    StochasticField,
    check_noise_solver,
    needs_levy,
)
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.problem import ArrayField, StateLayout
from nodepint_mpi.parallel.programs import SameCode

Kind = Literal["diagonal", "scalar", "general"]
_MOST = 2**32
"""Keys take numbers of 32 bits, and of larger ones the lowest bits without a word."""


@dataclass(frozen=True)
class Noise:
    """Brownian motion of a stochastic equation du = f dt + g dW: which, and in which sense.

    The increment of a fine step follows from `seed`, the path, `step` and the number of the fine
    step in the horizon alone: it is the same on any number of ranks and in any batch.

    Args:
        seed: Of all paths.
        paths: Number of the path; for a batch an array of them, (paths,), not negative.
        kind: "diagonal": one Brownian motion for each number of the state, and g has the state's
            shape; "scalar": one for all of them; "general": `n_dims` of them, and g is
            (*state, n_dims).
        n_dims: Brownian motions of "general" noise.
        calculus: "ito" or "stratonovich": what dW means, and which solvers converge to it.
        additive: g does not depend on u: both senses are the same, and more solvers fit.
        step: An optimizer step that gets noise of its own; None for noise common to all.
        n_fine: Steps of a slice whose increments are drawn, those of `fine` unless given. A solve
            with fewer steps, a divisor, sums them up: the same path by longer steps.
    """

    seed: Any
    paths: Any = 0
    kind: str = "diagonal"
    n_dims: Any = None
    calculus: str = "ito"
    additive: bool = False
    step: Any = None
    n_fine: int | None = None

    @property
    def n_paths(self) -> int | None:
        """How many paths the batch has; None for one path alone."""
        shape = np.shape(self.paths)
        return shape[0] if shape else None

    def keys(self) -> Array:
        """The keys of all paths as numbers, (*paths, bytes). Local."""
        keys = path_keys(jax.random.key(self.seed), jnp.asarray(self.paths), self.step)
        return keys_as_numbers(keys)

    def shape(self, layout: StateLayout) -> tuple[int, ...]:
        """Shape of the Brownian motion of a state. Local."""
        match self.kind:
            case "diagonal":
                return layout.shape
            case "scalar":
                return ()
        assert self.n_dims is not None  # checked
        return (self.n_dims,)


class StochasticPart(NamedTuple):
    """A diffusion and its noise, for the fields of a solve."""

    diffusion: Any
    noise: Noise
    n_fine: int
    levy: bool

    def field(self, drift: ArrayField, layout: StateLayout) -> StochasticField:
        """Drift and diffusion as one field of arrays. Local."""
        is_matrix = self.noise.kind == "general"
        diffusion = Diffusion(SameCode(self.diffusion), layout, is_matrix)
        shape = self.noise.shape(layout)
        return StochasticField(
            OfArgs(drift), OfArgs(diffusion), shape, is_matrix, self.n_fine, self.levy
        )


@dataclass(frozen=True)
class Diffusion:
    """A user's diffusion as a function of arrays of one type."""

    function: SameCode
    layout: StateLayout
    is_matrix: bool

    def __call__(self, t: Array, u: Array, args: PyTree) -> Array:
        found = self.function(t, self.layout.split(u), args)
        return jnp.asarray(found, u.dtype) if self.is_matrix else self.layout.join(found, u.dtype)


def check_noise(noise: Any, diffusion: Any, steps: dict[str, Any]) -> StochasticPart | None:
    """The stochastic part of a problem, checked; None without. Local.

    Args:
        noise: A `Noise` or None.
        diffusion: A function g(t, u, args) or None.
        steps: Integrators of one slice, propagators, or methods that hold some, by the names of the
            arguments; `fine` among them.

    Raises:
        ProblemError: with what does not fit and what would.
    """
    if noise is None and diffusion is None:
        return None
    if not isinstance(noise, Noise):
        raise ProblemError(
            f"`noise` is a {type(noise).__name__}; with a `diffusion` pass `nm.Noise(seed)`."
        )
    if not callable(diffusion):
        raise ProblemError(
            f"`diffusion` is a {type(diffusion).__name__}; expected a function g(t, u, args)."
        )
    return StochasticPart(diffusion, noise, *check_steps(noise, steps))


def check_steps(noise: Noise, steps: dict[str, Any]) -> tuple[int, bool]:
    """The fine steps of a slice, and whether a solver reads space-time Levy areas. Local.

    Args:
        noise: Whose fields are checked, too.
        steps: As of `check_noise`.

    Raises:
        ProblemError: with what does not fit and what would.
    """
    _check_fields(noise)
    given = [
        (name, _fixed_steps(name, part, noise))
        for name, parts in steps.items()
        for part in jax.tree.leaves(parts, is_leaf=_is_steps)
        if _is_steps(part) and not isinstance(_steps_of(part), Stay)
    ]
    owner, n_fine = "`noise.n_fine` is", noise.n_fine
    if n_fine is None:
        owner, n_fine = "`fine`", next(part.n_steps for name, part in given if name == "fine")
    for name, part in given:
        if n_fine % part.n_steps:
            raise ProblemError(
                f"`{name}` takes {part.n_steps} steps a slice and {owner} {n_fine}: coarse "
                "increments are sums of fine ones, so the one must divide the other."
            )
    return n_fine, any(needs_levy(part.solver) for _, part in given)


def axes_of_paths(in_axes: Any, noise: Noise) -> Any:
    """Axes of `(u0, args)` with the paths of a batch among them. Local."""
    if noise.n_paths is None:
        return in_axes if in_axes is None else _with_key(in_axes, None)
    return _with_key((None, None) if in_axes is None else in_axes, 0)


def _with_key(in_axes: Any, axis: int | None) -> Any:
    if not isinstance(in_axes, (tuple, list)):
        in_axes = (in_axes, in_axes)
    if len(in_axes) != 2:
        return in_axes  # `take_samples` says what is wrong with it
    return in_axes[0], NoisyArgs(in_axes[1], axis)  # type: ignore[arg-type]


def check_diffusion(field: StochasticField, layout: StateLayout, t0: float, args: PyTree) -> None:
    """Call a diffusion once on shapes. Local.

    Raises:
        ProblemError: if it does not return what the noise is multiplied with.
    """
    wanted = (*layout.shape, *field.shape) if field.is_matrix else layout.shape
    t, u = jnp.asarray(t0, layout.dtype), jax.ShapeDtypeStruct(layout.shape, layout.dtype)
    found = eqx.filter_eval_shape(field.diffusion, t, u, args)
    if found.shape != wanted:
        raise ProblemError(
            f"The diffusion returned shape {found.shape}; expected {wanted}, which the increment "
            f"of shape {field.shape} is multiplied with."
        )


def _is_steps(part: Any) -> bool:
    return isinstance(part, (Propagator, AbstractIntegrator))


def _steps_of(part: Any) -> Any:
    return part.integrator if isinstance(part, Propagator) else part


def _fixed_steps(name: str, part: Any, noise: Noise) -> FixedSteps:
    """Steps of an argument that fit the noise."""
    steps = _steps_of(part)
    if not isinstance(steps, FixedSteps):
        raise ProblemError(f"`{name}`: a stochastic equation needs `FixedSteps(solver, n_steps)`.")
    if steps.adjoint == "continuous":
        raise ProblemError(f"`{name}`: a stochastic equation needs the discrete adjoint.")
    check_noise_solver(name, steps.solver, noise.calculus, additive=noise.additive)
    return steps


def _check_fields(noise: Noise) -> None:
    if isinstance(noise.seed, bool) or not isinstance(noise.seed, (int, np.integer)):
        raise ProblemError(f"`noise.seed` is {noise.seed!r}; expected a whole number.")
    for name, known in (("kind", get_args(Kind)), ("calculus", get_args(Calculus))):
        if getattr(noise, name) not in known:
            listing = ", ".join(map(repr, known))
            raise ProblemError(
                f"`noise.{name}` is {getattr(noise, name)!r}; choose from {listing}."
            )
    general = noise.kind == "general"
    if general != (noise.n_dims is not None):
        raise ProblemError("`noise.n_dims` belongs to kind 'general', which needs it.")
    if general and (isinstance(noise.n_dims, bool) or not noise.n_dims or noise.n_dims < 1):
        raise ProblemError(
            f"`noise.n_dims` is {noise.n_dims!r}; expected a number of at least one."
        )
    n_fine = noise.n_fine
    whole = isinstance(n_fine, (int, np.integer)) and not isinstance(n_fine, bool)
    if n_fine is not None and not (whole and n_fine > 0):
        raise ProblemError(
            f"`noise.n_fine` is {n_fine!r}; expected a number of steps of at least one."
        )
    if noise.step is not None:
        _check_numbers("step", noise.step, most_axes=0)
    _check_numbers("paths", noise.paths, most_axes=1)


def _check_numbers(name: str, numbers: Any, *, most_axes: int) -> None:
    """Refuse what keys cannot be folded with; traced numbers cannot be seen."""
    if isinstance(numbers, Tracer):
        return
    numbers = np.asarray(numbers)
    if (
        numbers.ndim > most_axes
        or numbers.size == 0
        or not np.issubdtype(numbers.dtype, np.integer)
    ):
        many = ", or an array (paths,) of them" if most_axes else ""
        raise ProblemError(f"`noise.{name}` must be a whole number{many}.")
    if np.any(numbers < 0):
        raise ProblemError(f"`noise.{name}` holds negative numbers.")
    if np.any(numbers >= _MOST):
        raise ProblemError(
            f"`noise.{name}` holds numbers of 2^32 and more, whose noise would be that of smaller "
            "ones: count from zero."
        )
