"""What a method is: how information travels between slices.

    U[n+1] <- F(U_old[n]) + C(U[n]) - C(U_old[n])

The correction C_n makes the method. It knows its iteration 0, its sweep, and the transposes of
both. What it learns on the way, such as a basis with its tangents, is its memory: a tree that goes
from sweep to sweep and on to the adjoint. What it leaves for the next solve is a `Carry`.
"""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from nodepint_mpi.core.galerkin import AbstractReduction
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.scopes import COARSE
from nodepint_mpi.core.sweeps import BlockStates, coarse_chain_block
from nodepint_mpi.core.transposed import BlockCotangents, coarse_pull_back_chain
from nodepint_mpi.core.types import Block, State
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.counters import Tally, work
from nodepint_mpi.parallel.exchange import (
    bcast_from,
    recv_left,
    recv_right,
    send_left,
    send_right,
    shift_left,
    shift_right,
)
from nodepint_mpi.parallel.levels import Levels
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.shared_basis import SharedBasis

Memory = Any
"""What a method keeps between sweeps: a tree of arrays, or None."""

ENDS, LEFTS = "ends", "lefts"
"""Rows of a `Carry` that every method understands: a guess of the states at the ends of the slices,
and one of the cotangents at their left edges."""

BASIS, BASIS_SWEEPS = "basis", "basis_sweeps"
"""What methods with a basis carry, equal on all ranks: the basis, and sweeps done with it."""


class Carry(NamedTuple):
    """What a solve starts from and leaves for the next; a checkpoint holds it as it is.

    `rows` are arrays by slice, (owned, *batch, ...), of the owned slices: a guess (`ENDS`,
    `LEFTS`) or whatever the method leaves in its place. `replicated` is equal on all ranks.
    """

    rows: dict[str, Block]
    replicated: dict[str, Array]


def no_carry() -> Carry:
    """Nothing is known. Local."""
    return Carry({}, {})


class Counts(NamedTuple):
    """What a sweep did on this rank.

    `guarded` slices stepped around a non-finite value, `damped` ones had their correction cut
    (known to the first rank).
    """

    guarded: Int[Array, ""]
    damped: Int[Array, ""]


class Swept(NamedTuple):
    """A block's interface states after a sweep, and what the method has learned by then."""

    states: BlockStates
    memory: Memory
    counts: Counts


class Coswept(NamedTuple):
    """A block's cotangents after an adjoint sweep, and what all sweeps at its starts share."""

    cotangents: BlockCotangents
    linear: Any


class Parts(NamedTuple):
    """What a method may be made of; None where nothing is given.

    `tangents` is the propagator whose derivative is taken, `reduction` how the field becomes one
    of coordinates on a basis. `levels` is an option of `Parareal`, the rest are those of `Tangent`.
    """

    fine: Propagator
    coarse: Propagator | None = None
    tangents: Propagator | None = None
    basis: SharedBasis | None = None
    reduction: AbstractReduction | None = None
    complement: bool = False
    recycle: bool = True
    precision: str | None = None
    trust: float | None = 0.5
    levels: Levels | None = None


