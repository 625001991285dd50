"""The judge of a time-parallel solve: jumps, updates, the frozen front, and what failed.

What ranks measure on their own slices becomes one record, equal on all of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.sweeps import (
    BlockStates,
    sample_distance,
    samples_finite,
    slice_distance,
    slices_finite,
)
from nodepint_mpi.core.types import Block
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import cond
from nodepint_mpi.parallel.exchange import max_over_ranks
from nodepint_mpi.parallel.methods.base import Counts, Memory, Swept
from nodepint_mpi.parallel.pace import Pace


class SweepRecord(NamedTuple):
    """What happened in a solve; equal on all ranks. Row k belongs to the iterate U^k.

    `jumps[k]` is the largest jump of U^k (NaN where it was not evaluated), `updates[k]` the
    largest change from U^(k-1), `fronts[k]` the number of frozen slices. The last jump of
    a converged solve is the one it was judged by: the largest with which a slice was frozen.

    `n_guarded` is the largest number of slices on one rank where a sweep stepped around a
    non-finite value, `n_damped` the largest number whose correction was cut in a sweep,
    `n_fallbacks` the number of sweeps that another method took over.

    `broken` is the slice whose fine solve failed from a solved start, `n_slices` if there is none;
    `finite` says that there is none. `broken_entry` is the first entry of the flattened state that
    was not finite at its end, -1 if all were not, as where it ran out of steps.

    `sample_sweeps` are the sweeps after which all slices of each sample were solved by the rule;
    None without batch axes.
    """

    n_sweeps: Int[Array, ""]
    jumps: Float[Array, " iterates"]
    updates: Float[Array, " iterates"]
    fronts: Int[Array, " iterates"]
    n_guarded: Int[Array, ""]
    n_damped: Int[Array, ""]
    n_fallbacks: Int[Array, ""]
    finite: Bool[Array, ""]
    broken: Int[Array, ""]
    broken_entry: Int[Array, ""]
    sample_sweeps: Int[Array, "*samples"] | None


class Iterate(NamedTuple):
    """A forward iterate: what the method has, how good it is, what was measured on the way."""

    states: BlockStates
    memory: Memory
    counts: Counts
    record: SweepRecord
    frozen_jumps: Float[Array, " owned"]
    bad_entries: Int[Array, " owned"]
    pace: Pace

    @property
    def swept(self) -> Swept:
        """As the method knows it."""
        return Swept(self.states, self.memory, self.counts)


def judge_updates(line, iterate, corrected, fine_ends, stopping) -> SweepRecord:
    """Measure what a sweep has changed; all ranks agree on the front.

    A slice whose fine solve failed is not solved, however little the sweep changed it.
    """
    record, old, owned = iterate.record, iterate.states, line.owned
    k, samples = record.n_sweeps + 1, None
    if stopping.freezes_by_update and record.sample_sweeps is not None:
        pairs = zip(corrected.states, old, strict=True)
        n_axes = record.sample_sweeps.ndim
        moved = [sample_distance(*pair, n_batch_axes=n_axes, norm=stopping.norm) for pair in pairs]
        finite = samples_finite(fine_ends, 1 + n_axes).reshape(moved[0].shape)
        unsolved = stopping.unsolved_by_update(*moved)
        if stopping.judges_end:
            unsolved = unsolved & _is_last(owned).reshape(-1, *[1] * n_axes)
        unsolved = unsolved | ~finite
        samples = _any_after(unsolved, front_of(record) + 1, owned)
    start_updates = slice_distance(corrected.states.starts, old.starts, stopping.norm)
    end_updates = slice_distance(corrected.states.ends, old.ends, stopping.norm)
    unsolved, failed = (
        stopping.unsolved_by_update(start_updates, end_updates), ~slices_finite(fine_ends)
    )  # fmt: skip
    end_unsolved = jnp.any((unsolved & _is_last(owned)) | failed)
    unsolved = jnp.ones_like(unsolved) if stopping.judges_end else unsolved | failed
    local = [
        jnp.max(end_updates),
        -first_unsolved(unsolved, front_of(record) + 1, owned),
        jnp.max(iterate.frozen_jumps),
        corrected.counts.guarded,
        corrected.counts.damped,
    ]
    local += [end_unsolved] if stopping.judges_end else []
    largest, record = _agree(line, local, samples, record, k)
    update, minus_front, frozen_jump, *counts = largest
    guarded, damped = (count.astype(record.n_guarded.dtype) for count in counts[:2])
    front = (-minus_front).astype(record.fronts.dtype)
    if stopping.judges_end:
        front = jnp.where(largest[-1] > 0, front, owned.n_slices)
    return record._replace(
        n_sweeps=k,
        jumps=record.jumps.at[k].set(jnp.where(front == owned.n_slices, frozen_jump, jnp.nan)),
        updates=record.updates.at[k].set(update),
        fronts=record.fronts.at[k].set(front),
        n_guarded=jnp.maximum(record.n_guarded, guarded),
        n_damped=jnp.maximum(record.n_damped, damped),
    )


def judge_jumps(line, iterate, fine_ends, stopping) -> Iterate:
    """Measure the jumps of an iterate; all ranks agree on the front and on whether it is sane."""
    record, owned = iterate.record, line.owned
    front = front_of(record)
    jumps = slice_distance(fine_ends, iterate.states.ends, stopping.norm)
    failed = ~slices_finite(fine_ends)
    unsolved = stopping.unsolved_by_jump(jumps) | failed
    k, samples = record.n_sweeps, None
    if record.sample_sweeps is not None and not stopping.freezes_by_update:
        n_axes = record.sample_sweeps.ndim
        of_samples = sample_distance(
            fine_ends, iterate.states.ends, n_batch_axes=n_axes, norm=stopping.norm
        )
        samples = _any_after(stopping.unsolved_by_jump(of_samples), front, owned)
    local = [
        jnp.max(jumps),
        -first_unsolved(unsolved, front, owned),
        -first_unsolved(failed, front, owned),
    ]
    (jump, *minus), record = _agree(line, local, samples, record, k)
    new_front, first_failed = ((-index).astype(record.fronts.dtype) for index in minus)
    index = jnp.asarray(owned.indices)
    frozen_now = (index >= front) & (index < new_front)
    # All slices before the front are solved, so one that fails there would fail serially, too.
    broken = jnp.where(first_failed == new_front, first_failed, owned.n_slices)
    record = record._replace(
        jumps=record.jumps.at[k].set(jump),
        fronts=record.fronts.at[k].set(new_front),
        finite=broken == owned.n_slices,
        broken=broken,
    )
    return iterate._replace(
        record=record,
        frozen_jumps=jnp.where(frozen_now, jumps, iterate.frozen_jumps),
        bad_entries=first_bad_entries(fine_ends),
    )


def confirm_frozen(line, iterate, fine_ends) -> Iterate:
    """Judge slices that were frozen by their updates by fine solves from their frozen starts."""
    record, states = iterate.record, iterate.states
    failed = first_unsolved(~slices_finite(fine_ends), 0, line.owned)
    local = jnp.stack(
        [
            jnp.max(slice_distance(fine_ends, states.ends)),
            -failed.astype(record.jumps.dtype),
        ]
    )
    jump, minus_failed = max_over_ranks(line.comm, local)
    broken = (-minus_failed).astype(record.broken.dtype)
    record = record._replace(
        jumps=record.jumps.at[record.n_sweeps].set(jump),
        finite=broken == line.owned.n_slices,
        broken=broken,
    )
    return iterate._replace(record=record, bad_entries=first_bad_entries(fine_ends))


def first_bad_entries(fine_ends: Block) -> Int[Array, " owned"]:
    """The first entry of every slice's end that is not finite; -1 if none or all are not."""
    bad = ~jnp.isfinite(fine_ends.reshape(len(fine_ends), -1))
    return jnp.where(jnp.all(bad, axis=1) | ~jnp.any(bad, axis=1), -1, jnp.argmax(bad, axis=1))


