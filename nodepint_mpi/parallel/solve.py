"""The time-parallel iteration: fine solves, jumps, correction sweep, agreement, stop.

    U[n+1] <- F(U_old[n]) + C(U[n]) - C(U_old[n])

Everything here runs inside one jitted function on every rank of the line. Loop conditions are
made from numbers that all ranks agreed on.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.scopes import FINE_FORWARD
from nodepint_mpi.core.stopping import AbstractStopping
from nodepint_mpi.core.sweeps import (
    BlockStates,
    chain_block,
    count_unsolved,
    propagate_block,
    propagate_unsolved,
    slice_distance,
    slices_finite,
)
from nodepint_mpi.core.types import Block, Params, State
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.exchange import max_over_ranks, recv_left, send_right
from nodepint_mpi.parallel.methods import AbstractMethod, AbstractSweeps, Line, Memory, Serial
from nodepint_mpi.parallel.pace import Pace, best_iterate, first_pace, judge_pace
from nodepint_mpi.parallel.tally import Tally, cond, while_loop, work


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


class Interface(NamedTuple):
    """This rank's block of interface states, the record of the solve, and what its method learned.

    `memory` is what the method may use in the adjoint and in the next solve.
    """

    states: BlockStates
    record: SweepRecord
    memory: Memory


class _Iterate(NamedTuple):
    states: BlockStates
    memory: Memory
    record: SweepRecord
    frozen_jumps: Float[Array, " owned"]
    bad_entries: Int[Array, " owned"]
    pace: Pace


def solve_interface(
    comm: TimeComm,
    params: Params,
    initial: State,
    guess: Block | None,
    memory: Memory | None = None,
    *,
    fine: Propagator,
    method: AbstractMethod,
    stopping: AbstractStopping,
    owned: OwnedSlices,
    slices_at_once: int | None = None,
) -> Interface:
    """Solve for the states at all slice boundaries at once.

    Collective over `comm`, inside jit; every rank must pass equal `params` and options.

    After k sweeps the first k slices equal the serial fine solution, and are not propagated any
    more. A slice is frozen only if its fine solve succeeded. One that fails from a solved start
    ends the iteration: `record.finite` is false, `record.broken` is its index, and the states from
    its end on are NaN, since no number there would be right. A failure elsewhere is stepped around.
    A method whose sweeps do not work hands over to its fallback (see `parallel.pace`).

    Args:
        comm: Line of ranks along time.
        params: Parameters of the vector field, replicated.
        initial: State at the first edge, (*state). Read on the first rank only.
        guess: Ends of the owned slices to start from, (owned, *state), on all ranks or none;
            without it the method's own iteration 0.
        memory: What an earlier solve with this method ended with, on all ranks or none.
        fine: The fine propagator F.
        method: How information travels between slices.
        stopping: When slices count as solved. Ignored by Serial.
        owned: The slices of this rank.
        slices_at_once: Slices propagated as one batch; all of a rank's own if None.
    """
    if isinstance(method, Serial):
        incoming = recv_left(comm, initial)
        with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
            starts, result = chain_block(fine, params, incoming, owned)
        send_right(comm, result.end[-1])
        record = serial_record(comm, result.end, owned)
        return Interface(BlockStates(starts, result.end), record, None)
    assert isinstance(method, AbstractSweeps)  # there is nothing else
    line = Line(comm, owned, params)
    fallback = method.fallback()
    first = _first_iterate(line, initial, guess, memory, method, stopping)

    def sweep(iterate: _Iterate) -> _Iterate:
        front = _front(iterate.record)
        n_fine = count_unsolved(front, owned, at_once=slices_at_once)
        with work(FINE_FORWARD, Tally(fine=n_fine)):
            fine_ends = propagate_unsolved(
                fine, params, iterate.states, front, owned, at_once=slices_at_once
            )
        iterate = _judge_jumps(line, iterate, fine_ends, stopping)
        record = iterate.record
        jump = record.jumps[record.n_sweeps]
        pace, taken_over = judge_pace(iterate.pace, jump, iterate.states.ends, fine_ends)
        iterate = iterate._replace(pace=pace)

        def correct():
            return _correct(line, initial, iterate, fine_ends, method, stopping)

        def fall_back():
            return _fall_back(line, initial, iterate, fine_ends, fallback, stopping, taken_over)

        def corrected():
            if fallback is None:
                return correct()
            return cond(pace.falls_back, fall_back, correct)

        unsolved = record.finite & (_front(record) < owned.n_slices)
        return cond(unsolved, corrected, lambda: iterate)

    def unsolved(iterate: _Iterate):
        record = iterate.record
        limit = stopping.sweep_limit(owned.n_slices)
        return record.finite & (_front(record) < owned.n_slices) & (record.n_sweeps < limit)

    last = while_loop(unsolved, sweep, first)
    if stopping.freezes_by_update:

        def confirm():
            with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
                ends = propagate_block(
                    fine, params, last.states.starts, owned, at_once=slices_at_once
                ).end
            return _confirm(line, last, ends)

        last = cond(
            last.record.finite & (_front(last.record) == owned.n_slices), confirm, lambda: last
        )
    record = _locate_failure(comm, last.record, last.bad_entries, owned)
    states = _without_unsolvable(last.states, record, owned)
    return Interface(states, record, last.memory)


def largest_jump(comm: TimeComm, result: SliceResult, states: BlockStates) -> Float[Array, ""]:
    """Largest jump |F(U[n]) - U[n+1]| over all slices. Collective over `comm`, inside jit."""
    return max_over_ranks(comm, jnp.max(slice_distance(result.end, states.ends)))


def _first_iterate(line, initial, guess, memory, method, stopping) -> _Iterate:
    """Iteration 0 of the method."""
    started = method.start(line, initial, guess, memory)
    n_slices = line.owned.n_slices
    record = _empty_record(stopping.sweep_limit(n_slices), initial.dtype, n_slices)
    record = record._replace(n_guarded=max_over_ranks(line.comm, started.counts.guarded))
    frozen = jnp.zeros(line.owned.n_owned, record.jumps.dtype)
    none = jnp.full(line.owned.n_owned, -1)
    pace = first_pace(started.states.ends, has_fallback=method.fallback() is not None)
    return _Iterate(started.states, started.memory, record, frozen, none, pace)


def _correct(line, initial, iterate, fine_ends, method, stopping) -> _Iterate:
    """One sweep of the method, then the agreement on its effect."""
    corrected = method.correct(
        line, initial, iterate.states, fine_ends, _front(iterate.record), iterate.memory,
        iterate.pace.slow,
    )  # fmt: skip
    record = _judge_updates(line, iterate, corrected, fine_ends, stopping)
    return iterate._replace(states=corrected.states, memory=corrected.memory, record=record)


def _fall_back(line, initial, iterate, fine_ends, fallback, stopping, taken_over) -> _Iterate:
    """One sweep of the fallback, from the best iterate if it has just taken over."""
    front, ends = _front(iterate.record), iterate.states.ends
    best = best_iterate(iterate.pace, ends, fine_ends, front, line.owned)
    ends = jnp.where(taken_over, best[0], ends)
    fine_ends = jnp.where(taken_over, best[1], fine_ends)
    guess = fallback.start(line, initial, ends, None)
    iterate = iterate._replace(states=guess.states)
    corrected = fallback.correct(line, initial, guess.states, fine_ends, front, guess.memory)
    record = _judge_updates(line, iterate, corrected, fine_ends, stopping)
    record = record._replace(n_fallbacks=record.n_fallbacks + 1)
    return iterate._replace(states=corrected.states, record=record)


def _judge_updates(line, iterate, corrected, fine_ends, stopping) -> SweepRecord:
    """Measure what a sweep has changed; all ranks agree on the front.

    A slice whose fine solve failed is not solved, however little the sweep changed it.
    """
    record, old, owned = iterate.record, iterate.states, line.owned
    start_updates = slice_distance(corrected.states.starts, old.starts)
    end_updates = slice_distance(corrected.states.ends, old.ends)
    unsolved = stopping.unsolved_by_update(start_updates, end_updates) | ~slices_finite(fine_ends)
    local = [
        jnp.max(end_updates),
        -_first_unsolved(unsolved, _front(record) + 1, owned),
        jnp.max(iterate.frozen_jumps),
        corrected.counts.guarded,
        corrected.counts.damped,
    ]
    local = jnp.stack([value.astype(end_updates.dtype) for value in local])
    update, minus_front, frozen_jump, *counts = max_over_ranks(line.comm, local)
    guarded, damped = (count.astype(record.n_guarded.dtype) for count in counts)
    front = (-minus_front).astype(record.fronts.dtype)
    k = record.n_sweeps + 1
    return record._replace(
        n_sweeps=k,
        jumps=record.jumps.at[k].set(jnp.where(front == owned.n_slices, frozen_jump, jnp.nan)),
        updates=record.updates.at[k].set(update),
        fronts=record.fronts.at[k].set(front),
        n_guarded=jnp.maximum(record.n_guarded, guarded),
        n_damped=jnp.maximum(record.n_damped, damped),
    )


def _judge_jumps(line, iterate, fine_ends, stopping) -> _Iterate:
    """Measure the jumps of an iterate; all ranks agree on the front and on whether it is sane."""
    record, owned = iterate.record, line.owned
    front = _front(record)
    jumps = slice_distance(fine_ends, iterate.states.ends)
    failed = ~slices_finite(fine_ends)
    unsolved = stopping.unsolved_by_jump(jumps) | failed
    local = [
        jnp.max(jumps),
        -_first_unsolved(unsolved, front, owned),
        -_first_unsolved(failed, front, owned),
    ]
    local = jnp.stack([value.astype(jumps.dtype) for value in local])
    jump, *minus = max_over_ranks(line.comm, local)
    new_front, first_failed = ((-index).astype(record.fronts.dtype) for index in minus)
    k, index = record.n_sweeps, jnp.asarray(owned.indices)
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
        bad_entries=_first_bad_entries(fine_ends),
    )


def _first_unsolved(unsolved, front, owned: OwnedSlices):
    """This rank's first unsolved slice from the front on; `n_slices` if it has none."""
    indices = jnp.asarray(owned.indices)
    return jnp.min(jnp.where(unsolved & (indices >= front), indices, owned.n_slices))


