"""A vector field of an oscillator whose restoring force and friction are learned, each by itself.

A network of one's own: `network.name = "data/duffing/field.py:make_field"`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from nodepint_mpi.errors import ProblemError


class OddFunction(eqx.Module):
    """g(x) - g(-x) of a number, with a perceptron g."""

    mlp: eqx.nn.MLP

    def __call__(self, x: Float[Array, ""]) -> Float[Array, ""]:
        return self.mlp(x) - self.mlp(-x)


class Oscillator(eqx.Module):
    """x' = v and v' = force(x) + friction(v), both odd: one well teaches the other."""

    force: OddFunction
    friction: OddFunction

    def __call__(self, t: Any, u: Float[Array, "2"], args: Any) -> Float[Array, "2"]:
        del t, args
        x, v = u
        return jnp.stack([v, self.force(x) + self.friction(v)])


def make_field(
    key: PRNGKeyArray, *, input_shape: tuple[int, ...], output_size: int, width: int, depth: int
) -> Oscillator:
    """The field of one oscillator, of which place and speed are observed. Local."""
    if output_size != 2:
        raise ProblemError(f"an oscillator has a place and a speed, not {output_size} components")
    del input_shape

    def odd_function(key: PRNGKeyArray) -> OddFunction:
        return OddFunction(
            eqx.nn.MLP("scalar", "scalar", width, depth, activation=jax.nn.silu, key=key)
        )

    return Oscillator(*map(odd_function, jax.random.split(key)))
