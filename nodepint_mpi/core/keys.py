"""Random keys on their way through a solve, whose parameters are floating-point numbers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

EVALUATION = 0x4576616C
"""In place of an optimizer step: random numbers of samples that are only scored."""


def keys_as_numbers(keys: Key[Array, "*keys"]) -> Float[Array, "*keys bytes"]:
    """The bytes of keys, which every floating-point type down to bfloat16 holds exactly. Local."""
    words = jax.random.key_data(keys)
    parts = jax.lax.bitcast_convert_type(words, jnp.uint8)
    return parts.reshape(*keys.shape, -1).astype(jnp.zeros(()).dtype)


def numbers_as_keys(numbers: Float[Array, "*keys bytes"]) -> Key[Array, "*keys"]:
    """The keys that `keys_as_numbers` was given. Local."""
    parts = jax.lax.stop_gradient(numbers).astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(
        parts.reshape(*numbers.shape[:-1], -1, jnp.dtype(jnp.uint32).itemsize), jnp.uint32
    )
    return jax.random.wrap_key_data(words)
