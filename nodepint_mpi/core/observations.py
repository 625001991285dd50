"""Which rank reads the state at which observation time."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from nodepint_mpi.core.partition import OwnedSlices, own_slices, snap_times
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.errors import ProblemError


class BlockObservations(NamedTuple):
    """The observations that fall into one rank's block, in the order of time.

    Row i reads owned slice `slices[i]` at `slots[i]` (the last slot is the slice's end) and is
    compared with column `indices[i]` of the targets.
    """

    owned: OwnedSlices
    slices: np.ndarray
    slots: np.ndarray
    indices: np.ndarray

    def read(self, result: SliceResult) -> Inexact[Array, "seen *state"]:
        """States at this rank's observation times. Local."""
        states = jnp.concatenate([result.saves, result.end[:, None]], axis=1)
        return states[self.slices, self.slots]


def place_observations(
    times: np.ndarray, edges: np.ndarray, n_ranks: int, rank: int
) -> BlockObservations:
    """Assign observation times to slices, and cut out one rank's block. Local.

    A time on a boundary is read at the end of the slice left of it, where it costs nothing. A
    time equal to the first edge is the initial state and is not read.

    Raises:
        ProblemError: if times are not increasing, or lie outside the horizon.
        LayoutError: if there are more ranks than slices.
    """
    times = np.asarray(times, dtype=float)
    if times.ndim != 1 or not np.all(np.diff(times) > 0):
        raise ProblemError("Observation times must be one list of increasing numbers.")
    snapped = snap_times(times, edges)
    if len(times) and (snapped[0] < edges[0] or snapped[-1] > edges[-1]):
        raise ProblemError(
            f"Observation times run from {times[0]:g} to {times[-1]:g}, outside the horizon "
            f"[{edges[0]:g}, {edges[-1]:g}]: change `time.horizon`."
        )
    home = np.searchsorted(edges, snapped, side="left") - 1
    at_end = (home >= 0) & (snapped == edges[home + 1])
    inside = [snapped[(home == n) & ~at_end] for n in range(len(edges) - 1)]
    owned = own_slices(edges, n_ranks, rank, inside=inside)
    width = owned.ts.shape[1]
    slot = [width if at_end[i] else int(np.sum(inside[n] < snapped[i])) for i, n in enumerate(home)]
    seen = [
        (n - owned.first, slot[i], i)
        for i, n in enumerate(home)
        if owned.first <= n < owned.first + owned.n_owned
    ]
    slices, slots, indices = np.array(seen, dtype=int).reshape(-1, 3).T
    return BlockObservations(owned, slices, slots, indices)
