"""No iteration: slice after slice, rank after rank. The baseline, by the same code."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.scopes import FINE_ADJOINT, FINE_FORWARD
from nodepint_mpi.core.sweeps import BlockStates, chain_block
from nodepint_mpi.core.transposed import PullBack
from nodepint_mpi.core.types import Params, State
from nodepint_mpi.parallel.counters import Tally, work
from nodepint_mpi.parallel.exchange import recv_left, recv_right, send_left, send_right
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.picard import Picard


class Serial(Picard):
    """What Picard's sweeps come to in the end, by one walk through the slices instead."""

    iterates: ClassVar[bool] = False


class Walk(NamedTuple):
    """A serial forward pass and what its pull-back needs."""

    states: BlockStates
    result: SliceResult
    pull_back: PullBack


class WalkBack(NamedTuple):
    """This rank's part of the gradient of the parameters, and the cotangent that leaves it."""

    params: Params
    left: Inexact[Array, "*state"]


def walk(line: Line, fine: Propagator, initial: State) -> tuple[BlockStates, SliceResult]:
    """Propagate slice after slice and rank after rank. Collective, inside jit."""
    incoming = recv_left(line.comm, initial)
    with work(FINE_FORWARD, Tally(fine=line.owned.n_owned)):
        starts, result = chain_block(fine, line.params, incoming, line.owned)
    send_right(line.comm, result.end[-1])
    return BlockStates(starts, result.end), result


def walk_linearized(line: Line, fine: Propagator, initial: State) -> Walk:
    """The same, ready to be pulled back. Collective, inside jit."""

    def propagate(params, incoming):
        starts, result = chain_block(fine, params, incoming, line.owned)
        return result, starts

    incoming = recv_left(line.comm, initial)
    with work(FINE_FORWARD, Tally(fine=line.owned.n_owned)):
        result, pull_back, starts = jax.vjp(propagate, line.params, incoming, has_aux=True)
    send_right(line.comm, result.end[-1])
    return Walk(BlockStates(starts, result.end), result, pull_back)


def walk_back(line: Line, walked: Walk, sources: SliceResult) -> WalkBack:
    """Pull back rank after rank, from the last to the first. Collective, inside jit."""
    incoming = recv_right(line.comm, jnp.zeros_like(sources.end[-1]))
    end = sources.end.at[-1].add(incoming)
    with work(FINE_ADJOINT, Tally(fine_pulled=len(end))):
        params_bar, left = walked.pull_back(SliceResult(sources.saves, end))
    send_left(line.comm, left)
    return WalkBack(params_bar, left)
