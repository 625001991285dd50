"""Messages along the line of time ranks: neighbors, reductions, gathers. Identity on one rank.

Sums and maxima are over the ranks of all lines, so that groups of samples stay in step. Ranks that
share tangents do all else alike: in a sum those with basis rank 0 count, and all get the same bits.
What these ranks compute for themselves, such as their states, may differ by the round-off of their
programs. It cannot drift apart: parameters follow from sums, whether and how to go on from sums and
maxima, tangents are gathered, and sweeps bring all to the same solution.

Call these inside jitted code only, on all ranks of the line in the same order. None of them has a
derivative: the time-parallel solve carries its own reverse rule. Branches on the rank are taken
at trace time, so no rank ever reads a message that was not sent.
"""

import jax
import jax.numpy as jnp
import mpi4jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree
from mpi4py import MPI

from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.core.scopes import (
    CELL,
    GRID,
    LEFTWARDS,
    LINE,
    RECEIVE,
    REDUCE,
    RIGHTWARDS,
    SEND,
    every,
)
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import message
from nodepint_mpi.parallel.operations import (
    FROM_CELL,
    FROM_FIRST,
    FROM_ONE,
    RECV_LEFT,
    RECV_RIGHT,
    REDUCE_ALL,
    SEND_LEFT,
    SEND_RIGHT,
    SHIFT_LEFT,
    SHIFT_RIGHT,
    TO_ALL,
    TO_CELL,
    TO_FIRST,
    Call,
    record,
)


def recv_left(comm: TimeComm, fill: Array) -> Array:
    """What the left neighbor sends; `fill` on the first rank. Collective with `send_right`."""
    record(Call(RECV_LEFT, fill.nbytes))
    return fill if comm.rank == 0 else _receive(comm, fill, comm.rank - 1, RIGHTWARDS)


def send_right(comm: TimeComm, state: Array) -> None:
    """Send to the right neighbor; nothing on the last rank. Collective with `recv_left`."""
    record(Call(SEND_RIGHT, state.nbytes))
    if comm.rank < comm.size - 1:
        _send(comm, state, comm.rank + 1, RIGHTWARDS)


def recv_right(comm: TimeComm, fill: Array) -> Array:
    """What the right neighbor sends; `fill` on the last rank. Collective with `send_left`."""
    record(Call(RECV_RIGHT, fill.nbytes))
    if comm.rank == comm.size - 1:
        return fill
    return _receive(comm, fill, comm.rank + 1, LEFTWARDS)


def send_left(comm: TimeComm, state: Array) -> None:
    """Send to the left neighbor; nothing on the first rank. Collective with `recv_right`."""
    record(Call(SEND_LEFT, state.nbytes))
    if comm.rank > 0:
        _send(comm, state, comm.rank - 1, LEFTWARDS)


def in_order(comm: TimeComm, value: Array) -> Array:
    """The same value, computed before the messages that follow, used after those before.

    XLA keeps the order of messages but moves work across them: without this a rank may do long
    work before it sends what a neighbor waits for, or wait before it works. Local.
    """
    return value if comm.size == 1 else mpi4jax.allreduce(value, MPI.SUM, comm=MPI.COMM_SELF)


def shift_right(comm: TimeComm, state: Array, fill: Array, distance: int = 1) -> Array:
    """Everybody sends so many ranks to the right at once. Collective.

    Returns what arrived, shaped like `fill`, which a rank gets where nobody sends to it.
    """
    record(Call(SHIFT_RIGHT, state.nbytes, distance))
    return _shift(comm, state, fill, comm.rank + distance, comm.rank - distance, distance)


def shift_left(comm: TimeComm, state: Array, fill: Array, distance: int = 1) -> Array:
    """The same to the left. Collective."""
    record(Call(SHIFT_LEFT, state.nbytes, distance))
    return _shift(comm, state, fill, comm.rank - distance, comm.rank + distance, distance)


