"""Enlarged networks: they predict what they did, and what they carried over is where it belongs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.errors import ProblemError
from nodepint_mpi.models.growth import enlarge, sample_directions
from nodepint_mpi.models.networks import EncodeProcessDecode, Identity, make_conv, make_dense


def dense(latent, *, depth=2, time_dependent=False, seed=0):
    return make_dense(
        jax.random.key(seed), input_shape=(9,), output_size=9, width=5, depth=depth,
        activation="tanh", time_dependent=time_dependent, positive=False, latent=latent,
    )  # fmt: skip


def conv(channels, seed=0):
    return make_conv(jax.random.key(seed), input_shape=(8, 6), output_size=3, channels=channels)


def trained(model):
    """Parameters that have moved away from where they began, and everything else."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved), static


@eqx.filter_jit
def predict(params, static, x):
    """Encode, four Euler steps, decode."""
    model = eqx.combine(params, static)
    u = model.encoder(x)
    for i in range(4):
        u = u + 0.1 * model.processor(jnp.array(0.1 * i), u, None)
    return model.decoder(u)


CASES = {
    "in time": (dense(3, time_dependent=True), dense(5, time_dependent=True, seed=1), (9,)),
    "linear field": (dense(3, depth=0), dense(5, depth=0, seed=1), (9,)),
    "convolution": (conv(2), conv(5, seed=1), (8, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_enlarged_network_predicts_the_same(name):
    small, large, shape = CASES[name]
    old, old_static = trained(small)
    fresh, static = eqx.partition(large, eqx.is_inexact_array)
    directions = None
    if name != "convolution":
        rows = np.asarray(old.encoder.matrix)
        states = np.random.default_rng(0).normal(size=(20, 9))
        directions = jnp.asarray(sample_directions(rows, states, 2, jax.random.key(2)))
    params, places = enlarge(old, fresh, directions)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    x = jax.random.normal(jax.random.key(3), shape)
    wanted = predict(old, old_static, x)
    np.testing.assert_allclose(predict(params, static, x), wanted, rtol=1e-12, atol=1e-13)
    # Every old number is in its place; what is new feels the loss, so that it can learn.
    for leaf, place, new in zip(*map(jax.tree.leaves, (old, places, params)), strict=True):
        np.testing.assert_array_equal(new[np.ix_(*place.indices)], leaf)
    gradient = jax.grad(lambda p: jnp.sum(predict(p, static, x) ** 2))(params)
    decoder = jax.tree.leaves(gradient.decoder)[0]
    where = jax.tree.leaves(places.decoder)[0]
    is_new = np.ones(decoder.shape, bool)
    is_new[np.ix_(*where.indices)] = False
    assert np.any(np.abs(np.asarray(decoder)[is_new]) > 1e-8)


def test_directions_are_what_the_basis_misses():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(2, 12))
    missed = rng.normal(size=(12, 2))
    held = np.linalg.qr(rows.T)[0]
    missed = np.linalg.qr(missed - held @ (held.T @ missed))[0].T
    states = rng.normal(size=(30, 2)) @ rows + rng.normal(size=(30, 2)) * [3.0, 1.0] @ missed
    found = sample_directions(rows, states, 5, jax.random.key(0))
    assert found.shape == (5, 12)
    np.testing.assert_allclose(found @ found.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(found @ rows.T, 0, atol=1e-12)
    # The first two span what was missed; the others are random.
    np.testing.assert_allclose(np.linalg.norm(found[:2] @ missed.T, axis=1), 1, atol=1e-10)


def test_what_cannot_grow_is_said():
    with pytest.raises(ProblemError, match="cannot grow to 13 coordinates"):
        sample_directions(np.eye(3, 12), np.zeros((1, 12)), 10, jax.random.key(0))
    with pytest.raises(ProblemError, match="size 5 cannot grow to 3"):
        enlarge(trained(conv(5))[0], trained(conv(3))[0])
    own = EncodeProcessDecode(Identity(), eqx.nn.Linear(2, 2, key=jax.random.key(0)), Identity())
    with pytest.raises(ProblemError, match="not one of your own"):
        enlarge(own, own)
