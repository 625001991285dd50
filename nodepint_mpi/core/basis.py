"""A reduced basis: orthonormal directions of the state, one to a row, shared by all samples.

A basis of rank r is an array (r, *sample), where `sample` is the shape of one sample's state; it
is never flattened by its users. Rows that are not in use are zero, so that a basis which grows
keeps its shape under jit: a zero row has zero coefficients and drops out of every formula.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int, PRNGKeyArray

SAME_DIRECTION = 0.1
"""Sine of the angle below which a direction counts as one that the basis already has."""


class Merged(NamedTuple):
    """A basis made of others' rows: `vectors = mix @ concatenate([new, old])`.

    Whatever is linear in the basis, such as tangents, goes along by the same `mix`.
    """

    vectors: Inexact[Array, "rank *sample"]
    mix: Inexact[Array, "rank given"]


def project(
    basis: Inexact[Array, "rank *sample"], states: Inexact[Array, "..."]
) -> Inexact[Array, "..."]:
    """V^T u for every state: (..., *sample) -> (..., rank). Local."""
    n_axes = basis.ndim - 1
    state_axes = tuple(range(states.ndim - n_axes, states.ndim))
    axes = state_axes, tuple(range(1, basis.ndim))
    return jnp.tensordot(states, basis, axes=axes, precision=jax.lax.Precision.HIGHEST)


def lift(
    basis: Inexact[Array, "rank *sample"], coordinates: Inexact[Array, "..."]
) -> Inexact[Array, "..."]:
    """V c: (..., rank) -> (..., *sample). Local."""
    return jnp.tensordot(coordinates, basis, axes=1, precision=jax.lax.Precision.HIGHEST)


def in_complement(
    basis: Inexact[Array, "rank *sample"], states: Inexact[Array, "..."]
) -> Inexact[Array, "..."]:
    """(I - V V^T) u for every state. Local."""
    return states - lift(basis, project(basis, states))


def rows_in_use(basis: Inexact[Array, "rank *sample"]) -> Bool[Array, " rank"]:
    """Which rows are directions, and not zero. Local."""
    return jnp.any(basis != 0, axis=tuple(range(1, basis.ndim)))


def transfers(
    basis: Inexact[Array, "rank *sample"], tangents: Inexact[Array, "owned rank *state"]
) -> Inexact[Array, "owned *batch rank rank"]:
    """The r x r matrices V^T dF V of a block, one for each slice and sample. Local.

    Entry [..., i, j] is what direction i at a slice's start gives along direction j at its end.
    """
    return jnp.moveaxis(project(basis, tangents), 1, -2)


def combine(
    tangents: Inexact[Array, "owned rank *state"], coordinates: Inexact[Array, "owned *batch rank"]
) -> Inexact[Array, "owned *state"]:
    """dF V c of a block: what coordinates at the starts give at the ends. Local."""
    weights = jnp.moveaxis(coordinates, -1, 1)
    weights = weights.reshape(weights.shape + (1,) * (tangents.ndim - weights.ndim))
    return jnp.sum(tangents * weights, axis=1)


def along(
    tangents: Inexact[Array, "owned rank *state"],
    states: Inexact[Array, "owned *state"],
    n_sample_axes: int,
) -> Inexact[Array, "owned *batch rank"]:
    """(dF V)^T u of a block: the transpose of `combine`. Local."""
    axes = tuple(range(tangents.ndim - n_sample_axes, tangents.ndim))
    return jnp.moveaxis(jnp.sum(tangents * states[:, None], axis=axes), 1, -1)


def merge(
    new: Inexact[Array, "new *sample"], old: Inexact[Array, "old *sample"], rank: int
) -> Merged:
    """An orthonormal basis of at most `rank` rows: the new ones first, then as many old as fit.

    Local. Each given basis has orthonormal or zero rows. A direction closer than
    `SAME_DIRECTION` to the span of those before it is left out; rows in use come first.

    Reference:
        Gram-Schmidt, each row twice: Giraud, Langou, Rozloznik (2005), Computers and Mathematics
        with Applications 50, 1069-1075.
    """
    sample = new.shape[1:]
    rows = jnp.concatenate([new, old]).reshape(new.shape[0] + old.shape[0], -1)
    n_rows = rows.shape[0]

    def orthogonalise(i, done):
        vectors, mix = done
        row, weights = rows[i], jnp.zeros(n_rows, rows.dtype).at[i].set(1.0)
        for _ in range(2):
            overlaps = jnp.matmul(vectors, row, precision=jax.lax.Precision.HIGHEST)
            row, weights = row - overlaps @ vectors, weights - overlaps @ mix
        length = jnp.linalg.norm(row)
        own = length > SAME_DIRECTION
        scale = jnp.where(own, 1 / jnp.where(own, length, 1.0), 0.0)
        # Once more after scaling: the row may have been short.
        row, weights = row * scale, weights * scale
        overlaps = jnp.matmul(vectors, row, precision=jax.lax.Precision.HIGHEST)
        return vectors.at[i].set(row - overlaps @ vectors), mix.at[i].set(weights - overlaps @ mix)

    nothing = jnp.zeros_like(rows), jnp.zeros((n_rows, n_rows), rows.dtype)
    vectors, mix = jax.lax.fori_loop(0, n_rows, orthogonalise, nothing)
    order = jnp.argsort(~jnp.any(vectors != 0, axis=1), stable=True)[:rank]
    padding = [(0, max(0, rank - n_rows)), (0, 0)]
    vectors, mix = (jnp.pad(part[order], padding) for part in (vectors, mix))
    return Merged(vectors.reshape(rank, *sample), mix)


def random_directions(
    key: PRNGKeyArray, rank: int, sample: tuple[int, ...], dtype
) -> Float[Array, "rank *sample"]:
    """Orthonormal random directions; the first ones stay the same when the rank grows. Local."""
    size = math.prod(sample)
    draw = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), (size,), dtype))
    orthogonal, upper = jnp.linalg.qr(draw(jnp.arange(rank)).T)
    signs = jnp.where(jnp.diag(upper) < 0, -1.0, 1.0).astype(dtype)
    return (orthogonal * signs[None]).T.reshape(rank, *sample)


def identity_directions(sample: tuple[int, ...], dtype) -> Float[Array, "rank *sample"]:
    """Every coordinate a direction: the rank is the state's size. Local."""
    size = math.prod(sample)
    return jnp.eye(size, dtype=dtype).reshape(size, *sample)


def rank_for_energy(energies: Float[Array, " rank"], fraction: float) -> Int[Array, ""]:
    """How many leading directions hold `fraction` of the snapshots' sum of squares. Local.

    Args:
        energies: Squared singular values, the largest first.
        fraction: Wanted share, in (0, 1].
    """
    held = jnp.cumsum(energies)
    return jnp.minimum(jnp.sum(held < fraction * held[-1]) + 1, energies.shape[0])


def truncate(
    basis: Inexact[Array, "rank *sample"], rank: Int[Array, ""]
) -> Inexact[Array, "rank *sample"]:
    """Keep the first `rank` rows and zero the others. Local."""
    keep = (jnp.arange(basis.shape[0]) < rank).reshape(-1, *[1] * (basis.ndim - 1))
    return jnp.where(keep, basis, 0.0)
