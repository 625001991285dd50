"""A conservation law on a circle, du/dt = dq/dx with a flux q(u, du/dx) that is learned.

Seen and moved by a number of waves, which is what makes it smooth whatever its weights.

A network of one's own: `network.name = "data/burgers/field.py:make_field"`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from nodepint_mpi.core.waves import WaveField

POINTS_A_WAVE = 4
"""Points at which the flux is evaluated, per wave: enough for products of two waves."""


class PointwiseFlux(eqx.Module):
    """The same perceptron at all points."""

    mlp: eqx.nn.MLP

    def __call__(self, values: Float[Array, " 2*points"]) -> Float[Array, " points"]:
        return jax.vmap(self.mlp)(values.reshape(2, -1).T)


def make_field(
    key: PRNGKeyArray,
    *,
    input_shape: tuple[int, ...],
    output_size: int,
    n_modes: int,
    width: int,
    depth: int,
    steepest: float,
) -> WaveField:
    """A field on `output_size` equally spaced points that sees and moves `n_modes` waves. Local.

    It begins at rest. `steepest` is about the largest du/dx, which the perceptron sees as 1.
    """
    del input_shape
    k = 2 * np.pi * np.arange(1, n_modes + 1)
    n_points = POINTS_A_WAVE * n_modes
    values, slopes = _waves(k, n_points)
    to_waves = 2 / output_size * _waves(k, output_size)[0].T
    analysis = np.concatenate([values, slopes / steepest]) @ to_waves
    synthesis = _waves(k, output_size)[1] @ (2 / n_points * values.T)
    mlp = eqx.nn.MLP(2, "scalar", width, depth, activation=jax.nn.silu, key=key)
    mlp = eqx.tree_at(lambda m: m.layers[-1], mlp, jax.tree.map(jnp.zeros_like, mlp.layers[-1]))
    return WaveField(PointwiseFlux(mlp), jnp.asarray(analysis), jnp.asarray(synthesis))


def _waves(k: np.ndarray, n_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines, and their slopes, on a grid: (points, waves) each."""
    phase = np.arange(n_points)[:, None] / n_points * k
    sine, cosine = np.sin(phase), np.cos(phase)
    return np.concatenate([sine, cosine], axis=1), np.concatenate([k * cosine, -k * sine], axis=1)
