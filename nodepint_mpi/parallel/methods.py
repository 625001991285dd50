"""The sweeps on offer. What the correction C_n is makes the method.

    U[n+1] <- F(U_old[n]) + C(U[n]) - C(U_old[n])

A method knows its iteration 0, its correction sweep and the transpose of that sweep. What it
learns on the way, such as a basis with its tangents, is its memory: an opaque tree that goes from
sweep to sweep, on to the adjoint, and may start the next solve.
"""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.scopes import COARSE
from nodepint_mpi.core.sweeps import (
    BlockStates,
    coarse_block,
    coarse_chain_block,
    correct_block,
    count_unsolved,
    replace_ends,
)
from nodepint_mpi.core.transposed import (
    BlockCotangents,
    coarse_pull_back_chain,
    correct_cotangents,
)
from nodepint_mpi.core.types import Block, Params, State
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, work
from nodepint_mpi.parallel.exchange import (
    bcast_from,
    in_order,
    recv_left,
    recv_right,
    send_left,
    send_right,
    shift_left,
    shift_right,
)

Memory = Any
"""What a method keeps between sweeps: a tree of arrays, or None."""


class Line(NamedTuple):
    """A line of ranks with what is the same in every sweep of a solve."""

    comm: TimeComm
    owned: OwnedSlices
    params: Params


class Counts(NamedTuple):
    """What a sweep did on this rank.

    `guarded` slices stepped around a non-finite value, `damped` ones had their correction cut
    (known to the first rank).
    """

    guarded: Int[Array, ""]
    damped: Int[Array, ""]


class Corrected(NamedTuple):
    """A block's interface states after a sweep."""

    states: BlockStates
    memory: Memory
    counts: Counts


class AbstractMethod(eqx.Module):
    """How information travels between slices."""

    def kept(self, memory: Memory) -> tuple[dict[str, Any], dict[str, Block]]:
        """What of the memory outlives a solve: what is equal on all ranks, and rows by slice.

        Local. Rows are (owned, *batch, ...). Empty for a method that starts every solve anew.
        """
        del memory
        return {}, {}

    def blank(self, state: jax.ShapeDtypeStruct) -> dict[str, Array]:
        """Arrays shaped like the first part of `kept`, for a state of that shape. Local."""
        del state
        return {}

    def recalled(self, replicated: dict[str, Any], rows: dict[str, Block]) -> Memory | None:
        """The memory from its parts; None if they are empty. Local."""
        del replicated, rows
        return None


class Serial(AbstractMethod):
    """No iteration: slice after slice, rank after rank. The baseline, by the same code."""


