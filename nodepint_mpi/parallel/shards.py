"""Messages of all ranks of the grid about arrays that are dealt over them. Identity on one rank.

As those of `parallel.exchange`, inside jitted code only, on all ranks in the same order.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import mpi4jax
from jaxtyping import Array
from mpi4py import MPI

from nodepint_mpi.core.scopes import GRID, REDUCE
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import message
from nodepint_mpi.parallel.operations import (
    GATHER_SHARDS,
    ON_FIRST,
    REDUCE_SCATTER,
    TO_GRID,
    Call,
    record,
)


def reduce_scatter(comm: TimeComm, blocks: Array) -> Array:
    """The sum over all ranks of one's own block, of blocks (ranks, ...). Collective over the grid.

    Every block is summed on one rank, in an order that the number of ranks fixes: first those of
    neighbors, so that most bytes go the shortest way. Of D numbers a rank sends (P - 1) / P, in
    as many messages as the prime factors of P less one each add up to: log2(P) for powers of two.

    Reference:
        Thakur, Rabenseifner, Gropp (2005), Int. J. High Performance Computing Applications 19,
        49-66, section 4.3 (recursive halving), with any factor in the place of two.
    """
    n_ranks, rank = comm.n_grid, comm.grid_rank
    if n_ranks == 1:
        return blocks[0]
    record(Call(REDUCE_SCATTER, blocks.nbytes))
    stride = 1
    for factor in _prime_factors(n_ranks):
        digit = rank // stride % factor
        # Blocks left are those whose ranks end in the digits of this one: by the next digit.
        left = jnp.moveaxis(blocks.reshape(-1, factor, *blocks.shape[1:]), 1, 0)
        parts = {digit: left[digit]}
        for turn in range(1, factor):
            to, source = (digit + turn) % factor, (digit - turn) % factor
            with message(REDUCE, GRID, left[to]):
                parts[source] = mpi4jax.sendrecv(
                    left[to],
                    jnp.zeros_like(left[to]),
                    rank + (source - digit) * stride,
                    rank + (to - digit) * stride,
                    comm=comm.grid,
                )
        blocks = parts[0]
        for source in range(1, factor):
            blocks = blocks + parts[source]
        stride *= factor
    return blocks[0]


def gather_shards(comm: TimeComm, shard: Array) -> Array:
    """The shards of all ranks, (ranks, ...), on all of them. Collective over the grid."""
    if comm.n_grid == 1:
        return shard[None]
    record(Call(GATHER_SHARDS, shard.nbytes))
    with message(REDUCE, GRID, shard):
        return mpi4jax.allgather(shard, comm=comm.grid)


def sum_on_first(comm: TimeComm, flat: Array) -> Array | None:
    """The sum over all ranks, on rank 0; None on the others. Collective over the grid."""
    if comm.n_grid == 1:
        return flat
    record(Call(ON_FIRST, flat.nbytes))
    with message(REDUCE, GRID, *([flat] if comm.grid_rank > 0 else [])):
        total = mpi4jax.reduce(flat, MPI.SUM, 0, comm=comm.grid)
    return total if comm.grid_rank == 0 else None


def from_first(comm: TimeComm, value: Array) -> Array:
    """What rank 0 has, on all ranks. Collective over the grid."""
    if comm.n_grid == 1:
        return value
    record(Call(TO_GRID, value.nbytes))
    with message(REDUCE, GRID, *([value] if comm.grid_rank == 0 else [])):
        return mpi4jax.bcast(value, 0, comm=comm.grid)


def _prime_factors(number: int) -> Iterator[int]:
    """In ascending order."""
    factor = 2
    while number > 1:
        while number % factor == 0:
            yield factor
            number //= factor
        factor += 1
