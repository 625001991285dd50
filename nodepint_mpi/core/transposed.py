"""Block mathematics of the adjoint: the sweeps of `core.sweeps`, transposed, from right to left.

The unknown is the cotangent at the left edge of every slice, lambda[n]. A slice pulls back what
arrives at its right edge, lambda[n+1] plus what the loss reads there, and what the loss reads
inside it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.sweeps import SliceTimes, end_times, propagate_block, slice_times
from nodepint_mpi.core.types import Block, Params, State

PullBack = Callable[[SliceResult], tuple[Params, Block]]
"""Cotangents of a block's saves and ends -> (parameter gradient, cotangents of its starts)."""


class BlockCotangents(NamedTuple):
    """Cotangents of a block: `lefts[i]` and `rights[i]` at the two edges of owned slice i.

    `lefts` holds lambda[n] and `rights` lambda[n+1], without what the loss reads there.
    """

    lefts: Inexact[Array, "owned *state"]
    rights: Inexact[Array, "owned *state"]


Retreat = Callable[[State, Any], tuple[State, BlockCotangents]]
"""One slice of a coarse walk back, for `jax.lax.scan`: the cotangent at its right edge and its row
-> that at its left edge, and both."""


def linearise_block(
    fine: Propagator,
    params: Params,
    starts: Block,
    owned: OwnedSlices,
    *,
    at_once: int | None = None,
) -> tuple[SliceResult, PullBack]:
    """Propagate a block, `at_once` slices together, and keep what its pull-back needs. Local."""

    def propagate(params, starts):
        return propagate_block(fine, params, starts, owned, at_once=at_once)

    return jax.vjp(propagate, params, starts)


def coarse_pull_back_chain(
    coarse: Propagator,
    params: Params,
    starts: Block,
    sources: SliceResult,
    incoming: State,
    owned: OwnedSlices,
    defects: Block | None = None,
) -> BlockCotangents:
    """The coarse adjoint solution of a block, from right to left. Local.

    `sources` are the cotangents of what the loss reads; `lefts[0]` goes on to the left. With
    `defects` these are added at the left edges: what the fine pull-back gives more.
    """

    rows = (starts, slice_times(owned, starts), sources, defects)
    retreat = retreat_coarse(coarse, params)
    _, cotangents = jax.lax.scan(retreat, incoming, rows, reverse=True)
    return cotangents


def retreat_coarse(coarse: Propagator, params: Params) -> Retreat:
    """A slice of `coarse_pull_back_chain`: rows are starts, times, sources, defects. Local."""

    def retreat(right, row):
        start, times, source, defect = row
        _, pull_back = jax.vjp(lambda u: coarse(params, u, *times), start)
        (left,) = pull_back(SliceResult(source.saves, source.end + right))
        left = jnp.where(jnp.all(jnp.isfinite(left)), left, right)
        left = left if defect is None else left + defect
        return left, BlockCotangents(left, right)

    return retreat


def correct_cotangents(
    coarse: Propagator,
    params: Params,
    starts: Block,
    *,
    outs: Block,
    old: BlockCotangents,
    incoming: State,
    owned: OwnedSlices,
) -> BlockCotangents:
    """The transposed parareal correction over a block, from right to left. Local.

    lambda[n] <- out[n] + (dG_n/du)^T (lambda[n+1] - lambda_old[n+1]), out[n] the fine pull-back.
    Where the coarse transpose is not finite it is left out, as in a Picard sweep.
    """

    rows = (starts, end_times(owned, starts), outs, old.rights)
    retreat = retreat_corrected(coarse, params)
    _, cotangents = jax.lax.scan(retreat, incoming, rows, reverse=True)
    return cotangents


def retreat_corrected(coarse: Propagator, params: Params) -> Retreat:
    """A slice of `correct_cotangents`: rows are starts, times, pull-backs of F, rights. Local."""

    def retreat(right, row):
        start, times, out, old_right = row
        change = pull_back_coarse(coarse, params, start, times, right - old_right)
        left = out + change
        return left, BlockCotangents(left, right)

    return retreat


def pull_back_coarse(
    coarse: Propagator, params: Params, start: State, times: SliceTimes, cotangent: State
) -> State:
    """(dG/du)^T of a cotangent at this start, zero where it is not finite. Local."""
    _, pull_back = jax.vjp(lambda u: coarse(params, u, *times).end, start)
    (change,) = pull_back(cotangent)
    return jnp.where(jnp.all(jnp.isfinite(change)), change, 0.0)
