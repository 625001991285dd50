"""A vector field of sine waves on a rod or a square plate, which vanishes along the edges.

A perceptron from slopes of the waves to what flows between them.

A network of one's own: `network.name = "data/heat/field.py:make_field"`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from nodepint_mpi.core.waves import WaveField
from nodepint_mpi.errors import ProblemError


def make_field(
    key: PRNGKeyArray,
    *,
    input_shape: tuple[int, ...],
    output_size: int,
    n_modes: int,
    width: int,
    depth: int,
    dimensions: int = 1,
) -> WaveField:
    """A field that begins at rest, of `n_modes` waves in each of one or two dimensions. Local.

    With `depth = 0`, no hidden layer, it is linear.
    """
    del input_shape
    side = round(output_size ** (1 / dimensions))
    if dimensions not in (1, 2) or side**dimensions != output_size or n_modes > side:
        raise ProblemError(
            f"{output_size} points are no grid in {dimensions} dimensions that holds {n_modes} "
            "waves each way: `dimensions` is 1 or 2"
        )
    k = np.arange(1, n_modes + 1)
    waves = np.sin(np.pi / (side + 1) * np.outer(np.arange(1, side + 1), k))
    if dimensions == 2:
        waves, k = np.kron(waves, waves), np.sqrt(np.add.outer(k**2, k**2)).ravel()
    amplitudes = (2 / (side + 1)) ** dimensions * waves.T
    n_waves = len(k)
    mlp = eqx.nn.MLP(n_waves, n_waves, width, depth, activation=jnp.tanh, key=key)
    mlp = eqx.tree_at(lambda m: m.layers[-1], mlp, jax.tree.map(jnp.zeros_like, mlp.layers[-1]))
    return WaveField(mlp, jnp.asarray(k[:, None] * amplitudes), jnp.asarray(waves * k))
