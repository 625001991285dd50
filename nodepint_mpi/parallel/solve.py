"""The time-parallel iteration: fine solves, jumps, correction sweep, agreement, stop.

    U[n+1] <- F(U_old[n]) + G(U[n]) - G(U_old[n])

Everything here runs inside one jitted function on every rank of the line. Loop conditions are
made from numbers that all ranks agreed on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nodepint_mpi.core.methods import AbstractMethod, Parareal, Picard, Serial
from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.stopping import AbstractStopping
from nodepint_mpi.core.sweeps import (
    BlockStates,
    chain_block,
    coarse_block,
    coarse_chain_block,
    correct_block,
    propagate_block,
    replace_ends,
    slice_distance,
    slices_finite,
)
from nodepint_mpi.core.types import Block, Params, State
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.exchange import (
    bcast_from,
    max_over_ranks,
    recv_left,
    send_right,
    shift_right,
)


class SweepRecord(NamedTuple):
    """What happened in a solve; equal on all ranks. Row k belongs to the iterate U^k.

    `jumps[k]` is the largest jump of U^k (NaN where it was not evaluated), `updates[k]` the
    largest change from U^(k-1), `fronts[k]` the number of frozen slices. `n_guarded` is the largest
    number of slices on one rank where a sweep stepped around a non-finite value.
    """

    n_sweeps: Int[Array, ""]
    jumps: Float[Array, " iterates"]
    updates: Float[Array, " iterates"]
    fronts: Int[Array, " iterates"]
    n_guarded: Int[Array, ""]
    finite: Bool[Array, ""]


class Interface(NamedTuple):
    """This rank's block of interface states, and the record of the solve."""

    states: BlockStates
    record: SweepRecord


class _Iterate(NamedTuple):
    states: BlockStates
    coarse_ends: Block
    record: SweepRecord


def solve_interface(
    comm: TimeComm,
    params: Params,
    initial: State,
    guess: Block | None,
    *,
    fine: Propagator,
    method: AbstractMethod,
    stopping: AbstractStopping,
    owned: OwnedSlices,
) -> Interface:
    """Solve for the states at all slice boundaries at once.

    Collective over `comm`, inside jit; every rank must pass equal `params` and options.

    After k sweeps the first k slices equal the serial fine solution. A slice whose start is
    exact and whose fine solve is not finite ends the iteration with `record.finite` false; a
    non-finite value elsewhere is stepped around, so the returned states are always finite.

    Args:
        comm: Line of ranks along time.
        params: Parameters of the vector field, replicated.
        initial: State at the first edge, (*state). Read on the first rank only.
        guess: Ends of the owned slices to start from, (owned, *state), on all ranks or none;
            without it the coarse solution (Parareal) or the initial state (Picard).
        fine: The fine propagator F.
        method: Serial, Picard or Parareal.
        stopping: When slices count as solved. Ignored by Serial.
        owned: The slices of this rank.

    Reference:
        Lions, Maday, Turinici (2001), C. R. Acad. Sci. 332, 661-668.
    """
    if isinstance(method, Serial):
        incoming = recv_left(comm, initial)
        starts, result = chain_block(fine, params, incoming, owned)
        send_right(comm, result.end[-1])
        return Interface(BlockStates(starts, result.end), serial_record(comm, result.end, owned))
    first = _first_iterate(comm, params, initial, guess, method, stopping, owned)

    def sweep(iterate: _Iterate) -> _Iterate:
        fine_ends = propagate_block(fine, params, iterate.states.starts, owned).end
        record = _judge_jumps(comm, iterate, fine_ends, stopping, owned)
        return jax.lax.cond(
            record.finite & (_front(record) < owned.n_slices),
            lambda: _correct(
                comm, params, initial, iterate, fine_ends, record, method, stopping, owned
            ),
            lambda: iterate._replace(record=record),
        )

    def unsolved(iterate: _Iterate):
        record = iterate.record
        limit = stopping.sweep_limit(owned.n_slices)
        return record.finite & (_front(record) < owned.n_slices) & (record.n_sweeps < limit)

    last = jax.lax.while_loop(unsolved, sweep, first)
    return Interface(last.states, last.record)


def largest_jump(comm: TimeComm, result: SliceResult, states: BlockStates) -> Float[Array, ""]:
    """Largest jump |F(U[n]) - U[n+1]| over all slices. Collective over `comm`, inside jit."""
    return max_over_ranks(comm, jnp.max(slice_distance(result.end, states.ends)))