class AbstractMethod(eqx.Module):
    """How information travels between slices: seven operations, of which four have to be written.

    All but `carry_like` and `fallback` are collective over the line, inside jit. `iterates` says
    whether there is anything to sweep over: `Serial` walks. `shares_tangents` says whether ranks
    that have the same slices share its tangents; else they would all do the same.
    """

    iterates: ClassVar[bool] = True
    shares_tangents: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def of(cls, parts: Parts) -> "AbstractMethod":
        """Make the method from what a config or a call of `solve` gives. Local.

        Raises:
            ProblemError: with what is missing.
        """

    @abc.abstractmethod
    def init(self, line: Line, initial: State, carry: Carry) -> Swept:
        """Iteration 0: from the rows `ENDS` if there are any, from whatever else is carried.

        `initial` is read on the first rank only.
        """

    @abc.abstractmethod
    def sweep(
        self,
        line: Line,
        initial: State,
        swept: Swept,
        fine_ends: Block,
        front: Int[Array, ""],
        slow: Bool[Array, ""] | bool = False,
    ) -> Swept:
        """One sweep. Slices left of `front` stay, the slice at the front ends at F exactly.

        `slow` says that the last sweep hardly brought the jumps down: what is kept of earlier
        iterates is not good enough any more.
        """

    @abc.abstractmethod
    def adjoint_init(
        self, line: Line, starts: Block, memory: Memory, sources: SliceResult, carry: Carry
    ) -> Coswept:
        """Iteration 0 of the adjoint at these starts: from the rows `LEFTS` if there are any.

        `memory` is what the forward sweeps ended with, or None. `sources` are the cotangents of
        what the loss reads in the owned slices.
        """

    @abc.abstractmethod
    def adjoint_sweep(self, line: Line, starts: Block, coswept: Coswept, outs: Block) -> Coswept:
        """One transposed sweep; `outs` are the cotangents that the fine pull-back gave."""

    def carry(
        self,
        line: Line,
        initial: State,
        swept: Swept,
        fine_ends: Block,
        coswept: Coswept,
        outs: Block,
        known: Carry,
    ) -> Carry:
        """What to leave of a sweep each way for other parameters: what follows from both.

        `known` is what the sweeps began with. See `leave_swept`.
        """
        del known
        return leave_swept(self, line, initial, swept, fine_ends, coswept, outs)[0]

    def carry_like(self, n_owned: int, state: jax.ShapeDtypeStruct) -> Carry:
        """An empty carry for states (*batch, *sample) on `n_owned` slices. Local.

        Arrays that are equal on all ranks have the shapes of `carry`; rows are there only if they
        make a solve start from nothing, as zero defects do.

        Raises:
            ProblemError: if the method does not fit such a state.
        """
        del n_owned, state
        return no_carry()

    def fallback(self) -> "AbstractMethod | None":
        """What takes over when its sweeps do not work; None for a method that cannot fail so.

        Its adjoint sweeps must need nothing but the starts: they get None for `linear`.
        """
        return None


def leave_swept(
    method: AbstractMethod,
    line: Line,
    initial: State,
    swept: Swept,
    fine_ends: Block,
    coswept: Coswept,
    outs: Block,
) -> tuple[Carry, Memory]:
    """Ends and cotangents one more sweep each way leads to, and the memory after it. Collective."""
    nothing_solved = jnp.array(-1)
    after = method.sweep(line, initial, swept, fine_ends, nothing_solved)
    back = method.adjoint_sweep(line, swept.states.starts, coswept, outs)
    return Carry({ENDS: after.states.ends, LEFTS: back.cotangents.lefts}, {}), after.memory


def no_counts() -> Counts:
    """A sweep in which nothing had to be counted. Local."""
    return Counts(jnp.array(0), jnp.array(0))


def first_states(
    line: Line, coarse: Propagator | None, initial: State, carry: Carry
) -> tuple[BlockStates, Counts]:
    """The guess that is carried, or the coarse solution, or the initial state. Collective."""
    guess = carry.rows.get(ENDS)
    if guess is not None:
        return with_ends(line, initial, guess), no_counts()
    if coarse is None:
        return _constant_states(line, initial), no_counts()
    incoming = recv_left(line.comm, initial)
    with work(COARSE, Tally(coarse=line.owned.n_owned)):
        states, _, guarded = coarse_chain_block(coarse, line.params, incoming, line.owned)
    send_right(line.comm, states.ends[-1])
    return states, no_counts()._replace(guarded=guarded)


def first_cotangents(
    line: Line, coarse: Propagator | None, starts: Block, sources: SliceResult, carry: Carry
) -> BlockCotangents:
    """The guess that is carried, or the coarse adjoint solution, or zero. Collective."""
    guess = carry.rows.get(LEFTS)
    if guess is not None:
        return with_lefts(line, guess)
    if coarse is None:
        return BlockCotangents(jnp.zeros_like(starts), jnp.zeros_like(starts))
    return coarse_cotangents(line, coarse, starts, sources)


def _constant_states(line: Line, initial: State) -> BlockStates:
    """The initial state everywhere. Collective."""
    constant = bcast_from(line.comm, initial, 0)
    block = jnp.broadcast_to(constant, (line.owned.n_owned, *constant.shape))
    return BlockStates(block, block)


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


def needs_basis(name: str) -> ProblemError:
    """What to say to who gives no basis. Local."""
    return ProblemError(
        f"`method={name!r}` needs `basis`, for instance `SharedBasis('pod', rank=8, n_new=2)`."
    )


def needs_coarse(name: str) -> ProblemError:
    """What to say to who gives no coarse propagator. Local."""
    return ProblemError(
        f"`method={name!r}` needs `coarse`, the steps of the coarse propagator; 'picard' and "
        "'tangent' do without."
    )


def by_slice(values: Array, like: Array) -> Array:
    """One value per slice, shaped to broadcast against the states of the slices. Local."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))
