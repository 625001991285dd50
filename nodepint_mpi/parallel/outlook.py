"""What to expect of a time-parallel solve, before it is done: growth of errors, sweeps, gain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.propagators import AbstractIntegrator, FixedSteps, Propagator
from nodepint_mpi.core.sweeps import end_times
from nodepint_mpi.core.types import Field
from nodepint_mpi.parallel.solution import Solution, Status


class Forecast(NamedTuple):
    """Expectations of a solve on `n_ranks` ranks; equal on all ranks.

    `exponent` estimates the leading Lyapunov exponent over the horizon, in inverse time;
    `log10_growth` is what it makes of an error by the end. `sweeps` were needed by the rehearsal,
    None if it did not converge or could not be held.
    """

    exponent: float
    log10_growth: float
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
        growth = (
            f"errors grow 10^{self.log10_growth:.1f} times over the horizon (leading exponent "
            f"{self.exponent:.3g}); "
        )
        return growth + self._gain

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


def make_forecast(
    rehearse: Callable[[AbstractIntegrator], Solution],
    field: Field,
    args: Any,
    coarse: AbstractIntegrator,
    edges: np.ndarray,
    n_ranks: int,
) -> Forecast:
    """Hold a rehearsal and estimate how errors grow. Collective.

    The rehearsal is the same solve with the coarse propagator of doubled steps in the place of the
    fine one: it costs what the coarse propagator costs, and its iteration contracts almost alike.

    Args:
        rehearse: Solves with the fine propagator it is given. Collective.
        field: Vector field.
        args: What it is given.
        coarse: Steps of the coarse propagator.
        edges: Slice boundaries.
        n_ranks: Ranks of the line.
    """
    better = (
        FixedSteps(coarse.solver, 2 * coarse.n_steps) if isinstance(coarse, FixedSteps) else coarse
    )
    solution = rehearse(better)
    solved = isinstance(coarse, FixedSteps) and solution.status is Status.CONVERGED
    tangents = Propagator(field, coarse.for_tangents())
    times = tuple(np.asarray(edges, dtype=float).tolist())
    log_growth = float(_log_growth(tangents, args, solution.interface[:-1], times))
    span = float(edges[-1] - edges[0])
    return Forecast(
        exponent=log_growth / span,
        log10_growth=log_growth / float(np.log(10)),
        sweeps=solution.sweeps if solved else None,
        n_slices=len(edges) - 1,
        n_ranks=n_ranks,
    )


@eqx.filter_jit
def _log_growth(
    coarse: Propagator, args: Any, starts: Array, edges: tuple[float, ...]
) -> Float[Array, ""]:
    """Logarithm of the growth of a perturbation pushed through all slices, renormalized in each."""
    times = end_times(own_slices(np.asarray(edges), 1, 0), starts)
    direction = jax.random.normal(jax.random.key(0), starts.shape[1:], starts.dtype)

    def advance(direction, row):
        start, times = row

        def flow(u):
            return coarse(args, u, *times).end

        _, pushed = jax.jvp(flow, (start,), (direction,))
        length = jnp.linalg.norm(jnp.ravel(pushed))
        usable = jnp.isfinite(length) & (length > 0)
        direction = jnp.where(usable, pushed / jnp.where(usable, length, 1.0), direction)
        return direction, jnp.where(usable, jnp.log(length), 0.0)

    direction = direction / jnp.linalg.norm(jnp.ravel(direction))
    _, logs = jax.lax.scan(advance, direction, (starts, times))
    return jnp.sum(logs)
