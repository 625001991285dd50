"""Random keys as floating-point numbers and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.keys import keys_as_numbers, numbers_as_keys


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_keys_survive_any_precision(dtype):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), 123456789), (3, 2))
    numbers = keys_as_numbers(keys).astype(dtype)
    assert numbers.shape == (3, 2, 8)
    back = numbers_as_keys(numbers)
    np.testing.assert_array_equal(jax.random.key_data(back), jax.random.key_data(keys))
    assert jnp.issubdtype(back.dtype, jax.dtypes.prng_key)
