"""Tangents of a solve with respect to its parameters, forward in time.

Along a direction the tangent of slice n ends at

    W[n+1] = dF/dU W[n] + dF/dp dp,

which begins where the tangent of the slice before ends: rank after rank, as a serial solve does.
Called for one chunk of directions after another, ranks work on different chunks at the same time.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Inexact, PyTree

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.scopes import TANGENTS
from nodepint_mpi.core.sweeps import slice_times
from nodepint_mpi.core.types import Block, Params
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, work
from nodepint_mpi.parallel.exchange import recv_left, send_right


def push_forward(
    comm: TimeComm,
    owned: OwnedSlices,
    fine: Propagator,
    of_field: Callable[[PyTree], Params],
    params: PyTree[Array],
    starts: Block,
    *,
    directions: PyTree[Array],
    initial: Inexact[Array, "n *state"],
) -> SliceResult:
    """Tangents of the owned slices along n directions. Collective over the line, inside jit.

    Args:
        comm: Line of ranks along time.
        owned: This rank's slices.
        fine: The propagator, ready for forward-mode derivatives.
        of_field: From parameters to those of the vector field.
        params: Where the derivative is taken.
        starts: Solved states at the left edges of the owned slices.
        directions: Like `params`, with an axis (n, ...) in front; equal on all ranks.
        initial: Tangents of the first state. Read on the first rank only.

    Returns:
        Tangents of states inside the slices (owned, n, times, *state) and at their ends.
    """
    n = len(initial)

    def advance(incoming: Array, row: tuple[Array, tuple[Array, ...]]):
        start, times = row

        def one(direction: PyTree[Array], tangent: Array) -> SliceResult:
            def of_slice(params: PyTree[Array], start: Array) -> SliceResult:
                return fine(of_field(params), start, *times)

            return jax.jvp(of_slice, (params, start), (direction, tangent))[1]

        result = jax.vmap(one)(directions, incoming)
        return result.end, result

    incoming = recv_left(comm, initial)
    with work(TANGENTS, Tally(tangents=n * owned.n_owned)):
        rows = starts, tuple(slice_times(owned, starts))
        outgoing, results = jax.lax.scan(advance, incoming, rows)
    send_right(comm, outgoing)
    return results
