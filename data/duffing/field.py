"""A vector field that is odd: what holds in one well of the oscillator holds in the other.

A network of one's own: `network.name = "data/duffing/field.py:make_field"`.
"""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray


class OddField(eqx.Module):
    """du/dt = g(u) - g(-u) with a perceptron g."""

    mlp: eqx.nn.MLP

    def __call__(self, t: Any, u: Float[Array, " state"], args: Any) -> Float[Array, " state"]:
        del t, args
        return self.mlp(u) - self.mlp(-u)


def make_field(
    key: PRNGKeyArray, *, input_shape: tuple[int, ...], output_size: int, width: int, depth: int
) -> OddField:
    """An odd field of as many components as are observed. Local."""
    del input_shape
    mlp = eqx.nn.MLP(output_size, output_size, width, depth, activation=jax.nn.silu, key=key)
    return OddField(mlp)
