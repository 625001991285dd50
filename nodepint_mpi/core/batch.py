"""The samples of an optimizer step, as arrays: what one group of ranks has of them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nodepint_mpi.core.exogenous import Signal

Numbers = Any
"""An array: of NumPy on the host, of JAX inside a step."""


class Reads(NamedTuple):
    """Where one rank reads samples that have times of their own.

    `times` (owned, samples, inside) are those strictly inside each owned slice, counted from its
    left edge. Row i of a sample reads owned slice `slices[i]` at `slots[i]` (the last slot is the
    slice's end) and is compared with column `columns[i]` of its targets, all (reads, samples); rows
    that are not `valid` only fill up.
    """

    times: Numbers
    slices: Numbers
    slots: Numbers
    columns: Numbers
    valid: Numbers


class SampleBatch(NamedTuple):
    """Samples as the step wants them; what they do not have is None.

    Args:
        initial: What the encoder gets, (samples, ...).
        targets: Observations, (samples, times, ...), zero where there is none.
        mask: Whether there is one, of the shape of `targets`.
        weights: Of observations in the loss, (samples, times).
        times: Observation times of each sample, (samples, times).
        static: Numbers of each sample for the field, (samples, features).
        signal: Inputs over time around the rank's slices.
        reads: Where the rank reads samples with times of their own.
        at_edges: Observations interpolated to all slice edges, (edges, samples, ...), where a
            relaxed solve cannot do that by itself.
        known: Whether there are any around an edge, (edges, samples).
        rows: Global row numbers, (samples,), of which random keys are made.
        step: The optimizer step; None outside training.
    """

    initial: Numbers
    targets: Numbers
    mask: Numbers = None
    weights: Numbers = None
    times: Numbers = None
    static: Numbers = None
    signal: Signal | None = None
    reads: Reads | None = None
    at_edges: Numbers = None
    known: Numbers = None
    rows: Numbers = None
    step: Numbers = None


def encoder_reads(batch: SampleBatch, samples: range) -> SampleBatch:
    """What an encoder may read of consecutive samples of a batch. Local."""

    def own(array: Numbers) -> Numbers:
        return None if array is None else array[samples.start : samples.stop]

    return SampleBatch(
        own(batch.initial),
        own(batch.targets),
        own(batch.mask),
        times=own(batch.times),
        static=own(batch.static),
        rows=own(batch.rows),
        step=batch.step,
    )


def as_numbers(inputs: Array, dtype: Any = None) -> Array:
    """Inputs in the precision of the run, or a given one; bytes, such as gray, in [0, 1]. Local."""
    scale = 255 if inputs.dtype == jnp.uint8 else 1
    return inputs.astype(dtype or jnp.zeros(()).dtype) / scale


def place_reads(
    times: np.ndarray, lengths: np.ndarray, edges: np.ndarray, owned: range, sizes: "ReadSizes"
) -> Reads:
    """Assign each sample's observation times to slices, and cut out one rank's block. Local.

    A time on an edge is read at the end of the slice left of it; one at the first edge is the
    initial state and is not read.

    Args:
        times: (samples, longest), snapped to the edges by `snap_times`.
        lengths: How many times each sample has.
        edges: All slice boundaries.
        owned: Global indices of the rank's slices.
        sizes: Of the arrays; see `count_reads`.
    """
    n_samples = len(times)
    home, at_end, place = _places(times, lengths, edges)
    inside = np.zeros((len(owned), n_samples, sizes.inside))
    here = (home >= owned.start) & (home < owned.stop)
    samples, columns = np.nonzero(here)  # sample by sample, in the order of time
    local = home[samples, columns] - owned.start
    slots = np.where(at_end[samples, columns], sizes.inside, place[samples, columns])
    within = ~at_end[samples, columns]
    lefts = edges[owned.start : owned.stop]
    inside[local[within], samples[within], slots[within]] = (
        times[samples, columns][within] - lefts[local[within]]
    )
    counts = np.sum(here, axis=1)
    rows = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (sizes.reads, n_samples)
    parts = tuple(np.zeros(shape, dtype=np.int32) for _ in range(3))
    valid = np.zeros(shape, dtype=bool)
    for part, values in zip(parts, (local, slots, columns), strict=True):
        part[rows, samples] = values
    valid[rows, samples] = True
    _fill_up(inside, np.diff(edges)[owned.start : owned.stop], home, at_end, owned)
    return Reads(inside, parts[0], parts[1], parts[2], valid)


class ReadSizes(NamedTuple):
    """The most observations strictly inside a slice, and of a sample in this rank's block."""

    inside: int
    reads: int


def count_reads(
    times: np.ndarray, lengths: np.ndarray, edges: np.ndarray, owned: range
) -> ReadSizes:
    """How large the arrays of `place_reads` have to be for any of these rows. Local."""
    home, at_end, place = _places(times, lengths, edges)
    within = (home >= 0) & ~at_end
    here = (home >= owned.start) & (home < owned.stop)
    return ReadSizes(
        int(np.max(np.where(within, place + 1, 0), initial=0)),
        max(1, int(np.max(np.sum(here, axis=1), initial=0))),
    )


def _places(
    times: np.ndarray, lengths: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slice of each time (-1 where it is not read), whether at its end, and which one inside."""
    real = np.arange(times.shape[1]) < lengths[:, None]
    home = np.where(real, np.searchsorted(edges, times, side="left") - 1, -1)
    at_end = (home >= 0) & (times == edges[home + 1])
    # Times increase, so those of a slice are neighbors: the place counts from the first of them.
    columns = np.broadcast_to(np.arange(times.shape[1]), times.shape)
    begins = np.ones_like(real)
    begins[:, 1:] = home[:, 1:] != home[:, :-1]
    first = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return home, at_end, columns - first


def _fill_up(
    inside: np.ndarray, lengths: np.ndarray, home: np.ndarray, at_end: np.ndarray, owned: range
) -> None:
    """Times behind a slice's own: distinct and increasing, as integrators want them."""
    width = inside.shape[2]
    if not width:
        return
    counts = np.stack([np.sum((home == n) & ~at_end, axis=1) for n in owned])  # (owned, samples)
    last = np.where(
        counts > 0, np.take_along_axis(inside, np.maximum(counts - 1, 0)[..., None], 2)[..., 0], 0.0
    )
    place = np.arange(width)
    behind = place - counts[..., None] + 1
    room = width - counts + 1
    filled = last[..., None] + (lengths[:, None] - last)[..., None] * behind / room[..., None]
    inside[:] = np.where(behind > 0, filled, inside)


def observe_at_edges(
    times: np.ndarray, targets: np.ndarray, mask: np.ndarray | None, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Observations interpolated linearly to all slice edges, from those that were made. Local.

    Args:
        times: (samples, longest).
        targets: (samples, longest, ...).
        mask: Of their shape; all were made if None.
        edges: All slice boundaries.

    Returns:
        States (edges, samples, ...), zero where a sample was not observed on both sides of an edge,
        and one where it was and zero elsewhere, (edges, samples).
    """
    n_samples, _, *shape = targets.shape
    flat = targets.reshape(n_samples, targets.shape[1], -1)
    there = np.ones(flat.shape, bool) if mask is None else mask.reshape(flat.shape)
    found = np.zeros((len(edges), n_samples, flat.shape[2]))
    known = np.ones((len(edges), n_samples))
    for b in range(n_samples):
        for i in range(flat.shape[2]):
            seen = there[b, :, i]
            own = times[b][seen]
            if not len(own):
                known[:, b] = 0.0
                continue
            found[:, b, i] = np.interp(edges, own, flat[b, seen, i])
            known[(edges < own[0]) | (edges > own[-1]), b] = 0.0
    found = np.where(known[..., None] > 0, found, 0.0)
    return found.reshape(len(edges), n_samples, *shape), known
