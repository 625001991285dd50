"""Where what a sample's sweeps have left waits for its next turn."""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.config.time import TrackingSection
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.dealing import own_part, part_of, swap
from nodepint_mpi.parallel.methods.base import ENDS, LEFTS, Carry
from nodepint_mpi.training.setup import Experiment

_log = logging.getLogger(__name__)


def bytes_each(n_slices: int, state: jax.ShapeDtypeStruct, n_rows: int = 2) -> int:
    """Bytes a sample's tracks take on so many slices, for states (samples, *state). Local.

    `n_rows` is the number of states for each slice.
    """
    return n_rows * n_slices * math.prod(state.shape[1:]) * state.dtype.itemsize


def count_kept(section: TrackingSection, n_rows: int, each: int) -> int:
    """How many samples' tracks are kept, whatever the number of ranks. Local."""
    return min(n_rows, int(section.store_mb * 1e6) // each)


class WarmStarts:
    """What all samples' next sweeps start from on the owned slices of this rank.

    `take` and `put` are collective over the ranks that own the same slices.

    With all samples in every step the carry stays on the device. With mini-batches its rows are
    kept on the host by sample, as many as fit into `store_mb` on all ranks together; the others
    start from the coarse solution in every step, as all do on their first. Every group of ranks
    keeps its part of the samples, and lends them to the group whose turn it is.

    Raises:
        ConfigError: for mini-batches with a method that cannot start a sample from nothing.
    """

    def __init__(self, experiment: Experiment, section: TrackingSection):
        owned, state = experiment.train_problem.observations.owned, experiment.state
        self._state, self._comms = state, experiment.comms
        self._blank = experiment.method.carry_like(owned.n_owned, state)
        self._carry: Carry | None = None
        self._store: dict[str, np.ndarray] = {}
        if experiment.config.data is None or experiment.config.data.batch_size is None:
            self._carry = self._first()
            return
        if not self._blank.rows:
            raise ConfigError(
                "`[time.tracking]` of mini-batches needs `time.method = 'parareal'`: other methods "
                "have nothing to start a new sample from."
            )
        shape = (owned.n_owned, *state.shape[1:])
        n_rows = experiment.train.n_rows
        each = bytes_each(owned.n_slices, state, len(self._blank.rows))
        n_kept = count_kept(section, n_rows, each)
        if n_kept < n_rows:
            _log.warning(
                "`time.tracking.store_mb` holds %d of %d samples (%.3g MB would hold all)",
                n_kept, n_rows, n_rows * each / 1e6,
            )  # fmt: skip
        self._n_kept = n_kept
        kept = own_part(experiment.comms.time, n_kept)
        n_own = kept.stop - kept.start
        blank = np.zeros((shape[0], n_own, *shape[1:]), state.dtype)
        self._store = {name: blank.copy() for name in self._blank.rows}

    def take(self, rows: np.ndarray) -> Carry:
        """The carry of this group's part of the samples `rows`, which are those of all groups."""
        if self._carry is not None:
            return self._carry
        lent, borrowed = self._loans(rows)
        taken = {}
        for name, block in self._store.items():
            shapes = [(len(block), len(at), *block.shape[2:]) for at in borrowed]
            parts = swap(self._comms.data, [block[:, kept] for kept in lent], shapes)
            whole = np.zeros((len(block), *self._state.shape), block.dtype)
            for at, part in zip(borrowed, parts, strict=True):
                whole[:, at] = part
            taken[name] = jnp.asarray(whole)
        return Carry(taken, {})

    def put(self, rows: np.ndarray, carry: Carry) -> None:
        """Keep the carry of this group's part of `rows`; an empty one begins anew."""
        carry = carry if carry.rows else self._first()
        if self._carry is not None:
            self._carry = carry
            return
        lent, borrowed = self._loans(rows)
        for name, block in self._store.items():
            new = np.asarray(carry.rows[name])
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
        if self._carry is None:
            return {}, dict(self._store)
        rows, replicated = self._carry
        return replicated or self._blank.replicated, {k: np.asarray(v) for k, v in rows.items()}

    def restore(self, replicated: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
        """Go on from `kept`."""
        rows = self._renamed(rows)
        if self._carry is None:
            self._store = {name: np.array(rows[name]) for name in self._store}
        elif rows:  # else nothing was known
            self._carry = Carry(*jax.tree.map(jnp.asarray, (rows, replicated)))

    def _first(self) -> Carry:
        """Before the first sweep: a basis is not known, however it will be shaped."""
        return Carry({name: jnp.array(block) for name, block in self._blank.rows.items()}, {})

    def _renamed(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows by their names of today: older checkpoints called both kinds alike."""
        forward, backward, *_ = tuple(self._blank.rows) or (ENDS, LEFTS)
        names = {"tracks": forward, "cotracks": backward}
        return {names.get(name, name): block for name, block in rows.items()}
