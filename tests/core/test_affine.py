"""Affine maps against a loop in NumPy, sample by sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.affine import (
    Affine,
    apply,
    compose,
    compose_all,
    needs_guard,
    pack,
    step_guarded,
    unpack,
    walk,
    walk_guarded,
)


def draw(n_maps, rank, batch):
    random = np.random.default_rng(7)
    matrices = random.normal(size=(n_maps, *batch, rank, rank)) / rank**0.5
    return matrices, random.normal(size=(n_maps, *batch, rank))


@pytest.mark.parametrize("n_maps, rank, batch", [(1, 3, (2,)), (5, 4, ()), (6, 1, (2, 3))])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_walk_and_its_composition_end_where_numpy_does(n_maps, rank, batch, transposed):
    matrices, vectors = draw(n_maps, rank, batch)
    start = np.random.default_rng(8).normal(size=(*batch, rank))
    maps = Affine(jnp.asarray(matrices), jnp.asarray(vectors))
    walked = walk(maps, jnp.asarray(start), transposed=transposed)
    x = start
    for n in reversed(range(n_maps)) if transposed else range(n_maps):
        np.testing.assert_allclose(walked.before[n], x, rtol=1e-13)
        matrix = np.swapaxes(matrices[n], -1, -2) if transposed else matrices[n]
        x = (x[..., None, :] @ matrix)[..., 0, :] + vectors[n]
        np.testing.assert_allclose(walked.after[n], x, rtol=1e-13)
    whole = compose_all(maps, transposed=transposed)
    end = apply(whole, jnp.asarray(start), transposed=transposed)
    np.testing.assert_allclose(end, x, rtol=1e-12, atol=1e-13)


def test_packed_maps_are_the_same_maps():
    maps = Affine(*map(jnp.asarray, draw(4, 3, (2,))))
    for some in (maps, maps._replace(matrix=None)):
        opened = unpack(pack(some))
        assert (opened.matrix is None) == (some.matrix is None)
        jax.tree.map(np.testing.assert_array_equal, opened, some)
    zero, bound = jnp.zeros((2, 3)), jnp.asarray(1.0)
    of_packed = walk_guarded(pack(maps), zero, bound, transposed=True)
    jax.tree.map(
        np.testing.assert_array_equal, of_packed, walk_guarded(maps, zero, bound, transposed=True)
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_what_comes_before_a_constant_map_does_not_matter(transposed):
    one, other = (Affine(*(jnp.asarray(part[n]) for part in draw(2, 3, (2,)))) for n in (0, 1))
    constant = compose(one._replace(matrix=None), other, transposed=transposed)
    assert constant.matrix is None
    wanted = compose(one, other, transposed=transposed)
    np.testing.assert_array_equal(constant.vector, wanted.vector)


def test_a_step_that_is_too_long_or_not_finite_is_cut_sample_by_sample():
    matrices = jnp.broadcast_to(jnp.eye(2), (3, 2, 2)).at[2].set(jnp.nan)
    maps = Affine(matrices, jnp.asarray([[3.0, 4.0], [0.0, 1.0], [0.0, 0.5]]))
    zero, radius = jnp.zeros((3, 2)), jnp.asarray(2.5)
    end, is_cut = step_guarded(maps, zero, radius, transposed=False)
    np.testing.assert_allclose(end, [[1.5, 2.0], [0.0, 1.0], [0.0, 0.5]])
    harmless = jax.tree.map(lambda part: part[1:2], maps)
    assert bool(is_cut) and not bool(step_guarded(harmless, zero[1:2], radius, transposed=False)[1])
    twice = jax.tree.map(lambda part: jnp.stack([part, part]), maps)
    assert int(walk_guarded(twice, zero, radius, transposed=False)[1]) == 2


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
