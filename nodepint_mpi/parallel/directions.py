"""Directions that hold most of what snapshots on all ranks show, by reductions alone.

No rank ever holds another rank's snapshots: what travels are sums of shape (directions, *sample).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int, PRNGKeyArray

from nodepint_mpi.core.basis import lift, project, rows_in_use
from nodepint_mpi.core.scopes import FACTOR, SNAPSHOTS, scope
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.exchange import sum_over_ranks

OVERSAMPLING = 8
POWER_ITERATIONS = 1


class Directions(NamedTuple):
    """Orthonormal rows with the snapshots' energy along each, the largest first; zero rows last.

    `energies` are squared singular values of the snapshots.
    """

    vectors: Inexact[Array, "rank *sample"]
    energies: Float[Array, " rank"]


def leading_directions(
    comm: TimeComm,
    key: PRNGKeyArray,
    snapshots: Inexact[Array, "snapshots *sample"],
    numbers: Int[Array, " snapshots"],
    rank: int,
) -> Directions:
    """The leading left singular vectors of all ranks' snapshots. Collective, inside jit.

    A randomized range finder: equal on all ranks bit by bit, and to round-off whatever the number
    of ranks. Fewer independent snapshots than `rank` leave zero rows; snapshots that are not
    finite are left out.

    Args:
        comm: Line of ranks along time.
        key: Equal on all ranks.
        snapshots: This rank's own, (snapshots, *sample); may be none.
        numbers: Their numbers in the whole set, which the random weights depend on.
        rank: How many directions.

    Reference:
        Halko, Martinsson, Tropp (2011), SIAM Review 53, 217-288, algorithms 4.4 and 5.1.
    """
    sample, dtype = snapshots.shape[1:], snapshots.dtype
    size = math.prod(sample)
    n_probes = min(rank + OVERSAMPLING, size)

    def weights(number):
        return jax.random.normal(jax.random.fold_in(key, number), (n_probes,), dtype)

    with scope(SNAPSHOTS):
        flat = snapshots.reshape(-1, size)
        finite = jnp.all(jnp.isfinite(flat), axis=1, keepdims=True)
        flat = jnp.where(finite, flat, 0.0)
        shown = jax.vmap(weights)(numbers).T @ flat
    probes = sum_over_ranks(comm, shown)
    for _ in range(POWER_ITERATIONS):
        with scope(FACTOR):
            rows = _orthonormal(probes).T
        with scope(SNAPSHOTS):
            shown = (flat @ rows).T @ flat
        probes = sum_over_ranks(comm, shown)
    with scope(FACTOR):
        basis = _orthonormal(probes)
    with scope(SNAPSHOTS):
        inside = flat @ basis.T
        gram = inside.T @ inside
    gram = sum_over_ranks(comm, gram)
    with scope(FACTOR):
        energies, rotation = jnp.linalg.eigh(gram)
        energies, rotation = energies[::-1][:rank], rotation[:, ::-1][:, :rank]
        noise = n_probes * jnp.finfo(dtype).eps
        real = (energies > noise * energies[0]) & (energies > 0)
        vectors = jnp.where(real[:, None], rotation.T @ basis, 0.0)
        padding = max(0, rank - n_probes)
        vectors = jnp.pad(vectors, [(0, padding), (0, 0)])
        energies = jnp.pad(jnp.where(real, energies, 0.0), [(0, padding)])
    return Directions(vectors.reshape(rank, *sample), energies)


def orthonormality_defect(basis: Inexact[Array, "rank *sample"]) -> Float[Array, ""]:
    """Largest entry of |V^T V - I| over the rows in use. Local."""
    gram = project(basis, basis)
    return jnp.max(jnp.abs(gram - jnp.diag(rows_in_use(basis).astype(gram.dtype))))


def relative_misfit(
    comm: TimeComm,
    basis: Inexact[Array, "rank *sample"],
    snapshots: Inexact[Array, "snapshots *sample"],
) -> Float[Array, ""]:
    """What of the snapshots of all ranks lies outside the basis, relative. Collective."""
    outside = snapshots - lift(basis, project(basis, snapshots))
    squares = jnp.stack([jnp.sum(outside**2), jnp.sum(snapshots**2)])
    missed, total = sum_over_ranks(comm, squares)
    return jnp.sqrt(missed / jnp.where(total > 0, total, 1.0))


def _orthonormal(rows: Array) -> Array:
    """Orthonormal rows with the same span; what is dependent is filled up with anything."""
    largest = jnp.max(jnp.abs(rows))
    scaled = rows / jnp.where(largest > 0, largest, 1.0)
    return jnp.linalg.qr(scaled.T)[0].T