def _shift(comm: TimeComm, state: Array, fill: Array, to: int, source: int, distance: int) -> Array:
    sends, receives = 0 <= to < comm.size, 0 <= source < comm.size
    among = LINE if distance == 1 else every(distance)
    if sends and receives:
        with message(SEND, among, state):
            return mpi4jax.sendrecv(state, fill, source, to, comm=comm.mpi)
    if sends:
        _send(comm, state, to, among)
    return _receive(comm, fill, source, among) if receives else fill


def _send(comm: TimeComm, state: Array, to: int, among: str) -> None:
    with message(SEND, among, state):
        mpi4jax.send(state, to, comm=comm.mpi)


def _receive(comm: TimeComm, fill: Array, source: int, among: str) -> Array:
    with message(RECEIVE, among):
        return mpi4jax.recv(fill, source, comm=comm.mpi)


def max_over_ranks(comm: TimeComm, values: Array) -> Array:
    """Elementwise maximum over the ranks of all lines, equal on all. Collective over the grid."""
    if comm.n_grid == 1:
        return values
    record(Call(REDUCE_ALL, values.nbytes))
    with message(REDUCE, GRID, values):
        return mpi4jax.allreduce(values, MPI.MAX, comm=comm.grid)


def sum_over_ranks(comm: TimeComm, tree: PyTree[Array]) -> PyTree[Array]:
    """Sum of a tree of arrays over the ranks of all lines, bitwise equal on all.

    Collective over the grid. One message each way: summed on one rank and sent back, since an
    allreduce need not give equal bits everywhere. Of ranks that share tangents the first counts.
    """
    return sum_over_grid(comm, tree if comm.basis_rank == 0 else jax.tree.map(jnp.zeros_like, tree))


def sum_over_grid(comm: TimeComm, tree: PyTree[Array]) -> PyTree[Array]:
    """The same where all ranks count, also those that share tangents. Collective over the grid."""
    if comm.n_grid == 1:
        return tree
    flat, unravel = ravel_pytree(tree)
    if flat.size == 0:
        return tree
    record(Call(REDUCE_ALL, flat.nbytes))
    with message(REDUCE, GRID, flat):  # the first rank hands over the sum, the others their part
        total = mpi4jax.reduce(flat, MPI.SUM, 0, comm=comm.grid)
        return unravel(mpi4jax.bcast(total, 0, comm=comm.grid))


def bcast_from(comm: TimeComm, value: Array, rank: int) -> Array:
    """The value of one rank of the line, on all its ranks. Collective."""
    if comm.size == 1:
        return value
    record(Call(FROM_ONE, value.nbytes))
    with message(REDUCE, LINE, *([value] if comm.rank == rank else [])):
        return mpi4jax.bcast(value, rank, comm=comm.mpi)


def gather_slices(comm: TimeComm, block: Array, n_slices: int) -> Array:
    """The blocks of all ranks in the order of the slices, on all ranks. Collective."""
    if comm.size == 1:
        return block
    block = _widened(comm, block, n_slices)
    record(Call(TO_ALL, block.nbytes))
    with message(REDUCE, LINE, block):
        blocks = mpi4jax.allgather(block, comm=comm.mpi)
    return _joined(blocks, n_slices)


