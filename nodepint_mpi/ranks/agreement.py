"""What all ranks must agree on: one failure as everybody's, and the same things held by all.

A rank that raises alone leaves the others waiting in their next collective call for ever. So a step
that all ranks take is wrapped in `together`, which raises on all ranks or on none.

Importing this module starts no MPI: ranks get their devices before that.
"""

import contextlib
import hashlib
import logging
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nodepint_mpi.errors import NodepintError, RankError

if TYPE_CHECKING:
    from mpi4py import MPI

_log = logging.getLogger(__name__)
NOTHING = "nothing"
_MOST_NAMED = 4


@contextlib.contextmanager
def together(control: "MPI.Intracomm") -> Iterator[None]:
    """Raise on all ranks what the lowest failing rank raises in the body, or on none.

    Collective over `control`, once, at the end of the body. The body itself must be local: a rank
    that fails in it does not reach a collective call in which the others would wait for it.

    An explained error keeps its class. Its message names the rank unless that is rank 0: what all
    ranks do alike fails there as well, and what rank 0 does alone, such as to read a config, it
    does for all.

    Raises:
        NodepintError: of the class and with the message of the lowest rank that failed.
        RankError: for any other kind of exception, with rank, host and kind. That rank's traceback
            goes to its debug log.
    """
    error: Exception | None = None
    mine: tuple[type[NodepintError], str] | None = None
    who = f"rank {control.rank} on {socket.gethostname()}: "
    try:
        yield
    except NodepintError as caught:
        error = caught
        mine = type(caught), f"{who if control.rank else ''}{caught}"
    except Exception as caught:
        error = caught
        mine = RankError, f"{who}{type(caught).__name__}: {caught}"
    if error is not None:
        _log.debug("failed in a step of all ranks", exc_info=error)
    first = next((one for one in control.allgather(mine) if one is not None), None)
    if first is not None:
        kind, message = first
        raise kind(message) from error


class Odd(NamedTuple):
    """One value that not all ranks have: who has another one, and what the most have."""

    who: str
    value: str
    usual: str
    usual_who: str


class Difference(NamedTuple):
    """The first of `n_names` named values that differ between ranks, and who holds which."""

    name: str
    n_names: int
    odd: Odd


def find_difference(control: "MPI.Intracomm", held: Mapping[str, str]) -> Difference | None:
    """Whether all ranks hold the same named values; if not, the first that differs.

    Collective over `control`: one reduction of 16 bytes as long as all is well. The same on all
    ranks.
    """
    import numpy as np
    from mpi4py import MPI

    text = repr(list(held.items())).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    most = np.array([digest, -digest])
    control.Allreduce(MPI.IN_PLACE, most, op=MPI.MAX)
    if most[0] == -most[1]:
        return None
    everywhere = control.allgather((socket.gethostname(), dict(held)))
    hosts = [host for host, _ in everywhere]
    names = list(dict.fromkeys(name for _, theirs in everywhere for name in theirs))
    found = {
        name: [theirs.get(name, NOTHING) for _, theirs in everywhere]
        for name in names
        if len({theirs.get(name, NOTHING) for _, theirs in everywhere}) > 1
    }
    if not found:  # the same values in another order
        return None
    name, values = next(iter(found.items()))
    return Difference(name, len(found), name_odd(values, hosts))


def name_odd(values: Sequence[str], hosts: Sequence[str]) -> Odd:
    """Who has another value than the most, and what. Local; not all values may be equal.

    Where as many have one as another, rank 0's counts as the usual one.
    """
    counts = Counter(values)  # in the order of ranks, and so are equally common ones
    usual = max(counts, key=lambda value: counts[value])
    odd = next(value for value in values if value != usual)
    return Odd(_name(values, hosts, odd), odd, usual, _name(values, hosts, usual))


def _name(values: Sequence[str], hosts: Sequence[str], value: str) -> str:
    """The ranks that hold a value, in words."""
    ranks = [rank for rank, theirs in enumerate(values) if theirs == value]
    named = [f"rank {rank} on {hosts[rank]}" for rank in ranks[:_MOST_NAMED]]
    if len(ranks) > _MOST_NAMED:
        named.append(f"{len(ranks) - _MOST_NAMED} more")
    return " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))
