"""The velocity that carries noise to digits of a given class.

A network of one's own: `network.name = "data/mnist_flow/field.py:make_field"`. The state is what
moves, then the class as ten constants, which the field reads and leaves as they are.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

N_CLASSES = 10
N_WAVES = 4


class ClassField(eqx.Module):
    """A perceptron of state, class and waves of the time, which begins at rest."""

    mlp: eqx.nn.MLP

    def __call__(self, t: Array, u: Float[Array, " state"], args) -> Float[Array, " state"]:
        del args
        phases = jnp.pi * t.astype(u.dtype) * jnp.arange(1, N_WAVES + 1, dtype=u.dtype)
        velocity = self.mlp(jnp.concatenate([u, jnp.cos(phases), jnp.sin(phases)]))
        return jnp.concatenate([velocity, jnp.zeros(N_CLASSES, u.dtype)])


def make_field(
    key: PRNGKeyArray, *, input_shape: tuple[int, ...], output_size: int, width: int, depth: int
) -> ClassField:
    """The field on as many coordinates as the data have beside the class. Local."""
    del input_shape
    mlp = eqx.nn.MLP(
        output_size + 2 * N_WAVES, output_size - N_CLASSES, width, depth, jax.nn.silu, key=key
    )
    last = jax.tree.map(jnp.zeros_like, mlp.layers[-1])
    return ClassField(eqx.tree_at(lambda m: m.layers[-1], mlp, last))