def locate_failure(comm: TimeComm, record: SweepRecord, bad_entries, owned) -> SweepRecord:
    """The record with the entry that failed in the broken slice. Collective where there is one."""

    def locate():
        here = jnp.asarray(owned.indices) == record.broken
        entry = jnp.max(jnp.where(here, bad_entries, -1)).astype(record.broken_entry.dtype)
        return max_over_ranks(comm, entry)

    entry = cond(record.finite, lambda: record.broken_entry, locate, usual=True)
    return record._replace(broken_entry=entry)


def without_unsolvable(states: BlockStates, record: SweepRecord, owned: OwnedSlices):
    """The states up to the slice whose fine solve failed, NaN from its end on."""
    index = jnp.asarray(owned.indices).reshape(-1, *[1] * (states.ends.ndim - 1))
    return BlockStates(
        jnp.where(index > record.broken, jnp.nan, states.starts),
        jnp.where(index >= record.broken, jnp.nan, states.ends),
    )


def _agree(line, local, samples, record, k) -> tuple[list[Array], SweepRecord]:
    """Maxima over all ranks; samples that are unsolved on any take a sweep more than k."""
    dtype, n = record.jumps.dtype, len(local)
    values = jnp.stack([value.astype(dtype) for value in local])
    if samples is not None:
        values = jnp.concatenate([values, jnp.ravel(samples).astype(dtype)])
    largest = max_over_ranks(line.comm, values)
    if samples is not None:
        unsolved = largest[n:].reshape(samples.shape) > 0
        record = record._replace(sample_sweeps=jnp.where(unsolved, k + 1, record.sample_sweeps))
    return list(largest[:n]), record


