"""Tangents of a block: what directions at the slices' starts give at their ends."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.sweeps import end_times
from nodepint_mpi.core.types import Block, Params

Numbers = TypeVar("Numbers", Array, np.ndarray, int)

DIRECTIONS_AT_ONCE = 8
"""Directions pushed through together; groups of zero rows cost nothing."""


def tangent_passes(n_directions: Numbers) -> Numbers:
    """Passes through a slice that directions take: one each, and one for the state of every group.

    Local.
    """
    return n_directions - (-n_directions // DIRECTIONS_AT_ONCE)


def propagate_directions(
    propagator: Propagator,
    params: Params,
    starts: Block,
    directions: Inexact[Array, "directions *sample"],
    owned: OwnedSlices,
    *,
    precision: str | None = None,
) -> Inexact[Array, "owned directions *state"]:
    """dF_n/du v for every owned slice and direction, the same direction for all samples. Local.

    Args:
        propagator: The propagator F, made for forward tangents (`Propagator.for_tangents`).
        params: Parameters of the vector field.
        starts: Where to linearize, (owned, *state).
        directions: Directions of one sample's state.
        owned: The slices of this rank.
        precision: Type to compute in, such as "float32"; the states' own if None.

    Returns:
        Tangents in the states' type; a tangent that is not finite is zero.
    """
    dtype = starts.dtype if precision is None else jnp.dtype(precision)
    n_directions = directions.shape[0]
    cast = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf,
        (params, starts, directions),
    )
    params, starts_, directions_ = cast
    times = end_times(owned, starts_)

    def one(direction, start, *times):
        def flow(u):
            return propagator(params, u, *times).end

        return jax.jvp(flow, (start,), (jnp.broadcast_to(direction, start.shape),))[1]

    every_slice = jax.vmap(one, in_axes=(None, *[0] * 5))

    def group(some):
        return jax.lax.cond(
            jnp.any(some != 0),
            lambda: jax.vmap(lambda v: every_slice(v, starts_, *times))(some),
            lambda: jnp.zeros((some.shape[0], *starts_.shape), dtype),
        )

    width = min(DIRECTIONS_AT_ONCE, n_directions)
    n_groups = -(-n_directions // width)
    padding = [(0, n_groups * width - n_directions)] + [(0, 0)] * (directions.ndim - 1)
    groups = jnp.pad(directions_, padding).reshape(n_groups, width, *directions.shape[1:])
    tangents = group(groups[0])[None] if n_groups == 1 else jax.lax.map(group, groups)
    tangents = tangents.reshape(n_groups * width, *starts.shape)[:n_directions]
    tangents = jnp.moveaxis(tangents, 0, 1).astype(starts.dtype)
    finite = jnp.all(jnp.isfinite(tangents), axis=tuple(range(2, tangents.ndim)), keepdims=True)
    return jnp.where(finite, tangents, 0.0)
