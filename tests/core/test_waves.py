"""A field between fixed matrices: what is trained of it, and the same field on a basis."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.waves import WaveField


def make_field(key):
    keys = jax.random.split(key, 4)
    mlp = eqx.nn.MLP(3, 3, 5, 1, activation=jnp.tanh, key=keys[0])
    analysis, synthesis = jax.random.normal(keys[1], (3, 6)), jax.random.normal(keys[2], (6, 3))
    basis = jnp.linalg.qr(jax.random.normal(keys[3], (6, 4)))[0].T
    return WaveField(mlp, analysis, synthesis), basis


def test_on_a_basis_it_is_the_projected_field(key):
    field, basis = make_field(key)
    c = jnp.arange(4.0) / 4
    wanted = basis @ field(0.0, basis.T @ c, None)
    np.testing.assert_allclose(field.on_basis(basis)(0.0, c, None), wanted, rtol=1e-12)
    assert np.linalg.norm(wanted) > 0.1


def test_only_what_is_between_the_matrices_is_trained(key):
    field, _ = make_field(key)
    slope = eqx.filter_grad(lambda f: jnp.sum(f(0.0, jnp.ones(6), None) ** 2))(field)
    assert not np.any(slope.analysis) and not np.any(slope.synthesis)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slope.inner))