class AbstractSweeps(AbstractMethod):
    """A method that iterates. Its sweeps are collective over the line, inside jit."""

    @abc.abstractmethod
    def start(
        self, line: Line, initial: State, guess: Block | None, memory: Memory | None
    ) -> Corrected:
        """Iteration 0: from `guess` (ends of the owned slices) if there is one.

        `initial` is read on the first rank only. `memory` is what an earlier solve ended with.
        """

    @abc.abstractmethod
    def correct(
        self,
        line: Line,
        initial: State,
        old: BlockStates,
        fine_ends: Block,
        front: Int[Array, ""],
        memory: Memory,
        slow: Bool[Array, ""] | bool = False,
    ) -> Corrected:
        """One sweep. Slices left of `front` stay, the slice at the front ends at F exactly.

        `slow` says that the last sweep hardly brought the jumps down: what is kept of earlier
        iterates is not good enough any more.
        """

    @abc.abstractmethod
    def linearise(self, line: Line, starts: Block, memory: Memory | None) -> Any:
        """What all adjoint sweeps at these starts have in common."""

    @abc.abstractmethod
    def first_cotangents(
        self, line: Line, linear: Any, starts: Block, sources: SliceResult
    ) -> BlockCotangents:
        """Iteration 0 of the adjoint."""

    @abc.abstractmethod
    def correct_cotangents(
        self, line: Line, linear: Any, starts: Block, outs: Block, old: BlockCotangents
    ) -> BlockCotangents:
        """One transposed sweep; `outs` are the cotangents that the fine pull-back gave."""

    def resume(
        self, line: Line, initial: State, track: Block | None, memory: Memory | None
    ) -> Corrected:
        """Iteration 0 from what `track` gave for earlier parameters, or from nothing."""
        return self.start(line, initial, track, memory)

    def track(
        self, line: Line, initial: State, states: BlockStates, fine_ends: Block, memory: Memory
    ) -> tuple[Block, Memory]:
        """What to keep of a sweep for the next parameters: here the ends that follow from it."""
        nothing_solved = jnp.array(-1)
        corrected = self.correct(line, initial, states, fine_ends, nothing_solved, memory)
        return corrected.states.ends, corrected.memory

    def resume_cotangents(
        self, line: Line, linear: Any, starts: Block, sources: SliceResult, track: Block | None
    ) -> BlockCotangents:
        """Iteration 0 of the adjoint from what `track_cotangents` gave, or from nothing."""
        if track is None:
            return self.first_cotangents(line, linear, starts, sources)
        return with_lefts(line, track)

    def track_cotangents(
        self,
        line: Line,
        linear: Any,
        starts: Block,
        outs: Block,
        old: BlockCotangents,
        track: Block | None,
    ) -> Block:
        """What to keep of an adjoint sweep; `old` and `track` are what it began with."""
        del track
        return self.correct_cotangents(line, linear, starts, outs, old).lefts

    def blank_track(self, shape: tuple[int, ...], dtype: Any) -> Array | None:
        """A track that means nothing is known, if there is one. Local."""
        del shape, dtype
        return None

    def fallback(self) -> "AbstractSweeps | None":
        """What takes over when jumps do not fall any more; None for methods that always do."""
        return None


class Picard(AbstractSweeps):
    """C_n = 0: every sweep moves information one slice on. No coarse propagator."""

    def start(self, line, initial, guess, memory):
        del memory
        states = (
            constant_states(line, initial) if guess is None else with_ends(line, initial, guess)
        )
        return Corrected(states, None, no_counts())

    def correct(self, line, initial, old, fine_ends, front, memory, slow=False):
        del slow
        ends, guarded = replace_ends(fine_ends, old.ends, front, line.owned)
        return Corrected(
            with_ends(line, initial, ends), memory, no_counts()._replace(guarded=guarded)
        )

    def linearise(self, line, starts, memory):
        return None

    def first_cotangents(self, line, linear, starts, sources):
        return BlockCotangents(jnp.zeros_like(starts), jnp.zeros_like(starts))

    def correct_cotangents(self, line, linear, starts, outs, old):
        return with_lefts(line, outs)


