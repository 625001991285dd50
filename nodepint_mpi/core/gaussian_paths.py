"""Gaussian paths from noise to data: what diffusion models and flow matching have in common.

At time t the state is x = alpha(t) y + sigma(t) z, of a sample y of the data and standard normal
noise z; t runs from 0, noise, to 1, data. The mean velocity of x given its value carries one
distribution to the other as an ordinary equation, the probability-flow equation, and with its score
and any diffusion as a stochastic one.

References:
    Song et al. (2021), Score-based generative modeling through stochastic differential equations.
    Lipman et al. (2023), Flow matching for generative modeling.
    Albergo, Boffi, Vanden-Eijnden (2023), Stochastic interpolants.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Time = Float[Array, ""] | float
State = Float[Array, "*state"]


class AbstractGaussianPath(eqx.Module):
    """Coefficients alpha and sigma of data and noise; conversions between velocity and noise.

    A subclass gives `alpha`, `sigma` and `diffusion`; all take one time.
    """

    @abstractmethod
    def alpha(self, t: Time) -> Array:
        """The coefficient of the data: about 0 at t = 0, and 1 at t = 1."""

    @abstractmethod
    def sigma(self, t: Time) -> Array:
        """The coefficient of the noise: 1 at t = 0, and 0 at t = 1."""

    @abstractmethod
    def diffusion(self, t: Time) -> Array:
        """g(t) of the stochastic equation: any choice leads to the same distribution."""

    def at(self, t: Time, data: State, noise: State) -> tuple[State, State]:
        """The state at time t on the path from `noise` to `data`, and its velocity. Local."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        return alpha * data + sigma * noise, d_alpha * data + d_sigma * noise

    def noise(self, t: Time, x: State, velocity: State) -> State:
        """The mean noise in x, from the mean velocity there. Local."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        return (alpha * velocity - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)

    def velocity(self, t: Time, x: State, noise: State) -> State:
        """The mean velocity in x, from the mean noise there; alpha must not be 0. Local."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        return (d_alpha * x + (alpha * d_sigma - d_alpha * sigma) * noise) / alpha

    def score(self, t: Time, x: State, velocity: State) -> State:
        """The gradient of the log density of x; sigma must not be 0. Local."""
        return -self.noise(t, x, velocity) / self.sigma(t)

    def stochastic_drift(self, t: Time, x: State, velocity: State) -> State:
        """The drift that goes with `diffusion`: velocity + g^2 / 2 score. Local.

        Reference:
            Song et al. (2021), equations (6) and (13).
        """
        return velocity + jnp.square(self.diffusion(t)) / 2 * self.score(t, x, velocity)

    def coefficients(self, t: Time) -> tuple[Array, Array, Array, Array]:
        """alpha, sigma and their derivatives. Local."""
        t = jnp.asarray(t, jnp.result_type(t, float))
        alpha, d_alpha = jax.jvp(self.alpha, (t,), (jnp.ones_like(t),))
        sigma, d_sigma = jax.jvp(self.sigma, (t,), (jnp.ones_like(t),))
        return alpha, sigma, d_alpha, d_sigma


class StraightLine(AbstractGaussianPath):
    """x = t y + (1 - t) z, of flow matching, with g^2 = 2 (1 - t) where noise is wanted."""

    def alpha(self, t: Time) -> Array:
        return jnp.asarray(t)

    def sigma(self, t: Time) -> Array:
        return 1 - jnp.asarray(t)

    def diffusion(self, t: Time) -> Array:
        return jnp.sqrt(2 * jnp.maximum(self.sigma(t), 0.0))

    def stochastic_drift(self, t: Time, x: State, velocity: State) -> State:
        return velocity - self.noise(t, x, velocity)  # g^2 / (2 sigma) = 1, also at t = 1


class VariancePreserving(AbstractGaussianPath):
    """alpha^2 + sigma^2 = 1, with beta = g^2 linear in the time 1 - t of the noising equation.

    sigma is 0 at t = 1, where its derivative is infinite: a horizon ends a little before. beta goes
    from `beta_max` at the noise, t = 0, to `beta_min` at the data, t = 1.
    """

    beta_min: float = eqx.field(static=True, default=0.1)
    beta_max: float = eqx.field(static=True, default=20.0)

    def beta(self, t: Time) -> Array:
        """The rate of noising, g^2."""
        return self.beta_min + (self.beta_max - self.beta_min) * (1 - jnp.asarray(t))

    def alpha(self, t: Time) -> Array:
        return jnp.exp(-self._total(t) / 2)

    def sigma(self, t: Time) -> Array:
        return jnp.sqrt(-jnp.expm1(-self._total(t)))

    def diffusion(self, t: Time) -> Array:
        return jnp.sqrt(self.beta(t))

    def _total(self, t: Time) -> Array:
        """The integral of beta from the data to t."""
        s = 1 - jnp.asarray(t)
        return self.beta_min * s + (self.beta_max - self.beta_min) * jnp.square(s) / 2


_STRAIGHT = StraightLine()


def gaussian_path_of(field: Any) -> AbstractGaussianPath:
    """The Gaussian path of a velocity field: its attribute `path`, or the straight line. Local."""
    path = getattr(field, "path", None)
    return _STRAIGHT if path is None else path