def _front(record: SweepRecord):
    return record.fronts[record.n_sweeps]


def _confirm(line, iterate, fine_ends) -> _Iterate:
    """Judge slices that were frozen by their updates by fine solves from their frozen starts."""
    record, states = iterate.record, iterate.states
    failed = _first_unsolved(~slices_finite(fine_ends), 0, line.owned)
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
    return iterate._replace(record=record, bad_entries=_first_bad_entries(fine_ends))


def _first_bad_entries(fine_ends: Block) -> Int[Array, " owned"]:
    """The first entry of every slice's end that is not finite; -1 if none or all are not."""
    bad = ~jnp.isfinite(fine_ends.reshape(len(fine_ends), -1))
    return jnp.where(jnp.all(bad, axis=1) | ~jnp.any(bad, axis=1), -1, jnp.argmax(bad, axis=1))


def _locate_failure(comm: TimeComm, record: SweepRecord, bad_entries, owned) -> SweepRecord:
    """The record with the entry that failed in the broken slice. Collective where there is one."""

    def locate():
        here = jnp.asarray(owned.indices) == record.broken
        entry = jnp.max(jnp.where(here, bad_entries, -1)).astype(record.broken_entry.dtype)
        return max_over_ranks(comm, entry)

    entry = cond(record.finite, lambda: record.broken_entry, locate)
    return record._replace(broken_entry=entry)


