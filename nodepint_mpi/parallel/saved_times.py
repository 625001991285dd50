"""States at times of the user's own, as diffrax saves them: no slice has to end there.

A time on a slice boundary is read there. One inside a slice is read within the fine step it falls
into, by the interpolation of that solver, so no step is cut and the interface does not change.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Inexact

from nodepint_mpi.core.observations import BlockObservations, place_observations
from nodepint_mpi.core.partition import owned_range, snap_times
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.types import State
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.exchange import gather_rows
from nodepint_mpi.parallel.same_arguments import value_of


class SavedTimes(NamedTuple):
    """Which rank reads which saved time.

    `here` are those in the slices of this rank, `counts` how many each rank reads. The first time
    may be that of the initial state (`at_start`), which nobody reads.
    """

    here: BlockObservations
    counts: tuple[int, ...]
    at_start: bool
    rank: int

    @property
    def held(self) -> tuple[int, int]:
        """The first of the times in this rank's slices, and the one after the last. Local.

        The first rank has that of the initial state as well.
        """
        begin = self._begin
        return (begin if self.rank else 0), begin + self.counts[self.rank]

    @property
    def _begin(self) -> int:
        return int(self.at_start) + sum(self.counts[: self.rank])

    def read(self, comm: TimeComm, initial: State, result: SliceResult) -> Array:
        """All saved states, (times, *state), on all ranks. Collective, inside jit."""
        rows = gather_rows(comm, self.here.read(result), self.counts)
        return jnp.concatenate([initial[None], rows]) if self.at_start else rows

    def pull_back(self, bar: Array, like: SliceResult) -> tuple[SliceResult, Array]:
        """Cotangents of all saved states, as those of what this rank reads, and as that of the
        initial state. Local."""
        mine = bar[self._begin : self._begin + self.counts[self.rank]]
        (sources,) = jax.linear_transpose(self.here.read, like)(mine)
        return sources, bar[0] if self.at_start else jnp.zeros_like(like.end[0])


def place_saved_times(ts: np.ndarray, edges: np.ndarray, n_ranks: int, rank: int) -> SavedTimes:
    """Assign checked times to slices, and these to ranks. Local."""
    here = place_observations(ts, edges, n_ranks, rank)
    at_start = len(ts) > 0 and bool(ts[0] == edges[0])
    home = np.searchsorted(edges, ts[int(at_start) :], side="left") - 1  # as placed there
    n_slices = len(edges) - 1
    bounds = [owned_range(n_slices, n_ranks, r).start for r in range(n_ranks)] + [n_slices]
    counts = np.histogram(home, bounds)[0] if len(home) else np.zeros(n_ranks, int)
    return SavedTimes(here, tuple(counts.tolist()), at_start, rank)


def check_saved_times(ts: Any, edges: np.ndarray) -> np.ndarray:
    """The times to save at as a 1-D float array, those next to a slice boundary on it. Local.

    Raises:
        ProblemError: if they are traced, no list of increasing numbers, or outside the horizon.
    """
    if isinstance(value_of(ts), Tracer):
        raise ProblemError("`ts` is traced; times must be known outside of `jax.jit`.")
    try:
        given = np.asarray(value_of(ts), dtype=float)
    except (TypeError, ValueError) as error:
        raise ProblemError(f"`ts` is not a list of times: {error}.") from error
    if given.ndim != 1 or len(given) == 0:
        raise ProblemError(
            f"`ts` has shape {given.shape}; it must list at least one time. Leave it out if only "
            "the states at `edges` are wanted."
        )
    if not np.all(np.isfinite(given)):
        raise ProblemError("`ts` holds NaN or infinity; times must be finite.")
    times = snap_times(given, edges)
    if not np.all(np.diff(times) > 0):
        n = int(np.argmin(np.diff(times) > 0))
        raise ProblemError(
            f"`ts` must be strictly increasing: {given[n]:.17g} is followed by "
            f"{given[n + 1]:.17g}. Sort the times and keep one of those that are equal."
        )
    if times[0] < edges[0] or times[-1] > edges[-1]:
        outside = given[0] if times[0] < edges[0] else given[-1]
        raise ProblemError(
            f"`ts` holds {outside:g}, outside the horizon [{edges[0]:g}, {edges[-1]:g}] of "
            "`edges`: lengthen `edges` or leave that time out."
        )
    return times


def states_before(
    ys: Inexact[Array, "times *state"], ts: np.ndarray, edges: np.ndarray, broken: Array
) -> Inexact[Array, "times *state"]:
    """Saved states before the slice whose fine solve failed; NaN inside it and after it. Local."""
    home = np.maximum(np.searchsorted(edges, ts, side="left") - 1, -1)
    good = jnp.asarray(home).reshape(-1, *[1] * (ys.ndim - 1)) < broken
    return jnp.where(good, ys, jnp.nan)
