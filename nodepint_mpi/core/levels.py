"""A coarse walk in two levels: groups of neighboring slices, and one longer step for each group.

Walking through N slices one after the other takes N coarse steps. In groups of m slices all groups
are walked through at once from their first states S[g], and these are corrected by a walk from
group to group,

    S[g+1] <- Phi_g(S_old[g]) + H_g(S[g]) - H_g(S_old[g]),

where Phi_g is the walk through the slices of group g and H_g one pass of a coarser propagator over
all of it: parareal of parareal's coarse problem. The first k groups are exact after k corrections.

Arithmetic that any rank can do for any rank, and what one rank computes for its part of the groups.

Reference:
    Gander, Vandewalle (2007), SIAM J. Sci. Comput. 29, 556-578, section 3, for parareal as a
    two-level method; Falgout, Friedhoff, Kolev, MacLachlan, Schroder (2014), SIAM J. Sci. Comput.
    36, C635-C661, for levels of levels.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Int

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.sweeps import (
    Advance,
    BlockStates,
    Correction,
    SliceTimes,
    finite_coarse_end,
    samples_finite,
)
from nodepint_mpi.core.transposed import BlockCotangents, Retreat, pull_back_coarse
from nodepint_mpi.core.types import Params, State

GroupStates = Inexact[Array, "groups *state"]
"""One state for each group that begins in a block."""

EndStates = Inexact[Array, "lasts *state"]
"""One state for each group that ends in a block."""

WORTH = 0.5
"""Two levels have to be less deep than this share of the walk through all slices."""

GroupCount = Literal["passed", "pulled", "sends_right", "sends_left", "relays_right", "relays_left"]
"""What depends on where groups begin in a block: groups that H passes, forward or back; whether a
state goes on to a neighbor within a group; whether one goes on from group to group."""


class Grouping(NamedTuple):
    """Slices 0 ... `n_slices` - 1 in groups of `coarsening`; the last group may be smaller."""

    n_slices: int
    coarsening: int

    @property
    def n_groups(self) -> int:
        """How many there are."""
        return -(-self.n_slices // self.coarsening)

    def groups_of(self, first: int, n_owned: int) -> range:
        """The groups that begin in a block of slices. Local."""
        return range(-(-first // self.coarsening), -(-(first + n_owned) // self.coarsening))

    def number_of(
        self, what: GroupCount, first: Any, n_owned: Any, front: Int[np.ndarray, ""] | int = -1
    ) -> Int[np.ndarray, "..."]:
        """A number of a block, or of many blocks at once: arrays of `first` and `n_owned`. Local.

        With the slices left of `front` solved: groups that begin up to there are not passed again.
        """
        m, last = self.coarsening, self.n_groups - 1
        after = np.asarray(first) + np.asarray(n_owned)
        begin, end = -(-np.asarray(first) // m), -(-after // m)
        match what:
            case "passed":
                found = np.minimum(end, last) - np.maximum(begin, front // m + 1)
            case "pulled":
                found = np.minimum(end, last) - np.maximum(begin, 1)
            case "sends_right":
                found = (after % m > 0) & (after < self.n_slices)
            case "sends_left":
                found = np.asarray(first) % m > 0
            case "relays_right":
                found = (end > begin) & (end <= last)
            case "relays_left":
                found = (end > begin) & (begin > 0)
        return np.asarray(np.maximum(0, found), dtype=int)


def choose_grouping(
    n_slices: int, *, number: int | None, coarsening: int | None, cycles: int
) -> Grouping | None:
    """How slices are grouped; None for a walk in one level. Local.

    By counts of steps one after the other, as with a rank for every slice, and never by the number
    of ranks: the iterates depend on it.

    Args:
        n_slices: Of the whole horizon.
        number: Of levels, 1 or 2; None for two where a coarsening is given or a sweep is less than
            half as deep.
        coarsening: Slices of a group; None for the number that makes a sweep least deep.
        cycles: Corrections of the groups' first states in a sweep.
    """
    m = coarsening
    if m is None:
        m = max(2, round(math.sqrt(n_slices * cycles / (cycles + 1))))
    grouping = Grouping(n_slices, m)
    if number == 1 or grouping.n_groups == 1:
        return None
    if number is None and coarsening is None and depth(grouping, cycles) >= WORTH * n_slices:
        return None
    return grouping


def depth(grouping: Grouping, cycles: int) -> int:
    """Coarse steps that a sweep takes one after the other, with a rank for every slice. Local."""
    return (cycles + 1) * grouping.coarsening + cycles * grouping.n_groups


class BlockGroups(NamedTuple):
    """The groups that begin in a rank's block of slices.

    `starts` are the places of their first slices in the block, and `lasts` the places where a group
    ends.
    """

    grouping: Grouping
    owned: OwnedSlices
    groups: Int[np.ndarray, " groups"]
    starts: Int[np.ndarray, " groups"]
    lasts: Int[np.ndarray, " lasts"]


def block_groups(grouping: Grouping, owned: OwnedSlices) -> BlockGroups:
    """Where groups begin and end in a block. Local."""
    m, after = grouping.coarsening, owned.indices + 1
    groups = np.array(grouping.groups_of(owned.first, owned.n_owned), dtype=int)
    lasts = np.flatnonzero((after % m == 0) | (after == grouping.n_slices))
    return BlockGroups(grouping, owned, groups, groups * m - owned.first, lasts)


def group_times(own: BlockGroups, like: Array) -> SliceTimes:
    """What H needs to know of the groups that begin in a block. Local."""
    m, edges = own.grouping.coarsening, own.owned.all_edges
    firsts = own.groups * m
    afters = np.minimum(firsts + m, own.grouping.n_slices)
    dtype = jnp.finfo(like.dtype).dtype
    lengths = edges[afters] - edges[firsts]
    parts = (edges[firsts], lengths, np.zeros((len(firsts), 0)))
    times = (*(jnp.asarray(part, dtype=dtype) for part in parts), jnp.asarray(firsts))
    return SliceTimes(*jax.lax.optimization_barrier(times))  # see `core.sweeps.slice_times`


def walk_groups(
    advance: Advance, rows: Any, incoming: State, firsts: GroupStates, starts: np.ndarray
) -> Correction:
    """Walk through slices, anew wherever a group begins. Local.

    Args:
        advance: A slice.
        rows: Its row for each slice.
        incoming: Start of the first slice, where no group begins there.
        firsts: First states of the groups.
        starts: Places of their first slices.
    """

    def step(state, row):
        which, own = row
        if len(starts):
            state = jnp.where(which >= 0, firsts[which], state)
        return advance(state, own)

    which = _numbered(starts, len(jax.tree.leaves(rows)[0]))
    _, (states, coarse_ends, guarded) = jax.lax.scan(step, incoming, (which, rows))
    return Correction(states, coarse_ends, jnp.sum(guarded))


def walk_groups_back(
    retreat: Retreat, rows: Any, incoming: State, rights: EndStates, lasts: np.ndarray
) -> BlockCotangents:
    """The same from right to left: anew from `rights` wherever a group ends. Local."""

    def step(cotangent, row):
        which, own = row
        if len(lasts):
            cotangent = jnp.where(which >= 0, rights[which], cotangent)
        return retreat(cotangent, own)

    which = _numbered(lasts, len(jax.tree.leaves(rows)[0]))
    return jax.lax.scan(step, incoming, (which, rows), reverse=True)[1]


def _numbered(places: np.ndarray, n: int) -> Array:
    which = np.full(n, -1)
    which[places] = np.arange(len(places))
    return jnp.asarray(which)


class GroupWalk(NamedTuple):
    """First states of the groups of a block after a walk from group to group.

    `before` is what H made of the group before each, (groups, *state), and `outgoing` what it made
    of the last. `n_guarded` counts where that was not finite.
    """

    firsts: GroupStates
    before: GroupStates
    outgoing: State
    n_guarded: Int[Array, ""]


def relay_states(
    coarsest: Propagator,
    params: Params,
    incoming: State,
    *,
    given: GroupStates,
    before: GroupStates | None,
    front: Int[Array, ""],
    own: BlockGroups,
) -> GroupWalk:
    """S[g+1] <- given[g+1] + H_g(S[g]) - before[g+1], for the groups that begin in a block. Local.

    What is not finite is left out. Groups that begin at `front` or left of it have not changed, and
    cost nothing.

    Args:
        coarsest: H.
        params: Of the field.
        incoming: H of the group before the first of these; the first state of all for group 0.
        given: What is known of the first states: Phi_g(S_old[g]), or without `before` what they
            are expected to have more than H gives.
        before: H_g(S_old[g]) of the group before each; none in iteration 0.
        front: Slices left of it are solved.
        own: Which groups.
    """
    m, last = own.grouping.coarsening, own.grouping.n_groups - 1
    groups = own.groups

    def step(arrived, row):
        times, is_first, is_open, is_passed, known, old = row
        change = arrived if old is None else arrived - old
        candidate = known + change
        usable = samples_finite(candidate, coarsest.n_sample_axes)
        state = jnp.where(usable, candidate, arrived if old is None else known)
        if old is not None:
            state = jnp.where(is_open, state, known)
            arrived = jnp.where(is_open | is_first, arrived, old)
        state = jnp.where(is_first, arrived, state)

        def pass_group():
            return finite_coarse_end(coarsest, params, state, times)

        end, guarded = jax.lax.cond(is_passed, pass_group, lambda: (state, jnp.array(False)))
        return end, (state, arrived, guarded)

    firsts = jnp.asarray(groups * m)
    rows = (
        group_times(own, given),
        jnp.asarray(groups == 0),
        firsts - m > front,
        jnp.asarray(groups < last) & (firsts > front),
        given,
        before,
    )
    outgoing, (states, arrived, guarded) = jax.lax.scan(step, incoming, rows)
    return GroupWalk(states, arrived, outgoing, jnp.sum(guarded))


def relay_cotangents(
    coarsest: Propagator,
    params: Params,
    starts: GroupStates,
    incoming: State,
    *,
    given: GroupStates,
    old: GroupStates,
    own: BlockGroups,
) -> tuple[GroupStates, State]:
    """L[g] <- given[g] + (dH_g/du)^T (L[g+1] - L_old[g+1]), from right to left. Local.

    Args:
        coarsest: H.
        params: Of the field.
        starts: First states of the groups, where H is linearized.
        incoming: L - L_old of the group after the last of these.
        given: What the walk back through each group gave at its left edge.
        old: L_old.
        own: Which groups.

    Returns:
        L, and L - L_old of the first of these groups, which goes on to the left.
    """

    def step(change, row):
        start, times, is_pulled, known, before = row

        def pull():
            return pull_back_coarse(coarsest, params, start, times, change)

        left = known + jax.lax.cond(is_pulled, pull, lambda: jnp.zeros_like(known))
        return left - before, left

    last = own.grouping.n_groups - 1
    is_pulled = jnp.asarray((own.groups > 0) & (own.groups < last))
    rows = (starts, group_times(own, starts), is_pulled, given, old)
    outgoing, lefts = jax.lax.scan(step, incoming, rows, reverse=True)
    return lefts, outgoing


def tie(states: BlockStates, following: State) -> BlockStates:
    """The same states with ends where the next slices start; `following` after the last. Local."""
    return states._replace(ends=jnp.concatenate([states.starts[1:], following[None]]))


def part_of_rows(rows: Any, begin: int, end: int) -> Any:
    """Rows of some slices of a block. Local."""
    return jax.tree.map(lambda row: row[begin:end], rows)


def joined(parts: list[Any]) -> Any:
    """Results by slice of parts of a block in their order, as those of the block. Local."""
    parts = [part for part in parts if part is not None]
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *each: jnp.concatenate(each), *parts)