class Parareal(AbstractSweeps):
    """C_n = G_n, a classical coarse propagator.

    The coarse propagator may use fewer or larger steps, lower order, or another field.

    Reference:
        Lions, Maday, Turinici (2001), C. R. Acad. Sci. 332, 661-668.
    """

    coarse: Propagator

    def start(self, line, initial, guess, memory):
        del memory
        if guess is not None:
            states = with_ends(line, initial, guess)
            with work(COARSE, Tally(coarse=line.owned.n_owned)):
                coarse_ends = coarse_block(self.coarse, line.params, states.starts, line.owned)
            return Corrected(states, coarse_ends, no_counts())
        states, guarded = coarse_states(line, self.coarse, initial)
        return Corrected(states, states.ends, no_counts()._replace(guarded=guarded))

    def correct(self, line, initial, old, fine_ends, front, memory, slow=False):
        del slow
        incoming = recv_left(line.comm, initial)
        with work(COARSE, Tally(coarse=count_unsolved(front + 1, line.owned, at_once=1))):
            states, coarse_ends, guarded = correct_block(
                self.coarse,
                line.params,
                incoming,
                fine_ends=fine_ends,
                old=old,
                coarse_ends=memory,
                front=front,
                owned=line.owned,
            )
        send_right(line.comm, states.ends[-1])
        return Corrected(states, coarse_ends, no_counts()._replace(guarded=guarded))

    def linearise(self, line, starts, memory):
        return None

    def first_cotangents(self, line, linear, starts, sources):
        return coarse_cotangents(line, self.coarse, starts, sources)

    def correct_cotangents(self, line, linear, starts, outs, old):
        incoming = recv_right(line.comm, jnp.zeros_like(outs[-1]))
        with work(COARSE, Tally(coarse_pulled=line.owned.n_owned)):
            cotangents = correct_cotangents(
                self.coarse,
                line.params,
                starts,
                outs=outs,
                old=old,
                incoming=incoming,
                owned=line.owned,
            )
        send_left(line.comm, cotangents.lefts[0])
        return cotangents

    def resume(self, line, initial, track, memory):
        """From the coarse solution with the defects of F against G, which change little."""
        del memory
        incoming = recv_left(line.comm, initial)
        with work(COARSE, Tally(coarse=line.owned.n_owned)):
            states, coarse_ends, guarded = coarse_chain_block(
                self.coarse, line.params, incoming, line.owned, track
            )
        send_right(line.comm, states.ends[-1])
        states = states._replace(starts=in_order(line.comm, states.starts))
        return Corrected(states, coarse_ends, no_counts()._replace(guarded=guarded))

    def track(self, line, initial, states, fine_ends, memory):
        return _finite_or_zero(fine_ends - memory), memory

    def resume_cotangents(self, line, linear, starts, sources, track):
        cotangents = coarse_cotangents(line, self.coarse, starts, sources, track)
        return cotangents._replace(rights=in_order(line.comm, cotangents.rights))

    def track_cotangents(self, line, linear, starts, outs, old, track):
        known = jnp.zeros_like(outs) if track is None else track
        return _finite_or_zero(known + outs - old.lefts)

    def blank_track(self, shape, dtype):
        return jnp.zeros(shape, dtype)


def _finite_or_zero(values: Array) -> Array:
    return jnp.where(jnp.isfinite(values), values, 0.0)


def no_counts() -> Counts:
    """A sweep in which nothing had to be counted. Local."""
    return Counts(jnp.array(0), jnp.array(0))


def constant_states(line: Line, initial: State) -> BlockStates:
    """The initial state everywhere. Collective."""
    constant = bcast_from(line.comm, initial, 0)
    block = jnp.broadcast_to(constant, (line.owned.n_owned, *constant.shape))
    return BlockStates(block, block)


def coarse_states(
    line: Line, coarse: Propagator, initial: State
) -> tuple[BlockStates, Int[Array, ""]]:
    """The coarse solution, and on how many slices it was not finite. Collective."""
    incoming = recv_left(line.comm, initial)
    with work(COARSE, Tally(coarse=line.owned.n_owned)):
        states, _, guarded = coarse_chain_block(coarse, line.params, incoming, line.owned)
    send_right(line.comm, states.ends[-1])
    return states, guarded


def with_ends(line: Line, initial: State, ends: Block) -> BlockStates:
    """A block's ends together with its starts; the first comes from the left. Collective."""
    incoming = shift_right(line.comm, ends[-1], initial)
    return BlockStates(jnp.concatenate([incoming[None], ends[:-1]]), ends)


def with_lefts(line: Line, lefts: Block) -> BlockCotangents:
    """Cotangents at the left edges together with those at the right ones. Collective."""
    incoming = shift_left(line.comm, lefts[0], jnp.zeros_like(lefts[-1]))
    return BlockCotangents(lefts, jnp.concatenate([lefts[1:], incoming[None]]))


def coarse_cotangents(
    line: Line,
    coarse: Propagator,
    starts: Block,
    sources: SliceResult,
    defects: Block | None = None,
) -> BlockCotangents:
    """The coarse adjoint solution. Collective."""
    incoming = recv_right(line.comm, jnp.zeros_like(starts[-1]))
    with work(COARSE, Tally(coarse_pulled=line.owned.n_owned)):
        cotangents = coarse_pull_back_chain(
            coarse, line.params, starts, sources, incoming, line.owned, defects
        )
    send_left(line.comm, cotangents.lefts[0])
    return cotangents
