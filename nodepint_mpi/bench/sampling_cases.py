"""Distributions whose velocity fields are known exactly, for `nodepint bench sampling`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.gaussian_paths import (
    AbstractGaussianPath,
    StraightLine,
    VariancePreserving,
)


@dataclass(frozen=True)
class GaussianMixture:
    """The exact velocity field of a mixture of equally likely Gaussians, as `f(t, x, args)`.

    They are alike but for their means, and round in a subspace and outside of it.

    Args:
        path: The Gaussian path.
        means: Rows of numbers, one for each Gaussian.
        deviation: Standard deviation in the span of `directions`.
        directions: Orthonormal rows; all coordinates if empty.
        outside: Standard deviation in all other directions.
    """

    path: AbstractGaussianPath
    means: tuple[tuple[float, ...], ...]
    deviation: float
    directions: tuple[tuple[float, ...], ...] = ()
    outside: float = 0.0

    @property
    def size(self) -> int:
        """Numbers of a state."""
        return len(self.means[0])

    def __call__(self, t, x, args):
        del args
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t)
        means = jnp.asarray(self.means, x.dtype)
        misses = x - alpha * means
        inside, outside = self._parts(misses)
        held, lost = self.deviation**2, self.outside**2
        total = alpha**2 * held + sigma**2
        weights = jax.nn.softmax(-jnp.sum(inside**2, axis=1) / (2 * total))
        inside, outside = weights @ inside, weights @ outside
        other = alpha**2 * lost + sigma**2
        data = weights @ means + alpha * (held / total * inside + lost / other * outside)
        noise = sigma * (inside / total + outside / other)
        return d_alpha * data + d_sigma * noise

    def log_density(self, x):
        """Of the data, at one state."""
        means = jnp.asarray(self.means, x.dtype)
        inside, outside = self._parts(x - means)
        rank = len(self.directions) or self.size
        exponents = -jnp.sum(inside**2, axis=1) / (2 * self.deviation**2)
        scale = rank * jnp.log(self.deviation)
        if rank < self.size:
            exponents = exponents - jnp.sum(outside**2, axis=1) / (2 * self.outside**2)
            scale = scale + (self.size - rank) * jnp.log(self.outside)
        mean = jax.nn.logsumexp(exponents) - jnp.log(len(self.means))
        return mean - scale - self.size / 2 * jnp.log(2 * jnp.pi)

    def _parts(self, misses):
        if not self.directions:
            return misses, jnp.zeros_like(misses)
        directions = jnp.asarray(self.directions, misses.dtype)
        inside = misses @ directions.T @ directions
        return inside, misses - inside


def circle() -> GaussianMixture:
    """Eight Gaussians on a circle of radius 2, along the variance-preserving path."""
    angles = 2 * np.pi * np.arange(8) / 8
    means = 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return GaussianMixture(VariancePreserving(), tuple(map(tuple, means.tolist())), 0.15)


def subspace(size: int = 64, rank: int = 8) -> GaussianMixture:
    """Ten Gaussians in a random subspace of a larger space, along straight lines."""
    draw = np.random.default_rng(1)
    directions = np.linalg.qr(draw.standard_normal((size, rank)))[0].T
    means = draw.standard_normal((10, rank)) @ directions
    as_rows = lambda array: tuple(map(tuple, array.tolist()))  # noqa: E731
    return GaussianMixture(StraightLine(), as_rows(means), 0.2, as_rows(directions), 0.02)
