"""A vector field of phases that act on each other in pairs, in a way that is learned.

A network of one's own: `network.name = "data/kuramoto/field.py:make_field"`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class PairField(eqx.Module):
    """u_i' = w_i + mean_j g(u_j - u_i), with frequencies w and a periodic perceptron g."""

    mlp: eqx.nn.MLP
    frequencies: Float[Array, " phases"]

    def __call__(self, t: Any, u: Float[Array, " phases"], args: Any) -> Float[Array, " phases"]:
        del t, args
        apart = u[None, :] - u[:, None]
        pairs = jnp.stack([jnp.sin(apart), jnp.cos(apart)], axis=-1)
        pulls = jax.vmap(jax.vmap(self.mlp))(pairs)[..., 0]
        return self.frequencies + jnp.mean(pulls, axis=1)


def make_field(
    key: PRNGKeyArray, *, input_shape: tuple[int, ...], output_size: int, width: int, depth: int
) -> PairField:
    """A field of `output_size` phases that know nothing of each other's pull. Local."""
    del input_shape
    mlp = eqx.nn.MLP(2, 1, width, depth, activation=jnp.tanh, key=key)
    return PairField(mlp, jnp.zeros(output_size))
