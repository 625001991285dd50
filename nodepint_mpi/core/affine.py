"""Affine maps of r coordinates, x -> x M + v: applied one after the other, or made into one.

Transposed, the maps are x -> x M^T + v, and those of a horizon follow each other from the last to
the first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int

_EXACTLY = jax.lax.Precision.HIGHEST


class Affine(NamedTuple):
    """Maps with a matrix and a vector each; one without a matrix is constant."""

    matrix: Inexact[Array, "*maps rank rank"] | None
    vector: Inexact[Array, "*maps rank"]


class Walked(NamedTuple):
    """Coordinates before and after each map of a walk."""

    before: Inexact[Array, "maps *batch rank"]
    after: Inexact[Array, "maps *batch rank"]


def pack(maps: Affine, *others: Affine) -> Inexact[Array, "*maps rows rank"]:
    """As one array for a message: the rows of the matrix, and the vector below. Local.

    With `others`, maps by the same matrices, whose vectors follow.
    """
    vectors = [each.vector[..., None, :] for each in (maps, *others)]
    matrix = [] if maps.matrix is None else [maps.matrix]
    return jnp.concatenate([*matrix, *vectors], axis=-2)


def unpack(packed: Inexact[Array, "*maps rows rank"], which: int = 0, n_vectors: int = 1) -> Affine:
    """From what `pack` has made of `n_vectors` maps by the same matrices, one of them. Local."""
    n_rows = packed.shape[-2] - n_vectors
    return Affine(packed[..., :n_rows, :] if n_rows else None, packed[..., n_rows + which, :])


def apply(
    maps: Affine, x: Inexact[Array, "*maps rank"], *, transposed: bool
) -> Inexact[Array, "*maps rank"]:
    """x M + v. Local."""
    if maps.matrix is None:
        return maps.vector
    subscripts = "...j,...ij->...i" if transposed else "...i,...ij->...j"
    return jnp.einsum(subscripts, x, maps.matrix, precision=_EXACTLY) + maps.vector


def compose(first: Affine, second: Affine, *, transposed: bool) -> Affine:
    """What the second does after the first; constant if one of them is. Local."""
    vector, matrix = apply(second, first.vector, transposed=transposed), None
    if first.matrix is not None and second.matrix is not None:
        factors = (second.matrix, first.matrix) if transposed else (first.matrix, second.matrix)
        matrix = jnp.matmul(*factors, precision=_EXACTLY)
    return Affine(matrix, vector)


def compose_all(maps: Affine, *, transposed: bool) -> Affine:
    """What all do one after the other. Local."""
    one, rest = (-1, slice(None, -1)) if transposed else (0, slice(1, None))
    first = jax.tree.map(lambda part: part[one], maps)
    others = jax.tree.map(lambda part: part[rest], maps)

    def then(done, each):
        return compose(done, each, transposed=transposed), None

    return jax.lax.scan(then, first, others, reverse=transposed)[0]


def walk(
    maps: Affine | Inexact[Array, "maps *batch rows rank"],
    start: Inexact[Array, "*batch rank"],
    *,
    transposed: bool,
    which: int = 0,
    n_vectors: int = 1,
) -> Walked:
    """Apply maps, open or packed, one after the other. Local.

    Packed with others, they are those that `unpack` gives for `which` and `n_vectors`.
    """

    def advance(x, each):
        end = apply(_opened(each, which, n_vectors), x, transposed=transposed)
        return end, Walked(x, end)

    return jax.lax.scan(advance, start, maps, reverse=transposed)[1]


def walk_guarded(
    maps: Affine | Inexact[Array, "maps *batch rows rank"],
    start: Inexact[Array, "*batch rank"],
    radius: Float[Array, ""] | None,
    *,
    transposed: bool,
    which: int = 0,
    n_vectors: int = 1,
) -> tuple[Walked, Int[Array, ""]]:
    """`walk` by guarded steps, and how many of them were cut. Local."""

    def advance(x, each):
        opened = _opened(each, which, n_vectors)
        end, is_cut = step_guarded(opened, x, radius, transposed=transposed)
        return end, (Walked(x, end), is_cut)

    walked, is_cut = jax.lax.scan(advance, start, maps, reverse=transposed)[1]
    return walked, jnp.sum(is_cut)


def step_guarded(
    maps: Affine,
    x: Inexact[Array, "*maps rank"],
    radius: Float[Array, ""] | None,
    *,
    transposed: bool,
) -> tuple[Inexact[Array, "*maps rank"], Bool[Array, ""]]:
    """x M + v, or v where that is not finite; what is longer than `radius` is cut to it. Local.

    Also tells whether any sample's coordinates were changed so.
    """
    end = apply(maps, x, transposed=transposed)
    finite = jnp.all(jnp.isfinite(end), axis=-1, keepdims=True)
    end = jnp.where(finite, end, maps.vector)
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


def _opened(each: Affine | Array, which: int, n_vectors: int) -> Affine:
    return each if isinstance(each, Affine) else unpack(each, which, n_vectors)
