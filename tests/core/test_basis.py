"""A basis in rows: orthonormal to round-off, grown, merged, truncated; tangents along it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.basis import (
    along,
    combine,
    identity_directions,
    in_complement,
    lift,
    merge,
    project,
    random_directions,
    rank_for_energy,
    rows_in_use,
    transfers,
    truncate,
)
from nodepint_mpi.core.galerkin import Galerkin, ProjectedProcessor
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.propagators import AdaptiveSteps, FixedSteps, Propagator
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.sensitivity import propagate_directions
from nodepint_mpi.models.networks import make_conv, make_dense

IMAGE = (4, 3, 2)


def gram(basis):
    return np.asarray(project(basis, basis))


@pytest.mark.parametrize("sample", [(7,), IMAGE, (1,)])
def test_random_directions_are_orthonormal_and_nested(key, sample):
    rank = min(5, int(np.prod(sample)))
    basis = random_directions(key, rank, sample, jnp.float64)
    np.testing.assert_allclose(gram(basis), np.eye(rank), atol=1e-14)
    fewer = random_directions(key, max(1, rank - 2), sample, jnp.float64)
    np.testing.assert_allclose(basis[: len(fewer)], fewer, atol=1e-14)


def test_project_and_lift_keep_batches_and_images_apart(key):
    basis = random_directions(key, 3, IMAGE, jnp.float64)
    states = jax.random.normal(key, (5, 2, *IMAGE))
    coordinates = project(basis, states)
    assert coordinates.shape == (5, 2, 3)
    wanted = np.asarray(states).reshape(10, -1) @ np.asarray(basis).reshape(3, -1).T
    np.testing.assert_allclose(coordinates, wanted.reshape(5, 2, 3), atol=1e-14)
    np.testing.assert_allclose(project(basis, lift(basis, coordinates)), coordinates, atol=1e-14)
    np.testing.assert_allclose(project(basis, in_complement(basis, states)), 0, atol=1e-13)


def test_tangents_along_the_basis_and_their_transpose(key):
    keys = jax.random.split(key, 4)
    basis = random_directions(keys[0], 3, IMAGE, jnp.float64)
    tangents = jax.random.normal(keys[1], (2, 3, 5, *IMAGE))  # owned, rank, batch, sample
    c, u = jax.random.normal(keys[2], (2, 5, 3)), jax.random.normal(keys[3], (2, 5, *IMAGE))
    wanted = np.einsum("njbxyc,nbj->nbxyc", tangents, c)
    np.testing.assert_allclose(combine(tangents, c), wanted, atol=1e-13)
    forward = float(jnp.sum(combine(tangents, c) * u))
    backward = float(jnp.sum(c * along(tangents, u, 3)))
    assert forward == pytest.approx(backward, rel=1e-12)
    matrices = transfers(basis, tangents)
    assert matrices.shape == (2, 5, 3, 3)
    moved = np.einsum("nbi,nbij->nbj", c, matrices)
    np.testing.assert_allclose(moved, project(basis, combine(tangents, c)), atol=1e-13)


@pytest.mark.parametrize("n_new, n_old, rank", [(2, 3, 8), (3, 6, 6), (4, 4, 4), (6, 6, 6)])
def test_merged_bases_are_orthonormal_and_new_comes_first(key, n_new, n_old, rank):
    keys = jax.random.split(key)
    new = random_directions(keys[0], n_new, (12,), jnp.float64)
    old = random_directions(keys[1], n_old, (12,), jnp.float64)
    merged, mix = merge(new, old, rank)
    used = np.asarray(rows_in_use(merged))
    assert used.sum() == min(rank, n_new + n_old) and used[: used.sum()].all()
    np.testing.assert_allclose(gram(merged), np.diag(used.astype(float)), atol=1e-14)
    np.testing.assert_allclose(mix @ jnp.concatenate([new, old]), merged, atol=1e-12)
    np.testing.assert_allclose(in_complement(merged, new), 0, atol=1e-13)


def test_what_the_basis_already_has_is_not_taken_twice(key):
    old = random_directions(key, 4, (12,), jnp.float64)
    merged, mix = merge(old[1:3], old, 6)
    assert int(rows_in_use(merged).sum()) == 4
    np.testing.assert_allclose(in_complement(merged, old), 0, atol=1e-12)
    # A map known along the old rows is known along the merged ones.
    matrix = np.asarray(jax.random.normal(key, (12, 12)))
    given = jnp.concatenate([old[1:3], old]) @ matrix.T
    np.testing.assert_allclose(mix @ given, merged @ matrix.T, atol=1e-11)


def test_empty_rows_and_more_rows_than_the_state_has_entries(key):
    nothing = jnp.zeros((3, 2))
    merged, _ = merge(nothing, nothing, 2)
    assert not rows_in_use(merged).any() and merged.shape == (2, 2)
    both, _ = merge(nothing.at[1, 0].set(1.0), identity_directions((2,), jnp.float64), 2)
    np.testing.assert_allclose(gram(both), np.eye(2), atol=1e-15)


def test_rank_by_energy():
    energies = jnp.array([90.0, 9.0, 0.9, 0.1])
    assert [int(rank_for_energy(energies, share)) for share in (0.5, 0.9, 0.95, 1.0)] == [
        1,
        1,
        2,
        4,
    ]
    basis = identity_directions((4,), jnp.float64)
    assert rows_in_use(truncate(basis, jnp.array(2))).tolist() == [True, True, False, False]


@pytest.mark.parametrize("integrator", [FixedSteps(RK4(), 5), "adaptive"])
def test_tangents_are_the_columns_of_the_jacobian(key, integrator):
    import diffrax

    if integrator == "adaptive":
        integrator = AdaptiveSteps(diffrax.Tsit5(), rtol=1e-6, atol=1e-6)
    flow = Propagator(lambda t, u, args: jnp.sin(args * u) - u[..., ::-1], integrator)
    owned = own_slices(np.array([0.0, 0.5, 0.8]), 1, 0)
    starts = jax.random.normal(key, (2, 3, 4))  # slices, samples, state
    directions = random_directions(key, 3, (4,), jnp.float64)
    args = jnp.array(1.3)
    tangents = propagate_directions(flow.for_tangents(), args, starts, directions, owned)
    assert tangents.shape == (2, 3, 3, 4)
    times = jnp.array(owned.edges)
    for n in range(2):

        def end(u, n=n):
            propagate = flow.for_tangents()
            return propagate(args, u, times[n], times[n + 1] - times[n], jnp.zeros(0)).end

        jacobian = jax.jacfwd(end)(starts[n])
        wanted = np.einsum("bxby,jy->jbx", jacobian, directions)
        np.testing.assert_allclose(tangents[n], wanted, atol=1e-11)
    low = propagate_directions(
        flow.for_tangents(), args, starts, directions, owned, precision="float32"
    )
    assert low.dtype == starts.dtype
    error = np.max(np.abs(low - tangents))
    assert 0 < error < 1e-3


def test_zero_directions_have_zero_tangents(key):
    flow = Propagator(lambda t, u, args: -u, FixedSteps(RK4(), 2))
    owned = own_slices(np.array([0.0, 0.5]), 1, 0)
    directions = jnp.zeros((11, 3)).at[9, 1].set(1.0)
    tangents = propagate_directions(flow, None, jnp.ones((1, 3)), directions, owned)
    assert np.nonzero(np.asarray(tangents))[1].tolist() == [9]


@pytest.mark.parametrize("time_dependent", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_dense_field_takes_the_basis_into_its_outer_layers(key, time_dependent, depth):
    field = make_dense(
        key, input_shape=(9,), output_size=9, width=5, depth=depth, activation="tanh",
        time_dependent=time_dependent, positive=False,
    ).processor  # fmt: skip
    field = jax.tree.map(lambda x: x.astype(float) if hasattr(x, "astype") else x, field)
    basis = random_directions(key, 3, (9,), jnp.float64)
    c, t = jax.random.normal(key, (4, 3)), jnp.array(0.3)

    def batched(t, u, args):
        return jax.vmap(lambda sample: field(t, sample, None))(u)

    plain, absorbed = Galerkin(batched), ProjectedProcessor(None)
    wanted = plain.field(t, c, plain.reduce(None, basis))
    reduced = field.on_basis(basis)
    np.testing.assert_allclose(absorbed.field(t, c, reduced), wanted, atol=1e-13)
    largest = max(leaf.size for leaf in jax.tree.leaves(reduced) if hasattr(leaf, "size"))
    assert largest <= 25  # nothing as large as the state times the width


def test_a_conv_field_is_projected_as_it_is(key):
    field = make_conv(key, input_shape=(8, 8), output_size=2, channels=2).processor
    basis = identity_directions((2, 2, 2), jnp.float64)
    u, t = jax.random.normal(key, (1, 2, 2, 2)), jnp.array(0.1)

    def batched(t, u, args):
        return jax.vmap(lambda sample: field(t, sample, None))(u)

    plain = Galerkin(batched)
    c = project(basis, u)
    np.testing.assert_allclose(
        lift(basis, plain.field(t, c, plain.reduce(None, basis))), batched(t, u, None), atol=1e-13
    )
