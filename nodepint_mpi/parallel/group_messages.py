"""Messages of a coarse walk in two levels: within groups of slices, and from group to group.

Groups belong to the slices and not to the ranks: one may begin inside a rank's block, and a rank
may have several or none. What a rank sends, it sends before it waits: see `walk_within`. As in
`parallel.exchange`: inside jitted code only, on all ranks of the line in the same order, without a
derivative.
"""

from collections.abc import Callable
from typing import TypeVar

import mpi4jax
from jaxtyping import Array

from nodepint_mpi.core.levels import BlockGroups, GroupCount, joined
from nodepint_mpi.core.partition import owner_of
from nodepint_mpi.core.scopes import COARSE, LEFTWARDS, RECEIVE, RIGHTWARDS, SEND, every, scope
from nodepint_mpi.core.types import State
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, group_message, message, work
from nodepint_mpi.parallel.operations import (
    BEGIN_RELAY,
    BEGIN_WITHIN,
    RELAY_LEFT,
    RELAY_RIGHT,
    SEND_WITHIN_LEFT,
    SEND_WITHIN_RIGHT,
    Call,
    is_recording,
    record,
)

Part = TypeVar("Part")


def walk_within(
    comm: TimeComm,
    own: BlockGroups,
    like: State,
    walk: Callable[[int, int, State], tuple[Part, State]],
    tally: Tally,
    *,
    rightwards: bool,
) -> Part:
    """Walk through the groups of all ranks at once, each from its own first state. Collective.

    First comes what needs nothing from a neighbor, then what goes on from there: so a chain of
    ranks that wait for each other is as long as a group.

    Args:
        comm: Line of ranks along time.
        own: The groups of this rank.
        like: A state.
        walk: `walk(begin, end, incoming)` through these places of the block, in the direction of
            the walk; returns results by slice, and the state that goes on.
        tally: What the walks through the whole block count.
        rightwards: From left to right, or back.
    """
    n, coarsening = own.owned.n_owned, own.grouping.coarsening
    if rightwards:
        cut = int(own.starts[0]) if len(own.starts) else n
        continued, begun, what, ahead = (0, cut), (cut, n), "sends_right", 1
    else:
        cut = int(own.lasts[-1]) + 1 if len(own.lasts) else 0
        continued, begun, what, ahead = (cut, n), (0, cut), "sends_left", -1
    to, source = comm.rank + ahead, comm.rank - ahead
    among = RIGHTWARDS if rightwards else LEFTWARDS
    record(Call(BEGIN_WITHIN, like.nbytes, coarsening=coarsening))
    early = late = None
    if begun[0] < begun[1]:
        with work(COARSE, tally):
            early, outgoing = walk(*begun, like)
        _send(comm, outgoing, to, among, what, own)
    if continued[0] < continued[1]:
        incoming = _receive(comm, like, source, among)
        with work(COARSE, tally) if early is None else scope(COARSE):
            late, outgoing = walk(*continued, incoming)
        if early is None:
            _send(comm, outgoing, to, among, what, own)
    kind = SEND_WITHIN_RIGHT if rightwards else SEND_WITHIN_LEFT
    record(Call(kind, like.nbytes, coarsening=coarsening))
    return joined([late, early] if rightwards else [early, late])


def relay(
    comm: TimeComm,
    own: BlockGroups,
    fill: State,
    walk: Callable[[State], tuple[Part, State]],
    tally: Tally,
    *,
    rightwards: bool,
) -> Part | None:
    """Walk from group to group, each on the rank where it begins. Collective.

    Args:
        comm: Line of ranks along time.
        own: The groups of this rank.
        fill: What the rank gets where the walk begins; like what goes on.
        walk: Through the groups of this rank, from what arrives; returns what it finds and what
            goes on.
        tally: What it counts.
        rightwards: From left to right, or back.

    Returns:
        What the walk finds; None on a rank where no group begins.
    """
    coarsening, what = own.grouping.coarsening, "relays_right" if rightwards else "relays_left"
    record(Call(BEGIN_RELAY, fill.nbytes, coarsening=coarsening))
    source = to = None
    if len(own.groups):
        before, after = int(own.groups[0]) - 1, int(own.groups[-1]) + 1
        ends = _owner(comm, own, before), _owner(comm, own, after)
        source, to = ends if rightwards else ends[::-1]
    incoming, found, outgoing = fill, None, fill
    if source is not None:
        incoming = _receive(comm, fill, source, _among(comm, source, rightwards))
    with work(COARSE, tally):
        if len(own.groups):
            found, outgoing = walk(incoming)
    among = _among(comm, comm.rank if to is None else to, rightwards)
    _send(comm, outgoing, to, among, what, own)
    kind = RELAY_RIGHT if rightwards else RELAY_LEFT
    record(Call(kind, fill.nbytes, coarsening=coarsening))
    return found


def _owner(comm: TimeComm, own: BlockGroups, group: int) -> int | None:
    """The rank where a group begins; None if there is no such group."""
    if not 0 <= group < own.grouping.n_groups:
        return None
    return owner_of(own.grouping.n_slices, comm.size, group * own.grouping.coarsening)


def _among(comm: TimeComm, other: int, rightwards: bool) -> str:
    """The channel to another rank or from it."""
    distance = abs(other - comm.rank)
    if distance > 1:
        return every(distance)
    return RIGHTWARDS if rightwards else LEFTWARDS


def _send(
    comm: TimeComm, state: Array, to: int | None, among: str, what: GroupCount, own: BlockGroups
) -> None:
    """Send if this rank is to; while a step is recorded, say on what it depends."""
    sends = to is not None and own.grouping.number_of(what, own.owned.first, own.owned.n_owned) > 0
    if is_recording():
        with group_message(SEND, among, state, what, own):
            pass
    elif sends:
        with group_message(SEND, among, state, what, own):
            mpi4jax.send(state, to, comm=comm.mpi)


def _receive(comm: TimeComm, like: Array, source: int, among: str) -> Array:
    with message(RECEIVE, among):
        return mpi4jax.recv(like, source, comm=comm.mpi)
