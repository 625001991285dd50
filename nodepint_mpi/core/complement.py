"""Sweeps that use tangents on a basis and a classical propagator on its complement.

    C(U) - C(U_old) = (dF V) V^T delta + G(U_old + (I - V V^T) delta) - G(U_old),  delta = U - U_old

The part outside the basis makes the walk one of whole states, from slice to slice and from rank
to rank, as in parareal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from nodepint_mpi.core.basis import along, combine, in_complement, lift, project
from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.sweeps import coarse_block, end_times, finite_coarse_end
from nodepint_mpi.core.types import Block, Params, State


class Split(NamedTuple):
    """A basis (rank, *sample) with the tangents of a block along it (owned, rank, *state)."""

    basis: Inexact[Array, "rank *sample"]
    tangents: Inexact[Array, "owned rank *state"]


def walk_corrections(
    coarse: Propagator,
    params: Params,
    starts: Block,
    jumps: Block,
    split: Split,
    incoming: State,
    front: Int[Array, ""],
    owned: OwnedSlices,
) -> tuple[Block, Int[Array, ""]]:
    """Corrections at the ends of a block, from left to right, and how often one was not finite.

    Local. `jumps` are zero left of the front, where nothing is to be corrected, and a slice costs
    only its part of `coarse_block`. `incoming` is the correction at the block's start.
    """
    coarse_ends = coarse_block(coarse, params, starts, owned)

    def advance(change, row):
        times, index, start, coarse_end, jump, tangents = row

        def correct():
            inside = combine(tangents[None], project(split.basis, change)[None])[0]
            moved, _ = finite_coarse_end(
                coarse, params, start + in_complement(split.basis, change), times
            )
            end = jump + inside + (moved - coarse_end)
            finite = jnp.all(jnp.isfinite(end))
            return jnp.where(finite, end, jump), ~finite

        end, guarded = jax.lax.cond(index >= front, correct, lambda: (jump, jnp.array(False)))
        return end, (end, guarded)

    indices = jnp.asarray(owned.indices)
    rows = (end_times(owned, starts), indices, starts, coarse_ends, jumps, split.tangents)
    _, (ends, guarded) = jax.lax.scan(advance, incoming, rows)
    return ends, jnp.sum(guarded)


def walk_cocorrections(
    coarse: Propagator,
    params: Params,
    starts: Block,
    misfits: Block,
    split: Split,
    incoming: State,
    owned: OwnedSlices,
) -> tuple[Block, Block]:
    """The transpose: corrections of the cotangents at both edges, from right to left. Local.

    `misfits` are those at the left edges, `incoming` is the correction at the block's right edge.
    """
    n_sample_axes = split.basis.ndim - 1

    def retreat(change, row):
        times, start, misfit, tangents = row
        inside = lift(split.basis, along(tangents[None], change[None], n_sample_axes)[0])
        _, pull_back = jax.vjp(lambda u: coarse(params, u, *times).end, start)
        outside = in_complement(split.basis, pull_back(change)[0])
        outside = jnp.where(jnp.all(jnp.isfinite(outside)), outside, 0.0)
        left = misfit + inside + outside
        return left, (left, change)

    rows = (end_times(owned, starts), starts, misfits, split.tangents)
    _, (lefts, rights) = jax.lax.scan(retreat, incoming, rows, reverse=True)
    return lefts, rights
