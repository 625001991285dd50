"""Samples dealt to groups of ranks, and how they change hands outside of jitted code.

The g-th group takes the g-th part of every batch. What is kept of a sample until its next turn
(`training.warm_starts`) stays with the group that keeps its number, and visits the others.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from mpi4py import MPI

from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.parallel.comms import TimeComm


def own_part(comm: TimeComm, n: int) -> slice:
    """This group's part of `n` consecutive samples. Local."""
    return part_of(n, comm.n_groups, comm.group)


def part_of(n: int, n_groups: int, group: int) -> slice:
    """The part of `n` consecutive samples that a group has: as even as possible. Local."""
    part = owned_range(n, n_groups, group)
    return slice(part.start, part.stop)


def swap(
    data: MPI.Intracomm, outgoing: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
    """Send an array to each rank, and get one from each. Collective over `data`.

    Args:
        data: The ranks, which are those that own the same slices.
        outgoing: For every rank, arrays of one type; some may be empty.
        shapes: Of what comes from every rank.
    """
    incoming = [np.empty(shape, outgoing[0].dtype) for shape in shapes]
    sent = [np.ascontiguousarray(array) for array in outgoing]  # lives until all is done
    requests = []
    for other in range(data.size):
        if other == data.rank:
            incoming[other] = sent[other]
        else:
            requests.append(data.Irecv(incoming[other], other))
            requests.append(data.Isend(sent[other], other))
    MPI.Request.Waitall(requests)
    return incoming


def join_samples(
    data: MPI.Intracomm, rows: Mapping[str, np.ndarray], first: int
) -> tuple[dict[str, np.ndarray], int]:
    """Rows (slices, samples, ...) with the samples of all groups. Collective over `data`.

    Every rank gets some of the slices that these ranks share, whole.

    Args:
        data: The ranks that own the same slices.
        rows: This group's samples on them, by name.
        first: Global index of the first of them.

    Returns:
        The rows by name, and the global index of the first one of this rank.
    """
    if data.size == 1:
        return dict(rows), first
    joined = {}
    for name, block in rows.items():
        n_owned, rest = len(block), block.shape[2:]
        parts = [part_of(n_owned, data.size, rank) for rank in range(data.size)]
        mine = parts[data.rank].stop - parts[data.rank].start
        counts = data.allgather(block.shape[1])
        shapes = [(mine, count, *rest) for count in counts]
        incoming = swap(data, [block[part] for part in parts], shapes)
        joined[name] = np.concatenate(incoming, axis=1)
    n_owned = max((len(block) for block in rows.values()), default=0)
    return joined, first + part_of(n_owned, data.size, data.rank).start


def split_samples(comm: TimeComm, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of rows (slices, samples, ...) the samples of this group. Local; undoes `join_samples`."""
    if comm.n_groups == 1:
        return dict(rows)
    return {name: block[:, own_part(comm, block.shape[1])] for name, block in rows.items()}
