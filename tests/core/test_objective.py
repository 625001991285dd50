"""Losses and metrics: exact over any division of the samples, and of no samples at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.objective import accuracy, mean_squared_error, nothing, relative_error


def test_the_relative_error_of_parts_is_that_of_the_whole():
    draw = np.random.default_rng(0)
    predictions, targets = draw.normal(size=(2, 3, 5, 2))
    parts = [
        relative_error(jnp.asarray(p), jnp.asarray(t))
        for p, t in zip(np.split(predictions, [1]), np.split(targets, [1]), strict=True)
    ]
    empty = nothing(relative_error, jnp.asarray(predictions), jnp.asarray(targets))
    whole = jax.tree.map(lambda *sums: sum(sums), *parts, empty)
    wanted = np.linalg.norm(predictions - targets) / np.linalg.norm(targets)
    assert whole.value() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("function", [relative_error, mean_squared_error, accuracy])
def test_nothing_is_of_the_same_kind_as_something(function):
    predictions, targets = jnp.ones((1, 4, 3), jnp.float32), jnp.ones((1, 4, 3), jnp.float32)
    if function is accuracy:
        targets = jnp.zeros((1, 4), int)
    made, none = (f(predictions, targets) for f in (function, lambda *a: nothing(function, *a)))
    assert jax.tree.structure(made) == jax.tree.structure(none)
    assert [x.dtype for x in jax.tree.leaves(made)] == [x.dtype for x in jax.tree.leaves(none)]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))
