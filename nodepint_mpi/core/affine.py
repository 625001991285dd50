"""Affine maps of r coordinates, x -> x M + v: applied one after the other, or made into one.

A map is one array (*batch, rows, rank): the rows of M, and v below them, so that it travels as one
message and composing is one product. A map that has the row v alone is constant: what comes before
it does not matter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int


class Walked(NamedTuple):
    """Coordinates before and after each map of a walk."""

    before: Inexact[Array, "maps *batch rank"]
    after: Inexact[Array, "maps *batch rank"]


def affine_maps(
    matrices: Inexact[Array, "*batch rank rank"], vectors: Inexact[Array, "*batch rank"]
) -> Inexact[Array, "*batch rows rank"]:
    """The maps x -> x M + v. Local."""
    return jnp.concatenate([matrices, vectors[..., None, :]], axis=-2)


def apply(
    maps: Inexact[Array, "*batch rows rank"], x: Inexact[Array, "*batch rank"]
) -> Inexact[Array, "*batch rank"]:
    """x M + v. Local."""
    moved = jnp.einsum(
        "...i,...ij->...j", x, maps[..., :-1, :], precision=jax.lax.Precision.HIGHEST
    )
    return moved + maps[..., -1, :]


def compose(
    first: Inexact[Array, "*batch rows rank"], second: Inexact[Array, "*batch all_rows rank"]
) -> Inexact[Array, "*batch rows rank"]:
    """The map that does what two do, one after the other; `first` may be constant. Local."""
    both = jnp.matmul(first, second[..., :-1, :], precision=jax.lax.Precision.HIGHEST)
    return both.at[..., -1, :].add(second[..., -1, :])


def compose_all(
    maps: Inexact[Array, "maps *batch rows rank"], *, reverse: bool
) -> Inexact[Array, "*batch rows rank"]:
    """The map that does what all do, from the first to the last or in `reverse`. Local."""
    first, others = (maps[-1], maps[:-1]) if reverse else (maps[0], maps[1:])

    def then(done, each):
        return compose(done, each), None

    return jax.lax.scan(then, first, others, reverse=reverse)[0]


def walk(
    maps: Inexact[Array, "maps *batch rows rank"],
    start: Inexact[Array, "*batch rank"],
    *,
    reverse: bool,
) -> Walked:
    """Apply the maps one after the other, from the first to the last or in `reverse`. Local."""

    def advance(x, each):
        end = apply(each, x)
        return end, Walked(x, end)

    return jax.lax.scan(advance, start, maps, reverse=reverse)[1]


def walk_guarded(
    maps: Inexact[Array, "maps *batch rows rank"],
    start: Inexact[Array, "*batch rank"],
    radius: Float[Array, ""] | None,
    *,
    reverse: bool,
) -> tuple[Walked, Int[Array, ""]]:
    """`walk` by guarded steps, and how many of them were cut. Local."""

    def advance(x, each):
        end, is_cut = step_guarded(each, x, radius)
        return end, (Walked(x, end), is_cut)

    walked, is_cut = jax.lax.scan(advance, start, maps, reverse=reverse)[1]
    return walked, jnp.sum(is_cut)


def step_guarded(
    maps: Inexact[Array, "*batch rows rank"],
    x: Inexact[Array, "*batch rank"],
    radius: Float[Array, ""] | None,
) -> tuple[Inexact[Array, "*batch rank"], Bool[Array, ""]]:
    """x M + v, or v where that is not finite; what is longer than `radius` is cut to it. Local.

    Also tells whether any sample's coordinates were changed so.
    """
    end = apply(maps, x)
    finite = jnp.all(jnp.isfinite(end), axis=-1, keepdims=True)
    end = jnp.where(finite, end, maps[..., -1, :])
    if radius is None:
        return end, jnp.any(~finite)
    length = jnp.linalg.norm(end, axis=-1, keepdims=True)
    outside = length > radius
    cut = jnp.where(outside, end * (radius / jnp.where(outside, length, 1.0)), end)
    return cut, jnp.any(outside | ~finite)


def needs_guard(
    after: Inexact[Array, "*maps rank"], radius: Float[Array, ""] | None
) -> Bool[Array, ""]:
    """Whether guarded steps would have changed anything in a walk that gave these. Local."""
    finite = jnp.all(jnp.isfinite(after))
    if radius is None:
        return ~finite
    return ~finite | jnp.any(jnp.linalg.norm(after, axis=-1) > radius)
