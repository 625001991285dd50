"""Leading directions by reductions: NumPy's singular vectors of what no rank has in one place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.basis import rows_in_use
from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.parallel.directions import (
    leading_directions,
    orthonormality_defect,
    relative_misfit,
)

pytestmark = pytest.mark.timeout_s(180)

N, SAMPLE = 30, (5, 4)


def snapshots(n=N, *, rank=20, noise=0.0):
    rng = np.random.default_rng(1)
    size = int(np.prod(SAMPLE))
    values = rng.normal(size=(n, rank)) * 0.5 ** np.arange(rank) @ rng.normal(size=(rank, size))
    return (values + noise * rng.normal(size=(n, size))).reshape(n, *SAMPLE)


def find(comm, values, rank):
    own = np.array(list(owned_range(len(values), comm.size, comm.rank)), dtype=int)
    found = jax.jit(lambda v, i: leading_directions(comm, jax.random.key(3), v, i, rank))
    return found(jnp.asarray(values[own]), jnp.asarray(own)), jnp.asarray(values[own])


def test_directions_and_energies_are_those_of_the_svd(comms):
    values = snapshots()
    (vectors, energies), own = find(comms.time, values, 6)
    _, singular, right = np.linalg.svd(values.reshape(N, -1), full_matrices=False)
    np.testing.assert_allclose(energies, singular[:6] ** 2, rtol=1e-2)
    inner = np.abs(right[:4] @ np.asarray(vectors).reshape(6, -1)[:4].T)
    np.testing.assert_allclose(inner, np.eye(4), atol=3e-2)
    best = np.sqrt(np.sum(singular[6:] ** 2) / np.sum(singular**2))
    missed = jax.jit(lambda v, u: relative_misfit(comms.time, v, u))(vectors, own)
    assert best <= float(missed) * (1 + 1e-12) and float(missed) < 1.1 * best
    assert float(orthonormality_defect(vectors)) < 1e-14


def test_all_ranks_have_the_same_bits_and_the_layout_does_not_matter(comms, on_one_rank):
    from nodepint_mpi.parallel.comms import alone, make_time_comm

    values = snapshots()
    (vectors, _), _ = find(comms.time, values, 4)
    bits = np.asarray(vectors).tobytes()
    assert comms.control.allgather(bits) == [bits] * comms.control.size
    emulated = on_one_rank(lambda: np.asarray(find(make_time_comm(alone()), values, 4)[0][0]))
    np.testing.assert_allclose(vectors, emulated, atol=1e-9)


def test_dependent_snapshots_leave_rows_empty(comms):
    (vectors, energies), _ = find(comms.time, snapshots(rank=3), 8)
    assert rows_in_use(vectors).tolist() == [True] * 3 + [False] * 5
    assert np.all(np.asarray(energies[3:]) == 0)
    assert float(orthonormality_defect(vectors)) < 1e-13


@pytest.mark.parametrize("n", [1, 2, 5])  # fewer than ranks: some have none
def test_ranks_without_snapshots_take_part(comms, n):
    values = snapshots(n)
    (vectors, _), _ = find(comms.time, values, 5)
    assert int(rows_in_use(vectors).sum()) == n


def test_nothing_and_nonsense_give_no_direction(comms):
    values = snapshots(6)
    values[:] = np.nan
    (vectors, energies), _ = find(comms.time, values, 3)
    assert not rows_in_use(vectors).any() and not np.any(energies)
    values = snapshots(6, rank=2)
    values[0] = np.inf
    (vectors, _), _ = find(comms.time, values, 3)
    assert int(rows_in_use(vectors).sum()) == 2 and np.all(np.isfinite(vectors))
