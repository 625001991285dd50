"""Where tracks wait for their samples' next turn."""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.config.time import TrackingSection
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.dealing import own_part, part_of, swap
from nodepint_mpi.parallel.methods import AbstractSweeps
from nodepint_mpi.parallel.track import Tracks
from nodepint_mpi.training.setup import Experiment

_log = logging.getLogger(__name__)


def bytes_each(n_slices: int, state: jax.ShapeDtypeStruct) -> int:
    """Bytes a sample's tracks take on so many slices, for states (samples, *state). Local."""
    return 2 * n_slices * math.prod(state.shape[1:]) * state.dtype.itemsize


def count_kept(section: TrackingSection, n_rows: int, each: int) -> int:
    """How many samples' tracks are kept, whatever the number of ranks. Local."""
    return min(n_rows, int(section.store_mb * 1e6) // each)


class TrackStore:
    """The tracks of all samples on the owned slices of this rank; `take` and `put` are collective
    over the ranks that own the same slices.

    With all samples in every step the tracks stay on the device. With mini-batches they are kept
    on the host by sample, as many as fit into `store_mb` on all ranks together; the others start
    from the coarse solution in every step, as all do on their first. Every group of ranks keeps
    its part of the samples, and lends them to the group whose turn it is.

    Raises:
        ConfigError: for mini-batches with a method that cannot start a sample from nothing.
    """

    def __init__(self, experiment: Experiment, section: TrackingSection):
        problem, method = experiment.train_problem, experiment.method
        assert isinstance(method, AbstractSweeps)  # a serial solve has no tracks
        owned, state = problem.observations.owned, experiment.state
        self._method, self._state, self._comms = method, state, experiment.comms
        self._blank = method.blank_track((owned.n_owned, *state.shape), state.dtype)
        self._tracks: Tracks | None = None
        self._store: list[np.ndarray] = []
        if experiment.config.data is None or experiment.config.data.batch_size is None:
            self._tracks = self._first()
            return
        if self._blank is None:
            raise ConfigError(
                "`[time.tracking]` of mini-batches needs `time.method = 'parareal'`: other methods "
                "have nothing to start a new sample from."
            )
        shape = (owned.n_owned, *state.shape[1:])
        n_rows = experiment.train.n_rows
        each = bytes_each(owned.n_slices, state)
        n_kept = count_kept(section, n_rows, each)
        if n_kept < n_rows:
            _log.warning(
                "`time.tracking.store_mb` holds %d of %d samples (%.3g MB would hold all)",
                n_kept, n_rows, n_rows * each / 1e6,
            )  # fmt: skip
        self._n_kept = n_kept
        kept = own_part(experiment.comms.time, n_kept)
        n_own = kept.stop - kept.start
        self._store = [np.zeros((shape[0], n_own, *shape[1:]), state.dtype) for _ in range(2)]

    def take(self, rows: np.ndarray) -> Tracks:
        """The tracks of this group's part of the samples `rows`, which are those of all groups."""
        if self._tracks is not None:
            return self._tracks
        lent, borrowed = self._loans(rows)
        taken = []
        for block in self._store:
            shapes = [(len(block), len(at), *block.shape[2:]) for at in borrowed]
            parts = swap(self._comms.data, [block[:, kept] for kept in lent], shapes)
            whole = np.zeros((len(block), *self._state.shape), block.dtype)
            for at, part in zip(borrowed, parts, strict=True):
                whole[:, at] = part
            taken.append(jnp.asarray(whole))
        return Tracks(*taken)

    def put(self, rows: np.ndarray, tracks: Tracks) -> None:
        """Keep the tracks of this group's part of `rows`; those that are None are begun anew."""
        tracks = tracks if tracks.states is not None else self._first()
        if self._tracks is not None:
            self._tracks = tracks
            return
        lent, borrowed = self._loans(rows)
        for block, new in zip(self._store, (tracks.states, tracks.cotangents), strict=True):
            new = np.asarray(new)
            shapes = [(len(block), len(kept), *block.shape[2:]) for kept in lent]
            parts = swap(self._comms.data, [new[:, at] for at in borrowed], shapes)
            for kept, part in zip(lent, parts, strict=True):
                block[:, kept] = part

    def _loans(self, rows: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For every group: which of the samples kept here it takes in this step, and where in this
        group's part of the step are those that it keeps."""
        n_groups, group = self._comms.time.n_groups, self._comms.time.group
        own = rows[part_of(len(rows), n_groups, group)]
        kept = part_of(self._n_kept, n_groups, group)
        lent, borrowed = [], []
        for other in range(n_groups):
            theirs = rows[part_of(len(rows), n_groups, other)]
            lent.append(theirs[(theirs >= kept.start) & (theirs < kept.stop)] - kept.start)
            held = part_of(self._n_kept, n_groups, other)
            borrowed.append(np.flatnonzero((own >= held.start) & (own < held.stop)))
        return lent, borrowed

    def kept(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """For a checkpoint: what is equal on all ranks, and rows by slice."""
        if self._tracks is None:
            return {}, dict(zip(("tracks", "cotracks"), self._store, strict=True))
        tracks = self._tracks
        replicated, rows = self._method.blank(self._state), {}
        if tracks.memory is not None:
            replicated, rows = self._method.kept(tracks.memory)
        blocks = {"tracks": tracks.states, "cotracks": tracks.cotangents}
        rows = rows | {name: block for name, block in blocks.items() if block is not None}
        return replicated, {name: np.asarray(block) for name, block in rows.items()}

    def restore(self, replicated: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
        """Go on from `kept`."""
        if self._tracks is None:
            self._store = [np.array(rows["tracks"]), np.array(rows["cotracks"])]
            return
        if "tracks" in rows:  # else nothing was known
            blocks = {name: jnp.asarray(block) for name, block in rows.items()}
            memory = self._method.recalled(jax.tree.map(jnp.asarray, replicated), blocks)
            self._tracks = Tracks(blocks["tracks"], blocks["cotracks"], memory)

    def _first(self) -> Tracks:
        """Before the first sweep."""
        if self._blank is None:
            return Tracks()
        return Tracks(jnp.array(self._blank), jnp.array(self._blank))
