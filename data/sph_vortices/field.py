"""A flow on a few directions of its velocity, with the sound that rings in it.

A network of one's own: `network.name = "data/sph_vortices/field.py:make_model"`.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from nodepint_mpi.models.networks import DenseField, EncodeProcessDecode, make_dense

SOUND_SPEED = 10.0
WAVES = (1.0, 2**0.5)
"""Of the longest sound waves in the unit square, along a side and across: waves per length."""


class RingingField(eqx.Module):
    """c' = g(c) + 2 pi SOUND_SPEED L c with a perceptron g and a matrix L, both learned.

    L begins with the oscillators of two sound waves: a perceptron's own slopes are of order one,
    and training does not find a frequency that is sixty times as high.
    """

    mlp: DenseField
    ringing: Float[Array, "latent latent"]

    def __call__(self, t: Any, u: Float[Array, " latent"], args: Any) -> Float[Array, " latent"]:
        return self.mlp(t, u, args) + 2 * jnp.pi * SOUND_SPEED * self.ringing @ u


def make_model(
    key: PRNGKeyArray,
    *,
    input_shape: tuple[int, ...],
    output_size: int,
    latent: int,
    width: int,
    depth: int,
) -> EncodeProcessDecode:
    """A field of `latent` coordinates on a learned basis, the last four of which ring. Local."""
    model = make_dense(
        key, input_shape=input_shape, output_size=output_size, latent=latent, width=width,
        depth=depth, activation="softplus", time_dependent=False, positive=False,
    )  # fmt: skip
    ringing = jnp.zeros((latent, latent))
    for i, k in zip(range(latent - 4, latent, 2), WAVES, strict=True):
        ringing = ringing.at[i, i + 1].set(k).at[i + 1, i].set(-k)
    assert isinstance(model.processor, DenseField)
    return eqx.tree_at(lambda m: m.processor, model, RingingField(model.processor, ringing))