def _without_unsolvable(states: BlockStates, record: SweepRecord, owned: OwnedSlices):
    """The states up to the slice whose fine solve failed, NaN from its end on."""
    index = jnp.asarray(owned.indices).reshape(-1, *[1] * (states.ends.ndim - 1))
    return BlockStates(
        jnp.where(index > record.broken, jnp.nan, states.starts),
        jnp.where(index >= record.broken, jnp.nan, states.ends),
    )


def _empty_record(limit: int, dtype, n_slices: int) -> SweepRecord:
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
    )


def serial_record(comm: TimeComm, ends: Block, owned: OwnedSlices) -> SweepRecord:
    """A serial solve has no jumps and is solved, unless a slice fails. Collective."""
    record = _empty_record(0, ends.dtype, owned.n_slices)
    dtype = record.jumps.dtype
    first_failed = _first_unsolved(~slices_finite(ends), 0, owned).astype(dtype)
    broken = (-max_over_ranks(comm, -first_failed)).astype(record.broken.dtype)
    record = record._replace(
        jumps=jnp.zeros_like(record.jumps),
        fronts=broken[None].astype(record.fronts.dtype),
        finite=broken == owned.n_slices,
        broken=broken,
    )
    return _locate_failure(comm, record, _first_bad_entries(ends), owned)
