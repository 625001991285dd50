"""One rank's explained failure as the same exception on all ranks.

Rank 0 makes, names and removes files for all, so its error is everybody's and keeps its class;
`parallel.guard.together` would make it one rank's.
"""

import contextlib
import socket
from collections.abc import Iterator

from mpi4py import MPI

from nodepint_mpi.errors import NodepintError
from nodepint_mpi.parallel.guard import together


@contextlib.contextmanager
def agreed(control: MPI.Intracomm) -> Iterator[None]:
    """Raise on all ranks what the lowest failing rank raises in the body.

    Collective over `control`, at the end of the body. The body itself must be local.

    Raises:
        NodepintError: of the class and with the message of the lowest rank that failed; the
            message names the rank if it is not rank 0.
        RankError: for any other kind of exception.
    """
    mine: tuple[type[NodepintError], str] | None = None
    with together(control):
        try:
            yield
        except NodepintError as error:
            who = f"rank {control.rank} on {socket.gethostname()}: " if control.rank else ""
            mine = type(error), f"{who}{error}"
    first = next((one for one in control.allgather(mine) if one is not None), None)
    if first is not None:
        kind, message = first
        raise kind(message)
