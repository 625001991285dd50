"""What to expect of a time-parallel solve, before it is done: growth of errors, sweeps, gain."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from nodepint_mpi.core.partition import check_edges, own_slices
from nodepint_mpi.core.propagators import AbstractIntegrator, FixedSteps, Propagator
from nodepint_mpi.core.sweeps import end_times
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.method_options import MethodOptions, check_comm
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.noise import Noise
from nodepint_mpi.parallel.problem import StateLayout
from nodepint_mpi.parallel.solution import Solution, Status
from nodepint_mpi.parallel.stated import Equation, state_equation

MOST_DIRECTIONS = 4
"""Perturbations that are followed; they cost as many coarse solves."""


class Forecast(NamedTuple):
    """Expectations of a solve on `n_ranks` ranks; equal on all ranks.

    `exponent` estimates the leading Lyapunov exponent over the horizon, in inverse time, and
    `log10_growth` what it makes of an error by the end: means over samples, NaN if nothing could be
    followed. For paths of a stochastic equation it is the exponent of the random flow along these
    paths. `exponent_error` is the standard error of the mean over samples, together with what half
    as many steps change. `log10_growth_worst` is the growth of the sample where it is largest.
    `n_unfollowed` is the number of slices, of all samples, that the rehearsal gave no finite state
    or tangent for. `sweeps` were needed by the rehearsal, None if it did not converge or could not
    be held.
    """

    exponent: float
    exponent_error: float
    log10_growth: float
    log10_growth_worst: float
    n_samples: int
    n_unfollowed: int
    sweeps: int | None
    n_slices: int
    n_ranks: int

    @property
    def largest_gain(self) -> float | None:
        """P / K: no time-parallel solve on P ranks with K sweeps beats serial by more."""
        return None if self.sweeps is None else self.n_ranks / max(1, self.sweeps)

    @property
    def advice(self) -> str:
        """What errors do, what to expect, and whether it pays."""
        return f"{self._growth}{self._unfollowed}; {self._gain}"

    @property
    def _growth(self) -> str:
        if np.isnan(self.exponent):
            return "how errors grow is not known"
        worst = (
            f", 10^{self.log10_growth_worst:.1f} in the worst of {self.n_samples} samples"
            if self.n_samples > 1
            else ""
        )
        return (
            f"errors grow 10^{self.log10_growth:.1f} times over the horizon{worst} "
            f"(leading exponent {self.exponent:.3g} +- {self.exponent_error:.1g})"
        )

    @property
    def _unfollowed(self) -> str:
        if not self.n_unfollowed:
            return ""
        n_all = self.n_slices * self.n_samples
        return f", but for {self.n_unfollowed} of {n_all} slices that coarse steps do not get over"

    @property
    def _gain(self) -> str:
        if self.sweeps is None:
            return (
                "the trial solve did not converge: expect no gain; use a finer coarse propagator, "
                "more slices, or a shorter horizon"
            )
        if self.sweeps >= self.n_ranks:
            return (
                f"about {self.sweeps} sweeps: on {self.n_ranks} rank(s) serial is faster; it takes "
                f"more than {self.sweeps} ranks, or another method, to gain"
            )
        return (
            f"about {self.sweeps} sweeps: on {self.n_ranks} ranks at most "
            f"{self.largest_gain:.1f} times faster than serial"
        )

    def as_dict(self) -> dict[str, Any]:
        """The numbers and the advice, for a file. Local."""
        return {**self._asdict(), "largest_gain": self.largest_gain, "advice": self.advice}


def forecast(
    field: Field,
    u0: PyTree,
    edges: Any,
    *,
    coarse: AbstractIntegrator | Propagator | None,
    fine: AbstractIntegrator | None = None,
    method: str | AbstractMethod = "parareal",
    args: PyTree = None,
    diffusion: Any = None,
    noise: Noise | None = None,
    in_axes: Any = None,
    n_batch_axes: int = 0,
    **options: Any,
) -> Forecast:
    """Hold a rehearsal of `solve` and estimate how errors grow. Collective, as `solve`.

    The rehearsal is the same solve with a coarse propagator of more steps, twice as many as a rule,
    in the place of the fine one: it costs what the coarse propagator costs, and its iteration
    contracts almost alike. A perturbation is then pushed through all slices by tangents of those
    steps, along each sample's own states and, with noise, along its own path: increments are sums
    of those of the fine steps.

    Args:
        field: As all that follows, what `solve` is given.
        u0: Initial state or states.
        edges: Slice boundaries.
        coarse: Steps of the coarse propagator.
        fine: Steps of the fine one; with noise their number says what the paths are.
        method: A name, or a method.
        args: What the field gets.
        diffusion: Of a stochastic equation.
        noise: Its paths.
        in_axes: What counts samples.
        n_batch_axes: Leading axes that count samples.
        options: More for `solve`.

    Raises:
        NodepintError: as `solve`; and a `ProblemError` without what is needed.
    """
    if not isinstance(coarse, AbstractIntegrator):
        raise ProblemError(
            f"`coarse` is a {type(coarse).__name__}; a forecast needs the steps of the coarse "
            "propagator, such as `FixedSteps(solver, n_steps)`."
        )
    if noise is not None:
        if not isinstance(fine, FixedSteps):
            raise ProblemError("A forecast with noise needs `fine`: its steps make the paths.")
        noise = replace(noise, n_fine=noise.n_fine or fine.n_steps)
    equation = Equation(u0, args, diffusion, noise, in_axes, n_batch_axes)
    by_name = {"coarse": coarse} if isinstance(method, str) else {}
    better = _better(coarse, None if noise is None else noise.n_fine)
    solution = solve(
        field, edges=edges, fine=better, method=method, **equation._asdict(), **by_name,
        **{**options, "throw": False},
    )  # fmt: skip
    edges = check_edges(np.asarray(edges))
    stated = state_equation(equation, edges, MethodOptions("parareal", coarse))
    flat_field, n_axes = stated.fields.bind(field), stated.n_batch_axes
    starts = _as_array(solution, stated.fields.layout, n_axes)[:-1]
    growth = [
        _log_growth(
            stated.fields.propagator(flat_field, steps.for_tangents()), stated.args, starts,
            tuple(edges.tolist()), n_axes,
        )
        for steps in ((better,) if better is coarse else (better, coarse))
    ]  # fmt: skip
    rates = [_rates(*one, edges) for one in growth]
    spread = np.std(rates[0], ddof=1) / np.sqrt(rates[0].size) if rates[0].size > 1 else 0.0
    mean, worst, change = np.nan, np.nan, 0.0
    if rates[0].size:
        mean, worst = np.mean(rates[0]), np.max(rates[0])
        change = mean - np.mean(rates[-1]) if rates[-1].size else np.inf
    to_growth = (edges[-1] - edges[0]) / np.log(10)
    solved = better is not coarse and solution.status is Status.CONVERGED
    followed = np.asarray(growth[0].followed)
    return Forecast(
        exponent=float(mean),
        exponent_error=float(np.hypot(spread, change)),
        log10_growth=float(mean * to_growth),
        log10_growth_worst=float(worst * to_growth),
        n_samples=followed[0].size,
        n_unfollowed=int(np.sum(~followed)),
        sweeps=solution.sweeps if solved else None,
        n_slices=len(starts),
        n_ranks=check_comm(options.get("comm")).size,
    )


class _Growth(NamedTuple):
    """Logarithms of the growth over all slices that could be followed, and which these were."""

    log: Float[Array, "*samples"]
    followed: Bool[Array, "slices *samples"]


def _rates(log: Array, followed: Array, edges: np.ndarray) -> np.ndarray:
    """Exponents of the samples, over the slices that are known; without those that have none."""
    known = np.asarray(followed).reshape(len(followed), -1)
    seconds = np.sum(np.diff(edges)[:, None] * known, axis=0)
    return np.ravel(log)[seconds > 0] / seconds[seconds > 0]


def _better(coarse: AbstractIntegrator, n_fine: int | None) -> AbstractIntegrator:
    """More steps than the coarse ones: twice as many, or the next number that divides the fine
    steps of a path. The same steps if there are none."""
    if not isinstance(coarse, FixedSteps) or coarse.n_steps == n_fine:
        return coarse
    n_steps = 2 * coarse.n_steps
    if n_fine is not None:
        n_steps = next(n for n in range(min(n_steps, n_fine), n_fine + 1) if n_fine % n == 0)
    return FixedSteps(coarse.solver, n_steps)


def _as_array(solution: Solution, layout: StateLayout, n_axes: int) -> Array:
    """Interface states as one array, (edges, *samples, *state)."""
    join = layout.join
    for _ in range(1 + n_axes):
        join = jax.vmap(join)
    return join(solution.interface) if layout.is_tree else solution.interface


@eqx.filter_jit
def _log_growth(
    steps: Propagator, args: Any, starts: Array, edges: tuple[float, ...], n_axes: int
) -> _Growth:
    """Push perturbations in random directions, orthogonal to each other, through all slices.

    What the longest combination of them grows by: with as many as the state has numbers, the
    spectral norm of the derivative. They are scaled together, slice by slice, and go on as they are
    where that fails.
    """
    times = end_times(own_slices(np.asarray(edges), 1, 0), starts)
    shape, samples = starts.shape[1:], starts.shape[1 : 1 + n_axes]
    size = math.prod(shape[n_axes:])
    n_directions = min(size, MOST_DIRECTIONS)
    normals = jax.random.normal(jax.random.key(0), (*samples, size, n_directions), starts.dtype)

    def as_states(directions: Array) -> Array:
        return jnp.moveaxis(directions, -1, 0).reshape(n_directions, *shape)

    def as_columns(states: Array) -> Array:
        return jnp.moveaxis(states.reshape(n_directions, *samples, size), 0, -1)

    def advance(directions, row):
        start, times = row

        def push(direction):
            return jax.jvp(lambda u: steps(args, u, *times).end, (start,), (direction,))[1]

        pushed = as_columns(jax.vmap(push)(as_states(directions)))
        length = jnp.linalg.norm(pushed, axis=(-2, -1), keepdims=True)
        usable = jnp.isfinite(length) & (length > 0)
        length = jnp.where(usable, length, 1.0)
        directions = jnp.where(usable, pushed / length, directions)
        return directions, (jnp.log(length)[..., 0, 0], usable[..., 0, 0])

    first = jnp.linalg.qr(normals)[0]
    last, (logs, followed) = jax.lax.scan(advance, first, (starts, times))
    longest = jnp.linalg.norm(last, ord=2, axis=(-2, -1))
    return _Growth(jnp.sum(logs, axis=0) + jnp.log(longest), followed)
