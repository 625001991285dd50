"""The Walsh-Hadamard transform: products with the matrix H[r, i] = (-1)^(ones in r AND i)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32


def transform(values: Float[Array, " n"]) -> Float[Array, " n"]:
    """The product of H with n numbers, n a power of two, by n log2(n) additions. Local."""
    size, half = values.size, 1
    if size & (size - 1):
        raise ValueError(f"the length is {size}; expected a power of two")
    while half < size:
        pairs = values.reshape(-1, 2, half)
        left, right = pairs[:, 0], pairs[:, 1]
        values = jnp.stack([left + right, left - right], axis=1).reshape(-1)
        half *= 2
    return values


def signs_of(rows: UInt32[Array, " m"], columns: UInt32[Array, " n"]) -> Float[Array, "m n"]:
    """Numbers of H in rows and columns of any matrix that is large enough. Local."""
    ones = jax.lax.population_count(rows[:, None] & columns[None])
    return jnp.asarray(1 - 2 * (ones & jnp.uint32(1)).astype(jnp.int32), jnp.zeros(()).dtype)
