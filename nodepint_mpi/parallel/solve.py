"""The forward direction: interface states by sweeps, or by a walk where there is nothing to sweep.

U[n+1] <- F(U_old[n]) + C(U[n]) - C(U_old[n])
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.scopes import FINE_FORWARD, SWEEP, scope
from nodepint_mpi.core.sweeps import (
    BlockStates,
    propagate_block,
    propagate_unsolved,
    slice_distance,
)
from nodepint_mpi.core.types import State
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, cond, count, counting, note, unsolved, work
from nodepint_mpi.parallel.exchange import max_over_ranks
from nodepint_mpi.parallel.iterate import (
    AbstractDirection,
    OnIterate,
    TimeSolver,
    Verdict,
    iterate,
)
from nodepint_mpi.parallel.judge import (
    Iterate,
    SweepRecord,
    confirm_frozen,
    empty_record,
    front_of,
    judge_jumps,
    judge_updates,
    locate_failure,
    serial_record,
    with_samples,
    without_unsolvable,
)
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import ENDS, Carry, Memory, no_carry
from nodepint_mpi.parallel.methods.serial import walk
from nodepint_mpi.parallel.pace import best_iterate, first_pace, judge_pace


class Interface(NamedTuple):
    """This rank's block of interface states, the record of the solve, and what its method learned.

    `memory` is what the method may use in the adjoint. `seen` is what `on_iterate` has gathered.
    `saves` are the states inside the owned slices, where the solve has come by them.
    """

    states: BlockStates
    record: SweepRecord
    memory: Memory
    seen: object = None
    saves: Inexact[Array, "owned times *state"] | None = None


def solve_interface(
    line: Line,
    solver: TimeSolver,
    initial: State,
    carry: Carry | None = None,
    on_iterate: OnIterate | None = None,
) -> Interface:
    """Solve for the states at all slice boundaries at once.

    Collective over the line, inside jit; every rank must pass equal parameters and options.

    After k sweeps the first k slices equal the serial fine solution, and are not propagated any
    more. A slice is frozen only if its fine solve succeeded. One that fails from a solved start
    ends the iteration: `record.finite` is false, `record.broken` is its index, and the states from
    its end on are NaN, since no number there would be right. A failure elsewhere is stepped around.
    A method whose sweeps do not work hands over to its fallback (see `parallel.pace`).

    Args:
        line: Ranks along time, and the parameters of the vector field.
        solver: Propagators, method, when slices count as solved.
        initial: State at the first edge, (*state). Read on the first rank only.
        carry: What an earlier solve left, or a guess, on all ranks or none; without it the
            method's own iteration 0.
        on_iterate: Called with every iterate; see `parallel.iterate`. It has seen None before
            iteration 0.
    """
    n_samples = initial.shape[: solver.n_batch_axes]
    if not solver.method.iterates:
        states, result = walk(line, solver.fine, initial)
        record = with_samples(serial_record(line.comm, result.end, line.owned), n_samples)
        return Interface(states, record, None, saves=result.saves)
    forward = Forward(line, solver, initial)
    with scope(SWEEP):
        with counting() as ledger:
            first = forward.first(no_carry() if carry is None else carry)
        count(ledger.tally)
        first = first._replace(record=with_samples(first.record, n_samples))
        seen = None if on_iterate is None else on_iterate(None, first, ledger.tally)
        last, seen = iterate(forward, first, on_iterate, seen)
        if solver.stopping.freezes_by_update:
            last = forward.confirm(last)
        record = locate_failure(line.comm, last.record, last.bad_entries, line.owned)
        states = without_unsolvable(last.states, record, line.owned)
    return Interface(states, record, last.memory, seen)


class Forward(AbstractDirection[Iterate]):
    """From left to right: F on every unsolved slice, jumps, the sweep of the method."""

    def __init__(self, line: Line, solver: TimeSolver, initial: State):
        self.line, self.solver, self.initial = line, solver, initial
        self.fallback = solver.method.fallback()

    def first(self, carry: Carry) -> Iterate:
        """Iteration 0 of the method."""
        line, owned = self.line, self.line.owned
        begun = self.solver.method.init(line, self.initial, carry)
        limit = self.solver.stopping.sweep_limit(owned.n_slices)
        record = empty_record(limit, self.initial.dtype, owned.n_slices)
        record = record._replace(n_guarded=max_over_ranks(line.comm, begun.counts.guarded))
        frozen = jnp.zeros(owned.n_owned, record.jumps.dtype)
        pace = first_pace(begun.states.ends, has_fallback=self.fallback is not None)
        none_bad = jnp.full(owned.n_owned, -1)
        return Iterate(*begun, record, frozen, none_bad, pace)

    def is_going(self, iterate):
        record, owned = iterate.record, self.line.owned
        limit = self.solver.stopping.sweep_limit(owned.n_slices)
        return record.finite & (front_of(record) < owned.n_slices) & (record.n_sweeps < limit)

    def propagate(self, iterate):
        line, at_once = self.line, self.solver.slices_at_once
        front = front_of(iterate.record)
        note(SWEEP, swept=line.owned.n_owned)
        with work(FINE_FORWARD, Tally(fine=unsolved(front, line.owned, at_once=at_once))):
            return propagate_unsolved(
                self.solver.fine, line.params, iterate.states, front, line.owned, at_once=at_once
            )

    def judge(self, iterate, propagated):
        iterate = judge_jumps(self.line, iterate, propagated, self.solver.stopping)
        record = iterate.record
        jump = record.jumps[record.n_sweeps]
        pace, taken_over = judge_pace(iterate.pace, jump, iterate.states.ends, propagated)
        unsolved = record.finite & (front_of(record) < self.line.owned.n_slices)
        return iterate._replace(pace=pace), Verdict(unsolved, pace.falls_back, taken_over)

    def correct(self, iterate, propagated):
        swept = self.solver.method.sweep(
            self.line, self.initial, iterate.swept, propagated, front_of(iterate.record),
            iterate.pace.slow,
        )  # fmt: skip
        record = judge_updates(self.line, iterate, swept, propagated, self.solver.stopping)
        return iterate._replace(**swept._asdict(), record=record)

    def fall_back(self, iterate, propagated, verdict):
        """From the best iterate if the fallback has just taken over."""
        line, fallback = self.line, self.fallback
        assert fallback is not None  # else nothing falls back
        front, ends = front_of(iterate.record), iterate.states.ends
        best = best_iterate(iterate.pace, ends, propagated, front, line.owned)
        ends = jnp.where(verdict.taken_over, best[0], ends)
        fine_ends = jnp.where(verdict.taken_over, best[1], propagated)
        guess = fallback.init(line, self.initial, Carry({ENDS: ends}, {}))
        iterate = iterate._replace(states=guess.states)
        swept = fallback.sweep(line, self.initial, guess, fine_ends, front)
        record = judge_updates(line, iterate, swept, fine_ends, self.solver.stopping)
        record = record._replace(n_fallbacks=record.n_fallbacks + 1)
        return iterate._replace(states=swept.states, counts=swept.counts, record=record)

    def keep(self, iterate, propagated):
        del propagated
        return iterate

    def confirm(self, last: Iterate) -> Iterate:
        """Slices that were frozen by their updates, judged by fine solves. Collective."""
        line, solver, record = self.line, self.solver, last.record

        def confirmed() -> Iterate:
            with work(FINE_FORWARD, Tally(fine=line.owned.n_owned)):
                ends = propagate_block(
                    solver.fine, line.params, last.states.starts, line.owned,
                    at_once=solver.slices_at_once,
                ).end  # fmt: skip
            return confirm_frozen(line, last, ends)

        is_solved = record.finite & (front_of(record) == line.owned.n_slices)
        return cond(is_solved, confirmed, lambda: last, usual=True)


def largest_jump(comm: TimeComm, result: SliceResult, states: BlockStates) -> Float[Array, ""]:
    """Largest jump |F(U[n]) - U[n+1]| over all slices. Collective over `comm`, inside jit."""
    return max_over_ranks(comm, jnp.max(slice_distance(result.end, states.ends)))