def _first_iterate(comm, params, initial, guess, method, stopping, owned) -> _Iterate:
    """Iteration 0: a given guess, the coarse solution, or the initial state everywhere."""
    guarded = jnp.array(0)
    if guess is not None:
        starts = jnp.concatenate([shift_right(comm, guess[-1], initial)[None], guess[:-1]])
        states = BlockStates(starts, guess)
        coarse_ends = guess
        if isinstance(method, Parareal):
            coarse_ends = coarse_block(method.coarse, params, starts, owned)
    elif isinstance(method, Parareal):
        incoming = recv_left(comm, initial)
        states, guarded = coarse_chain_block(method.coarse, params, incoming, owned)
        send_right(comm, states.ends[-1])
        coarse_ends = states.ends
    else:
        constant = bcast_from(comm, initial, 0)
        block = jnp.broadcast_to(constant, (owned.n_owned, *constant.shape))
        states, coarse_ends = BlockStates(block, block), block
    n_guarded = max_over_ranks(comm, guarded)
    record = _empty_record(stopping.sweep_limit(owned.n_slices), initial.dtype)
    return _Iterate(states, coarse_ends, record._replace(n_guarded=n_guarded))


def _correct(
    comm, params, initial, iterate, fine_ends, record, method, stopping, owned
) -> _Iterate:
    """One correction sweep from left to right, then the agreement on its effect."""
    old, front = iterate.states, _front(record)
    if isinstance(method, Picard):
        ends, guarded = replace_ends(fine_ends, old.ends, front, owned)
        incoming = shift_right(comm, ends[-1], initial)
        states = BlockStates(jnp.concatenate([incoming[None], ends[:-1]]), ends)
        coarse_ends = iterate.coarse_ends
    else:
        states, coarse_ends, guarded = correct_block(
            method.coarse,
            params,
            recv_left(comm, initial),
            fine_ends=fine_ends,
            old=old,
            coarse_ends=iterate.coarse_ends,
            front=front,
            owned=owned,
        )
        send_right(comm, states.ends[-1])
    start_updates = slice_distance(states.starts, old.starts)
    end_updates = slice_distance(states.ends, old.ends)
    unsolved = stopping.unsolved_by_update(start_updates, end_updates)
    local = jnp.stack(
        [
            jnp.max(end_updates),
            -_first_unsolved(unsolved, front + 1, owned).astype(end_updates.dtype),
            guarded.astype(end_updates.dtype),
        ]
    )
    update, minus_front, n_guarded = max_over_ranks(comm, local)
    k = record.n_sweeps + 1
    record = record._replace(
        n_sweeps=k,
        updates=record.updates.at[k].set(update),
        fronts=record.fronts.at[k].set((-minus_front).astype(record.fronts.dtype)),
        n_guarded=jnp.maximum(record.n_guarded, n_guarded.astype(record.n_guarded.dtype)),
    )
    return _Iterate(states, coarse_ends, record)


def _judge_jumps(comm, iterate, fine_ends, stopping, owned) -> SweepRecord:
    """Measure the jumps of an iterate; all ranks agree on the front and on whether it is sane."""
    record = iterate.record
    front = _front(record)
    jumps = slice_distance(fine_ends, iterate.states.ends)
    at_front = jnp.asarray(owned.indices) == front
    broken = jnp.any(at_front & ~slices_finite(fine_ends))
    unsolved = stopping.unsolved_by_jump(jumps)
    local = jnp.stack(
        [
            jnp.max(jumps),
            -_first_unsolved(unsolved, front, owned).astype(jumps.dtype),
            broken.astype(jumps.dtype),
        ]
    )
    jump, minus_front, broken = max_over_ranks(comm, local)
    k = record.n_sweeps
    return record._replace(
        jumps=record.jumps.at[k].set(jump),
        fronts=record.fronts.at[k].set((-minus_front).astype(record.fronts.dtype)),
        finite=broken == 0,
    )


def _first_unsolved(unsolved, front, owned: OwnedSlices):
    """This rank's first unsolved slice from the front on; `n_slices` if it has none."""
    indices = jnp.asarray(owned.indices)
    return jnp.min(jnp.where(unsolved & (indices >= front), indices, owned.n_slices))


def _front(record: SweepRecord):
    return record.fronts[record.n_sweeps]


def _empty_record(limit: int, dtype) -> SweepRecord:
    real = jnp.finfo(dtype).dtype
    return SweepRecord(
        n_sweeps=jnp.array(0),
        jumps=jnp.full(limit + 1, jnp.nan, real),
        updates=jnp.full(limit + 1, jnp.nan, real),
        fronts=jnp.zeros(limit + 1, int),
        n_guarded=jnp.array(0),
        finite=jnp.array(True),
    )


def serial_record(comm, ends, owned) -> SweepRecord:
    """A serial solve has no jumps and is solved, unless its states are not finite."""
    broken = max_over_ranks(comm, jnp.any(~slices_finite(ends)).astype(jnp.float32))
    record = _empty_record(0, ends.dtype)
    return record._replace(
        jumps=jnp.zeros_like(record.jumps),
        fronts=jnp.full_like(record.fronts, owned.n_slices),
        finite=broken == 0,
    )
