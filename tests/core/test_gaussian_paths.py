"""Gaussian paths against the closed forms of normal data, and solves against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.gaussian_paths import StraightLine, VariancePreserving, gaussian_path_of

PATHS = {"straight": StraightLine(), "variance preserving": VariancePreserving()}
SPREAD = 0.5
"""Standard deviation of the data; their mean is 0."""


def spread_at(path, t):
    return jnp.sqrt(path.alpha(t) ** 2 * SPREAD**2 + path.sigma(t) ** 2)


def mean_velocity(path, t, x):
    """Normal data stay normal: the state grows as its standard deviation does."""
    return jax.grad(lambda t: jnp.log(spread_at(path, t)))(t) * x


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_conversions(path):
    t, data, noise = jnp.array(0.37), jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
    x, velocity = path.at(t, data, noise)
    np.testing.assert_allclose(x, path.alpha(t) * data + path.sigma(t) * noise, rtol=1e-15)
    np.testing.assert_allclose(path.noise(t, x, velocity), noise, rtol=1e-12)
    np.testing.assert_allclose(path.velocity(t, x, noise), velocity, rtol=1e-12)
    later = path.at(t + 1e-6, data, noise)[0], path.at(t - 1e-6, data, noise)[0]
    np.testing.assert_allclose((later[0] - later[1]) / 2e-6, velocity, rtol=1e-6)
    velocity = mean_velocity(path, t, x)
    np.testing.assert_allclose(path.score(t, x, velocity), -x / spread_at(path, t) ** 2, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_stochastic_equation_has_the_same_distributions(path):
    """The variance s^2 of a linear equation obeys d(s^2)/dt = 2 a s^2 + g^2."""
    t = jnp.array(0.6)
    slope = jax.grad(lambda t: spread_at(path, t) ** 2)(t)
    drift = path.stochastic_drift(t, jnp.array(1.0), mean_velocity(path, t, jnp.array(1.0)))
    expected = 2 * drift * spread_at(path, t) ** 2 + path.diffusion(t) ** 2
    np.testing.assert_allclose(expected, slope, rtol=1e-10)


def test_rate_of_noising():
    """alpha' / alpha = beta / 2 where alpha^2 + sigma^2 = 1."""
    path, t = VariancePreserving(), jnp.array(0.25)
    np.testing.assert_allclose(path.beta(t), 0.1 + 19.9 * 0.75, rtol=1e-14)
    slope = jax.grad(lambda t: jnp.log(path.alpha(t)))(t)
    np.testing.assert_allclose(path.beta(t) / 2, slope, rtol=1e-12)
    np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1.0, rtol=1e-14)


def test_end_of_the_straight_line():
    """The drift is finite where sigma is zero, and a field says which path it is of."""
    drift = StraightLine().stochastic_drift(1.0, jnp.array([2.0]), jnp.array([0.5]))
    np.testing.assert_allclose(drift, [0.5 - (2.0 - 0.5)], rtol=1e-15)

    class Field:
        path = VariancePreserving(beta_max=5.0)

    assert gaussian_path_of(Field()) is Field.path
    assert isinstance(gaussian_path_of(lambda t, u, args: u), StraightLine)