def gather_rows(comm: TimeComm, rows: Array, counts: tuple[int, ...]) -> Array:
    """The rows of all ranks in order, on all ranks; rank r has `counts[r]` of them. Collective."""
    if comm.size == 1:
        return rows
    widest = max(counts)
    if widest == 0:
        return rows
    block = jnp.pad(rows, [(0, widest - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))
    record(Call(TO_ALL, block.nbytes))
    with message(REDUCE, LINE, block):
        blocks = mpi4jax.allgather(block, comm=comm.mpi)
    real = np.concatenate([r * widest + np.arange(count) for r, count in enumerate(counts)])
    return blocks.reshape(comm.size * widest, *rows.shape[1:])[real]


def gather_directions(comm: TimeComm, own: Array, n_directions: int) -> Array:
    """What all ranks with the same slices have of so many directions. Collective over the cell.

    Args:
        comm: Line of ranks along time; those of its cell share directions.
        own: Of this rank's part of the directions, (owned, directions, ...).
        n_directions: Of all parts, dealt by `owned_range`.

    Returns:
        (owned, n_directions, ...), with the same bits on all ranks of the cell.
    """
    if comm.basis is None:
        return own
    widest = len(owned_range(n_directions, comm.n_basis, 0))
    block = jnp.moveaxis(own, 1, 0)
    block = jnp.pad(block, [(0, widest - len(block))] + [(0, 0)] * (block.ndim - 1))
    record(Call(TO_CELL, block.nbytes))
    with message(REDUCE, CELL, block):
        blocks = mpi4jax.allgather(block, comm=comm.basis)
    return jnp.moveaxis(_joined(blocks, n_directions), 0, 1)


def same_in_cell(comm: TimeComm, value: Array) -> Array:
    """What the first of the ranks with the same slices has, on all. Collective over the cell.

    For what they computed alike, each with the round-off of its own program, and others rely on
    being equal on all ranks.
    """
    if comm.basis is None:
        return value
    record(Call(FROM_CELL, value.nbytes))
    with message(REDUCE, CELL, *([value] if comm.basis_rank == 0 else [])):
        return mpi4jax.bcast(value, 0, comm=comm.basis)


def gather_to_first(comm: TimeComm, block: Array, n_slices: int) -> Array | None:
    """The blocks of all ranks in the order of the slices, on the first rank. Collective.

    None on the other ranks.
    """
    if comm.size == 1:
        return block
    block = _widened(comm, block, n_slices)
    record(Call(TO_FIRST, block.nbytes))
    with message(REDUCE, LINE, *([block] if comm.rank > 0 else [])):
        blocks = mpi4jax.gather(block, 0, comm=comm.mpi)
    if comm.rank > 0:
        return None
    return _joined(blocks, n_slices)


def scatter_from_first(comm: TimeComm, rows: Array | None, like: Array, n_slices: int) -> Array:
    """Each rank's block of the first rank's rows, one row a slice. Collective.

    Args:
        comm: Line of ranks along time.
        rows: Rows of all slices on the first rank, None on the others.
        like: Shape and type of this rank's block.
        n_slices: Slices of the whole horizon.
    """
    if comm.size == 1:
        assert rows is not None
        return rows
    widest = len(owned_range(n_slices, comm.size, 0))
    dealt = jnp.zeros((widest, *like.shape[1:]), like.dtype)
    record(Call(FROM_FIRST, dealt.nbytes))
    if comm.rank == 0:
        assert rows is not None
        dealt = _dealt(rows, comm.size)
    with message(REDUCE, LINE, *([dealt[1:]] if comm.rank == 0 else [])):
        return mpi4jax.scatter(dealt, 0, comm=comm.mpi)[: like.shape[0]]


# Blocks have two lengths, see `owned_range`: a few operations do for any number of ranks.


def _joined(blocks: Array, n_slices: int) -> Array:
    """The slices of all blocks, (ranks, widest, ...), without what these are filled up with."""
    n_ranks, widest, *shape = blocks.shape
    share, n_wider = divmod(n_slices, n_ranks)
    wider = blocks[:n_wider].reshape(n_wider * widest, *shape)
    others = blocks[n_wider:, :share].reshape((n_ranks - n_wider) * share, *shape)
    return jnp.concatenate([wider, others])


def _dealt(rows: Array, n_ranks: int) -> Array:
    """The blocks of all ranks, filled up to the length of the widest: the reverse."""
    n_slices, *shape = rows.shape
    share, n_wider = divmod(n_slices, n_ranks)
    widest = share + (n_wider > 0)
    wider = rows[: n_wider * widest].reshape(n_wider, widest, *shape)
    others = rows[n_wider * widest :].reshape(n_ranks - n_wider, share, *shape)
    padding = [(0, 0), (0, widest - share)] + [(0, 0)] * len(shape)
    return jnp.concatenate([wider, jnp.pad(others, padding)])


def _widened(comm: TimeComm, block: Array, n_slices: int) -> Array:
    """A block filled up to the length of the widest."""
    widest = len(owned_range(n_slices, comm.size, 0))
    return jnp.pad(block, [(0, widest - block.shape[0])] + [(0, 0)] * (block.ndim - 1))
