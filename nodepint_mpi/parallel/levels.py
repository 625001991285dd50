"""Parareal's coarse walks in two levels: what `core.levels` computes for a block, on all ranks.

A sweep's correction is a walk through all slices, each slice waiting for the one before it. Here it
is walked through in groups of slices at once; then first states of the groups are corrected from
group to group by a coarser propagator H, and the groups are walked through again:

    within groups | from group to group | within groups | ...

Depth: `cycles` times (m + N / m) + m coarse steps instead of N. Groups belong to the slices, so the
iterates are the same on any number of ranks; those after k sweeps are exact on the first k slices.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nodepint_mpi.core.levels import (
    BlockGroups,
    EndStates,
    Grouping,
    GroupStates,
    GroupWalk,
    block_groups,
    choose_grouping,
    group_times,
    part_of_rows,
    relay_cotangents,
    relay_states,
    tie,
    walk_groups,
    walk_groups_back,
)
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.sweeps import Advance, BlockStates, Correction, finite_coarse_end
from nodepint_mpi.core.transposed import BlockCotangents, Retreat
from nodepint_mpi.core.types import Block, State
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.counters import Tally, of_groups
from nodepint_mpi.parallel.exchange import shift_left, shift_right
from nodepint_mpi.parallel.group_messages import relay, walk_within
from nodepint_mpi.parallel.line import Line


class Levels(eqx.Module):
    """How parareal's coarse walks are done in two levels.

    Attributes:
        coarsening: Slices of a group; None for about the root of half their number, which makes a
            sweep with one cycle least deep.
        cycles: How often the first states of the groups are corrected in a sweep. With as many as
            there are groups the result is that of the walk through all slices, to round-off.
        coarsest: H, passed once over a whole group; the coarse propagator itself unless given,
            whose steps are then as many times longer as there are slices in the group.
        number: Of levels: 1, 2, or None for 2 where `coarsening` is given, or where a sweep is
            then less than half as deep.
    """

    coarsening: int | None = eqx.field(static=True, default=None)
    cycles: int = eqx.field(static=True, default=1)
    coarsest: Propagator | None = None
    number: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.number not in (None, 1, 2):
            raise ProblemError(f"`number` of levels is {self.number!r}; expected 1, 2 or None.")
        for name, least in (("coarsening", 2), ("cycles", 1)):
            value = getattr(self, name)
            if value is None and name == "coarsening":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ProblemError(
                    f"`{name}` is {value!r}; expected a whole number of at least {least}."
                )

    def grouping(self, n_slices: int) -> Grouping | None:
        """How the slices form groups; None where one walk passes through all of them. Local."""
        return choose_grouping(
            n_slices, number=self.number, coarsening=self.coarsening, cycles=self.cycles
        )


class LevelsMemory(NamedTuple):
    """What sweeps in two levels keep.

    `coarse_ends` are G of the starts, as without levels. `before` is H of the group before each
    that begins in the block, and `defects` what its first state had more than that.
    """

    coarse_ends: Block
    before: GroupStates
    defects: GroupStates


class Walked(NamedTuple):
    """A block after a walk in two levels; `memory` is what the next begins with."""

    states: BlockStates
    memory: LevelsMemory
    n_guarded: Int[Array, ""]


class WalkedBack(NamedTuple):
    """Cotangents after a walk back in two levels, and what the walks within groups gave at left
    edges, which differs from `cotangents.lefts` where groups begin."""

    cotangents: BlockCotangents
    within: Block


class TwoLevels(NamedTuple):
    """A line of ranks with its groups, and how often these are corrected."""

    line: Line
    own: BlockGroups
    coarsest: Propagator
    cycles: int

    def begin(
        self, initial: State, advance: Advance, rows: object, defects: GroupStates | None = None
    ) -> Walked:
        """The coarse solution. Collective, inside jit.

        Attributes:
            initial: State at the first edge. Read on the first rank only.
            advance: A slice of the coarse walk.
            rows: Its rows.
            defects: What first states of groups are expected to have more than H gives.
        """
        given = self._blank(initial) if defects is None else defects
        front, everything = jnp.array(-1), Tally(coarse=self.own.owned.n_owned)
        begun = self._relay(initial, given, None, front)
        walk, n_guarded = self._cycle(
            initial, begun, advance, rows, front, self.cycles - 1, everything
        )
        memory = LevelsMemory(walk.within.coarse_ends, walk.groups.before, given)
        if defects is not None:
            reached = self._ends_before(initial, walk.within.states.ends)
            memory = memory._replace(defects=reached - walk.groups.before)
        return Walked(self._tied(walk.within.states), memory, n_guarded)

    def sweep(
        self,
        initial: State,
        advance: Advance,
        rows: object,
        old: BlockStates,
        memory: LevelsMemory,
        front: Int[Array, ""],
        tally: Tally,
    ) -> Walked:
        """The correction of a sweep. Collective, inside jit.

        Attributes:
            initial: State at the first edge. Read on the first rank only.
            advance: A slice of the correction.
            rows: Its rows.
            old: States before.
            memory: What the walk before left.
            front: Slices left of it stay.
            tally: What one walk through the block counts.
        """
        begun = GroupWalk(
            old.starts[self.own.starts], memory.before, jnp.zeros_like(old.ends[0]), jnp.array(0)
        )
        walk, n_guarded = self._cycle(initial, begun, advance, rows, front, self.cycles, tally)
        memory = memory._replace(coarse_ends=walk.within.coarse_ends, before=walk.groups.before)
        return Walked(self._tied(walk.within.states), memory, n_guarded)

    def know(self, states: BlockStates, coarse_ends: Block) -> LevelsMemory:
        """What a walk would have left that ended with these states. Collective, inside jit."""
        firsts = states.starts[self.own.starts]
        times = group_times(self.own, states.starts)

        def walk(incoming):
            ends = jax.vmap(
                lambda first, own: finite_coarse_end(self.coarsest, self.line.params, first, own)[0]
            )(firsts, times)
            return jnp.concatenate([incoming[None], ends[:-1]]), ends[-1]

        tally = Tally(coarse=of_groups("passed", self.own))
        before = relay(self.line.comm, self.own, states.starts[0], walk, tally, rightwards=True)
        blank = jnp.zeros_like(firsts)
        return LevelsMemory(coarse_ends, blank if before is None else before, blank)

    def walk_back(
        self,
        retreat: Retreat,
        rows: object,
        starts: Block,
        old: BlockCotangents,
        tally: Tally,
    ) -> WalkedBack:
        """Cotangents from right to left, once more corrected. Collective, inside jit.

        Attributes:
            retreat: A slice of the walk back.
            rows: Its rows.
            starts: States where the coarse propagators are linearized.
            old: Cotangents before, of which those at the edges of groups are read.
            tally: What one walk through the block counts.
        """
        own, comm = self.own, self.line.comm
        lefts, rights = old.lefts[own.starts], old.rights[own.lasts]
        zero = jnp.zeros_like(starts[0])
        within = self._within_back(retreat, rows, zero, rights, tally)
        for _ in range(self.cycles):
            given, before = within.lefts[own.starts], lefts

            def walk(incoming, given=given, before=before):
                return relay_cotangents(
                    self.coarsest, self.line.params, starts[own.starts], incoming,
                    given=given, old=before, own=own,
                )  # fmt: skip

            pulled = Tally(coarse_pulled=of_groups("pulled", own))
            found = relay(comm, own, zero, walk, pulled, rightwards=False)
            lefts = given if found is None else found
            rights = self._rights(zero, lefts)
            within = self._within_back(retreat, rows, zero, rights, tally)
        at_groups = own.starts[own.groups > 0]  # nothing ends where the first one begins
        tied = within.lefts.at[at_groups].set(lefts[own.groups > 0])
        return WalkedBack(within._replace(lefts=tied), within.lefts)

    def back_from(self, lefts: Block) -> BlockCotangents:
        """Cotangents at left edges with those at right ones, at edges of groups. Collective."""
        own = self.own
        rights = self._rights(jnp.zeros_like(lefts[0]), lefts[own.starts])
        return BlockCotangents(lefts, jnp.zeros_like(lefts).at[own.lasts].set(rights))

    def by_slice(self, of_groups: GroupStates) -> Block:
        """Values of groups in the rows of the slices where these begin, zero elsewhere. Local."""
        owned, shape = self.own.owned, of_groups.shape[1:]
        return (
            jnp.zeros((owned.n_owned, *shape), of_groups.dtype).at[self.own.starts].set(of_groups)
        )

    def _cycle(
        self,
        initial: State,
        groups: GroupWalk,
        advance: Advance,
        rows: object,
        front: Int[Array, ""],
        n_corrections: int,
        tally: Tally,
    ) -> tuple["_Cycled", Int[Array, ""]]:
        within = self._within(initial, advance, rows, groups.firsts, tally)
        for _ in range(n_corrections):
            reached = self._ends_before(initial, within.states.ends)
            groups = self._relay(initial, reached, groups.before, front)
            within = self._within(initial, advance, rows, groups.firsts, tally)
        return _Cycled(within, groups), within.n_guarded + groups.n_guarded

    def _within(
        self, like: State, advance: Advance, rows: object, firsts: GroupStates, tally: Tally
    ) -> Correction:
        """Through all groups at once, from their first states. Collective."""
        own = self.own

        def walk(begin, end, incoming):
            begins = (own.starts >= begin) & (own.starts < end)
            starts = own.starts[begins] - begin
            found = walk_groups(advance, part_of_rows(rows, begin, end), incoming, firsts, starts)
            by_slice = found._replace(n_guarded=found.n_guarded[None])
            return by_slice, found.states.ends[-1]

        found = walk_within(self.line.comm, own, like, walk, tally, rightwards=True)
        return found._replace(n_guarded=jnp.sum(found.n_guarded))

    def _within_back(
        self, retreat: Retreat, rows: object, like: State, rights: EndStates, tally: Tally
    ) -> BlockCotangents:
        """The same from right to left, from the cotangents where groups end. Collective."""
        own = self.own

        def walk(begin, end, incoming):
            ends = (own.lasts >= begin) & (own.lasts < end)
            lasts = own.lasts[ends] - begin
            found = walk_groups_back(
                retreat, part_of_rows(rows, begin, end), incoming, rights, lasts
            )
            return found, found.lefts[0]

        return walk_within(self.line.comm, own, like, walk, tally, rightwards=False)

    def _relay(
        self,
        initial: State,
        given: GroupStates,
        before: GroupStates | None,
        front: Int[Array, ""],
    ) -> GroupWalk:
        """From group to group. Collective."""

        def walk(incoming):
            found = relay_states(
                self.coarsest, self.line.params, incoming,
                given=given, before=before, front=front, own=self.own,
            )  # fmt: skip
            return found, found.outgoing

        tally = Tally(coarse=of_groups("passed", self.own, front))
        found = relay(self.line.comm, self.own, initial, walk, tally, rightwards=True)
        if found is None:  # no group begins here
            found = GroupWalk(given, given, jnp.zeros_like(initial), jnp.array(0))
        return found

    def _ends_before(self, initial: State, ends: Block) -> GroupStates:
        """What was reached at the end of the group before each that begins here. Collective."""
        incoming = shift_right(self.line.comm, ends[-1], initial)
        return jnp.concatenate([incoming[None], ends[:-1]])[self.own.starts]

    def _tied(self, states: BlockStates) -> BlockStates:
        """With ends where the next slices start, which groups did not begin with. Collective."""
        following = shift_left(self.line.comm, states.starts[0], states.ends[-1])
        return tie(states, following)

    def _rights(self, zero: State, lefts: GroupStates) -> EndStates:
        """Cotangents where groups end, from those where groups begin. Collective."""
        own = self.own
        begins_here = len(own.starts) > 0 and own.starts[0] == 0
        following = shift_left(self.line.comm, lefts[0] if begins_here else zero, zero)
        inside = lefts[1:] if begins_here else lefts
        ends_here = len(own.lasts) > 0 and own.lasts[-1] == own.owned.n_owned - 1
        return jnp.concatenate([inside, following[None]]) if ends_here else inside

    def _blank(self, like: State) -> GroupStates:
        return jnp.zeros((len(self.own.groups), *like.shape), like.dtype)


class _Cycled(NamedTuple):
    within: Correction
    groups: GroupWalk


def two_levels(line: Line, levels: Levels | None, coarse: Propagator) -> TwoLevels | None:
    """A line with its groups; None where walks go through all slices. Local."""
    grouping = None if levels is None else levels.grouping(line.owned.n_slices)
    if levels is None or grouping is None:
        return None
    coarsest = coarse if levels.coarsest is None else levels.coarsest
    return TwoLevels(line, block_groups(grouping, line.owned), coarsest, levels.cycles)