def _any_after(unsolved, front, owned: OwnedSlices) -> Bool[Array, "*samples"]:
    """Which samples have an unsolved slice of this rank from the front on."""
    index = jnp.asarray(owned.indices).reshape(-1, *[1] * (unsolved.ndim - 1))
    return jnp.any(unsolved & (index >= front), axis=0)


def _is_last(owned: OwnedSlices) -> Bool[Array, " owned"]:
    """Which slice of this rank is the last of all."""
    return jnp.asarray(owned.indices) == owned.n_slices - 1


def with_samples(record: SweepRecord, n_samples: tuple[int, ...]) -> SweepRecord:
    return record._replace(sample_sweeps=jnp.zeros(n_samples, int)) if n_samples else record


def first_unsolved(unsolved, front, owned: OwnedSlices):
    """This rank's first unsolved slice from the front on; `n_slices` if it has none."""
    indices = jnp.asarray(owned.indices)
    return jnp.min(jnp.where(unsolved & (indices >= front), indices, owned.n_slices))


def front_of(record: SweepRecord):
    return record.fronts[record.n_sweeps]


def empty_record(limit: int, dtype, n_slices: int) -> SweepRecord:
    real, none = jnp.finfo(dtype).dtype, jnp.array(0)
    return SweepRecord(
        n_sweeps=none,
        jumps=jnp.full(limit + 1, jnp.nan, real),
        updates=jnp.full(limit + 1, jnp.nan, real),
        fronts=jnp.zeros(limit + 1, int),
        n_guarded=none,
        n_damped=none,
        n_fallbacks=none,
        finite=jnp.array(True),
        broken=jnp.array(n_slices),
        broken_entry=jnp.array(-1),
        sample_sweeps=None,
    )


def serial_record(comm: TimeComm, ends: Block, owned: OwnedSlices) -> SweepRecord:
    """A serial solve has no jumps and is solved, unless a slice fails. Collective."""
    record = empty_record(0, ends.dtype, owned.n_slices)
    dtype = record.jumps.dtype
    first_failed = first_unsolved(~slices_finite(ends), 0, owned).astype(dtype)
    broken = (-max_over_ranks(comm, -first_failed)).astype(record.broken.dtype)
    record = record._replace(
        jumps=jnp.zeros_like(record.jumps),
        fronts=broken[None].astype(record.fronts.dtype),
        finite=broken == owned.n_slices,
        broken=broken,
    )
    return locate_failure(comm, record, first_bad_entries(ends), owned)
