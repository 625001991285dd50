"""The coarse problem: the first rank ties the slices together in r coordinates.

It receives r-vectors and r x r matrices, one for each slice and sample, and never a state. The
forward recurrence runs from left to right, the adjoint one through the transposes of the same
matrices from right to left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.scopes import COARSE, scope
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.exchange import bcast_from, gather_to_first, scatter_from_first


class Coordinates(NamedTuple):
    """Coordinates at the starts of the owned slices, and on how many slices they were cut.

    `n_damped` counts slices where the radius was exceeded or a number not finite; it is known on
    the first rank only.
    """

    at_starts: Inexact[Array, "owned *batch rank"]
    n_damped: Int[Array, ""]


def solve_coordinates(
    comm: TimeComm,
    transfers: Inexact[Array, "owned *batch rank rank"],
    residuals: Inexact[Array, "owned *batch rank"],
    radius: Float[Array, ""] | None,
    owned: OwnedSlices,
) -> Coordinates:
    """c_0 = 0, c_{n+1} = A_n^T c_n + beta_n on the first rank. Collective over `comm`, inside jit.

    Args:
        comm: Line of ranks along time.
        transfers: A_n of the owned slices, from `core.basis.transfers`.
        residuals: beta_n = V^T b_n, the jumps at the ends of the owned slices.
        radius: Largest norm of a sample's coordinates; what is longer is cut to it, since a
            linear model means nothing that far away. No bound if None.
        owned: The slices of this rank.
    """
    matrices = gather_to_first(comm, transfers, owned.n_slices)
    vectors = gather_to_first(comm, residuals, owned.n_slices)
    every, n_damped = None, jnp.array(0)
    if matrices is not None and vectors is not None:

        def advance(c, row):
            matrix, vector = row
            end = jnp.einsum("...i,...ij->...j", c, matrix) + vector
            end, cut = _bounded(end, vector, radius)
            return end, (c, cut)

        with scope(COARSE):
            _, (every, cut) = jax.lax.scan(advance, jnp.zeros_like(vectors[0]), (matrices, vectors))
        n_damped = jnp.sum(cut)
    return Coordinates(scatter_from_first(comm, every, residuals, owned.n_slices), n_damped)


class Cocoordinates(NamedTuple):
    """Coordinates of the adjoint correction at both edges of the owned slices."""

    at_lefts: Inexact[Array, "owned *batch rank"]
    at_rights: Inexact[Array, "owned *batch rank"]


def solve_cocoordinates(
    comm: TimeComm,
    transfers: Inexact[Array, "owned *batch rank rank"],
    residuals: Inexact[Array, "owned *batch rank"],
    owned: OwnedSlices,
) -> Cocoordinates:
    """e_N = 0, e_n = A_n e_{n+1} + sigma_n on the first rank. Collective, inside jit.

    Args:
        comm: Line of ranks along time.
        transfers: The A_n of the forward sweep.
        residuals: sigma_n, the residuals at the right edges seen along the tangents.
        owned: The slices of this rank.
    """
    matrices = gather_to_first(comm, transfers, owned.n_slices)
    vectors = gather_to_first(comm, residuals, owned.n_slices)
    lefts, rights = None, None
    if matrices is not None and vectors is not None:

        def retreat(e, row):
            matrix, vector = row
            left = jnp.einsum("...ij,...j->...i", matrix, e) + vector
            left, _ = _bounded(left, vector, None)
            return left, (left, e)

        first = jnp.zeros_like(vectors[0])
        with scope(COARSE):
            _, (lefts, rights) = jax.lax.scan(retreat, first, (matrices, vectors), reverse=True)
    return Cocoordinates(
        scatter_from_first(comm, lefts, residuals, owned.n_slices),
        scatter_from_first(comm, rights, residuals, owned.n_slices),
    )


def count_on_first(comm: TimeComm, count: Int[Array, ""]) -> Int[Array, ""]:
    """A count of the first rank, on all ranks. Collective."""
    return bcast_from(comm, count, 0)


def _bounded(end: Array, restart: Array, radius: Array | None) -> tuple[Array, Array]:
    """Each sample's coordinates within the radius; from `restart` again where not finite."""
    finite = jnp.all(jnp.isfinite(end), axis=-1, keepdims=True)
    end = jnp.where(finite, end, restart)
    if radius is None:
        return end, jnp.any(~finite)
    length = jnp.linalg.norm(end, axis=-1, keepdims=True)
    outside = length > radius
    return jnp.where(outside, end * (radius / jnp.where(outside, length, 1.0)), end), jnp.any(
        outside | ~finite
    )
