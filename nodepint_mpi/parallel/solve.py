"""The time-parallel iteration: fine solves, jumps, correction sweep, agreement, stop.

    U[n+1] <- F(U_old[n]) + C(U[n]) - C(U_old[n])

Everything here runs inside one jitted function on every rank of the line. Loop conditions are
made from numbers that all ranks agreed on.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

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
from nodepint_mpi.parallel.counters import Tally, cond, while_loop, work
from nodepint_mpi.parallel.exchange import max_over_ranks, recv_left, send_right
from nodepint_mpi.parallel.judge import (
    Iterate,
    SweepRecord,
    confirm_frozen,
    empty_record,
    first_bad_entries,
    first_unsolved,
    front_of,
    judge_jumps,
    judge_updates,
    locate_failure,
    with_samples,
    without_unsolvable,
)
from nodepint_mpi.parallel.methods import AbstractMethod, AbstractSweeps, Line, Memory, Serial
from nodepint_mpi.parallel.pace import best_iterate, first_pace, judge_pace


class Interface(NamedTuple):
    """This rank's block of interface states, the record of the solve, and what its method learned.

    `memory` is what the method may use in the adjoint and in the next solve.
    """

    states: BlockStates
    record: SweepRecord
    memory: Memory


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
    n_batch_axes: int = 0,
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
        n_batch_axes: Leading axes of a state that count samples, whose sweeps are recorded.
    """
    n_samples = initial.shape[:n_batch_axes]
    if isinstance(method, Serial):
        incoming = recv_left(comm, initial)
        with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
            starts, result = chain_block(fine, params, incoming, owned)
        send_right(comm, result.end[-1])
        record = with_samples(serial_record(comm, result.end, owned), n_samples)
        return Interface(BlockStates(starts, result.end), record, None)
    assert isinstance(method, AbstractSweeps)  # there is nothing else
    line = Line(comm, owned, params)
    fallback = method.fallback()
    first = _first_iterate(line, initial, guess, memory, method, stopping)
    first = first._replace(record=with_samples(first.record, n_samples))

    def sweep(iterate: Iterate) -> Iterate:
        front = front_of(iterate.record)
        n_fine = count_unsolved(front, owned, at_once=slices_at_once)
        with work(FINE_FORWARD, Tally(fine=n_fine)):
            fine_ends = propagate_unsolved(
                fine, params, iterate.states, front, owned, at_once=slices_at_once
            )
        iterate = judge_jumps(line, iterate, fine_ends, stopping)
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

        unsolved = record.finite & (front_of(record) < owned.n_slices)
        return cond(unsolved, corrected, lambda: iterate)

    def unsolved(iterate: Iterate):
        record = iterate.record
        limit = stopping.sweep_limit(owned.n_slices)
        return record.finite & (front_of(record) < owned.n_slices) & (record.n_sweeps < limit)

    last = while_loop(unsolved, sweep, first)
    if stopping.freezes_by_update:

        def confirm():
            with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
                ends = propagate_block(
                    fine, params, last.states.starts, owned, at_once=slices_at_once
                ).end
            return confirm_frozen(line, last, ends)

        last = cond(
            last.record.finite & (front_of(last.record) == owned.n_slices), confirm, lambda: last
        )
    record = locate_failure(comm, last.record, last.bad_entries, owned)
    states = without_unsolvable(last.states, record, owned)
    return Interface(states, record, last.memory)


def largest_jump(comm: TimeComm, result: SliceResult, states: BlockStates) -> Float[Array, ""]:
    """Largest jump |F(U[n]) - U[n+1]| over all slices. Collective over `comm`, inside jit."""
    return max_over_ranks(comm, jnp.max(slice_distance(result.end, states.ends)))


def _first_iterate(line, initial, guess, memory, method, stopping) -> Iterate:
    """Iteration 0 of the method."""
    started = method.start(line, initial, guess, memory)
    n_slices = line.owned.n_slices
    record = empty_record(stopping.sweep_limit(n_slices), initial.dtype, n_slices)
    record = record._replace(n_guarded=max_over_ranks(line.comm, started.counts.guarded))
    frozen = jnp.zeros(line.owned.n_owned, record.jumps.dtype)
    none = jnp.full(line.owned.n_owned, -1)
    pace = first_pace(started.states.ends, has_fallback=method.fallback() is not None)
    return Iterate(started.states, started.memory, record, frozen, none, pace)


def _correct(line, initial, iterate, fine_ends, method, stopping) -> Iterate:
    """One sweep of the method, then the agreement on its effect."""
    corrected = method.correct(
        line, initial, iterate.states, fine_ends, front_of(iterate.record), iterate.memory,
        iterate.pace.slow,
    )  # fmt: skip
    record = judge_updates(line, iterate, corrected, fine_ends, stopping)
    return iterate._replace(states=corrected.states, memory=corrected.memory, record=record)


def _fall_back(line, initial, iterate, fine_ends, fallback, stopping, taken_over) -> Iterate:
    """One sweep of the fallback, from the best iterate if it has just taken over."""
    front, ends = front_of(iterate.record), iterate.states.ends
    best = best_iterate(iterate.pace, ends, fine_ends, front, line.owned)
    ends = jnp.where(taken_over, best[0], ends)
    fine_ends = jnp.where(taken_over, best[1], fine_ends)
    guess = fallback.start(line, initial, ends, None)
    iterate = iterate._replace(states=guess.states)
    corrected = fallback.correct(line, initial, guess.states, fine_ends, front, guess.memory)
    record = judge_updates(line, iterate, corrected, fine_ends, stopping)
    record = record._replace(n_fallbacks=record.n_fallbacks + 1)
    return iterate._replace(states=corrected.states, record=record)


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
