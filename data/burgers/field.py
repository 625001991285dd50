"""A vector field of periodic functions that is smooth whatever its weights.

A perceptron from Fourier coefficients of u_x to those of du/dt.

A network of one's own: `network.name = "data/burgers/field.py:make_field"`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from nodepint_mpi.core.waves import WaveField


def make_field(
    key: PRNGKeyArray,
    *,
    input_shape: tuple[int, ...],
    output_size: int,
    n_modes: int,
    width: int,
    depth: int,
) -> WaveField:
    """A field on `output_size` equally spaced points that sees and moves `n_modes` waves. Local."""
    del input_shape
    modes = jnp.arange(1, n_modes + 1)
    phase = 2 * jnp.pi * modes * jnp.arange(output_size)[:, None] / output_size
    synthesis = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1)
    mlp = eqx.nn.MLP(2 * n_modes, 2 * n_modes, width, depth, activation=jax.nn.gelu, key=key)
    analysis = 2 / output_size * jnp.tile(modes, 2)[:, None] * synthesis.T
    return WaveField(mlp, analysis, synthesis)
