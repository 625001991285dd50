"""Affine maps against a loop in NumPy, sample by sample."""

import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.affine import (
    affine_maps,
    apply,
    compose,
    compose_all,
    needs_guard,
    step_guarded,
    walk,
    walk_guarded,
)


def draw(n_maps, rank, batch):
    random = np.random.default_rng(7)
    matrices = random.normal(size=(n_maps, *batch, rank, rank)) / rank**0.5
    return matrices, random.normal(size=(n_maps, *batch, rank))


@pytest.mark.parametrize("n_maps, rank, batch", [(1, 3, (2,)), (5, 4, ()), (6, 1, (2, 3))])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_walk_and_its_composition_end_where_numpy_does(n_maps, rank, batch, reverse):
    matrices, vectors = draw(n_maps, rank, batch)
    start = np.random.default_rng(8).normal(size=(*batch, rank))
    maps = affine_maps(jnp.asarray(matrices), jnp.asarray(vectors))
    walked = walk(maps, jnp.asarray(start), reverse=reverse)
    x = start
    for n in reversed(range(n_maps)) if reverse else range(n_maps):
        np.testing.assert_allclose(walked.before[n], x, rtol=1e-13)
        x = np.einsum("...i,...ij->...j", x, matrices[n]) + vectors[n]
        np.testing.assert_allclose(walked.after[n], x, rtol=1e-13)
    whole = compose_all(maps, reverse=reverse)
    np.testing.assert_allclose(apply(whole, jnp.asarray(start)), x, rtol=1e-12, atol=1e-13)


def test_what_comes_before_a_constant_map_does_not_matter():
    matrices, vectors = draw(2, 3, (2,))
    first, second = affine_maps(jnp.asarray(matrices), jnp.asarray(vectors))
    both = compose(first[..., -1:, :], second)
    assert both.shape == (2, 1, 3)
    wanted = compose(first, second)
    np.testing.assert_allclose(both[..., 0, :], wanted[..., -1, :], rtol=1e-14)


def test_a_step_that_is_too_long_or_not_finite_is_cut_sample_by_sample():
    identity = jnp.broadcast_to(jnp.eye(2), (3, 2, 2)).at[2].set(jnp.nan)
    maps = affine_maps(identity, jnp.asarray([[3.0, 4.0], [0.0, 1.0], [0.0, 0.5]]))
    zero, radius = jnp.zeros((3, 2)), jnp.asarray(2.5)
    end, is_cut = step_guarded(maps, zero, radius)
    np.testing.assert_allclose(end, [[1.5, 2.0], [0.0, 1.0], [0.0, 0.5]])
    assert bool(is_cut) and not bool(step_guarded(maps[1:2], zero[1:2], radius)[1])
    _, n_cut = walk_guarded(jnp.stack([maps, maps]), zero, radius, reverse=False)
    assert int(n_cut) == 2


@pytest.mark.parametrize(
    "after, radius, wanted",
    [
        (1.0, None, False),
        (1.0, 2.0, False),
        (3.0, 2.0, True),
        (np.nan, 2.0, True),
        (np.inf, None, True),
    ],
)
def test_a_guard_is_needed_beyond_the_radius_and_where_not_finite(after, radius, wanted):
    radius = None if radius is None else jnp.asarray(radius)
    assert bool(needs_guard(jnp.full((2, 1), after), radius)) is wanted
