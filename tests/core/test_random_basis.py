"""Random directions against NumPy: their numbers, the projection by hand, and that they are the
same however they are cut up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from nodepint_mpi.core import hadamard, random_basis
from nodepint_mpi.core.random_basis import (
    RandomBasis,
    Segment,
    combine,
    direction_keys,
    draw,
    find_coefficients,
)

pytestmark = pytest.mark.mpi(max_size=1)

D = 1000
WHOLE = [Segment(0, D)]


def directions(basis, step=0, segments=WHOLE):
    indices = jnp.arange(basis.n_directions)
    keys = direction_keys(basis, jnp.asarray(step), indices)
    return np.asarray(draw(basis.kind, keys, segments, float))


def rotated(x, n):
    return (x << np.uint32(n)) | (x >> np.uint32(32 - n))


def threefry(key, counter):
    """Salmon, Moraes, Dror, Shaw (2011), Parallel random numbers: as easy as 1, 2, 3; 20 rounds."""
    a, b = np.uint32(key[0]), np.uint32(key[1])
    words = [a, b, a ^ b ^ np.uint32(0x1BD11BDA)]
    x, y = np.uint32(0) + words[0], counter.astype(np.uint32) + words[1]
    turns = ((13, 15, 26, 6), (17, 29, 16, 24))
    for block in range(5):
        for n in turns[block % 2]:
            x = x + y
            y = rotated(y, n) ^ x
        x = x + words[(block + 1) % 3]
        y = y + words[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def test_signs_are_the_bits_of_a_published_generator():
    basis = RandomBasis(3, seed=7, kind="signs")
    keys = np.asarray(direction_keys(basis, jnp.array(2), jnp.arange(3)))
    found = directions(basis, 2)
    with np.errstate(over="ignore"):
        for key, row in zip(keys, found, strict=True):
            words = np.stack(threefry(key, np.arange(-(-D // 64))), axis=-1).reshape(-1)
            bits = (words[:, None] >> np.arange(31, -1, -1).astype(np.uint32)) & np.uint32(1)
            np.testing.assert_array_equal(row, 1.0 - 2.0 * bits.reshape(-1)[:D])


@pytest.mark.parametrize("kind", ["signs", "normal"])
def test_numbers_are_independent_with_unit_variance(kind):
    rows = directions(RandomBasis(400, kind=kind))
    n = rows.size
    assert abs(rows.mean()) < 5 / np.sqrt(n)
    assert abs((rows**2).mean() - 1) < 8 / np.sqrt(n)
    assert abs((rows[:, 1:] * rows[:, :-1]).mean()) < 5 / np.sqrt(n)
    gram = rows @ rows.T / D
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 6 / np.sqrt(D)
    if kind == "normal":
        assert abs((rows**4).mean() - 3) < 60 / np.sqrt(n)


@pytest.mark.parametrize("kind", ["signs", "normal", "hadamard"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_projection_is_that_of_numpy(monkeypatch, kind, unbiased):
    """In chunks of three directions, the last of which is filled up."""
    basis = RandomBasis(10, seed=3, kind=kind, unbiased=unbiased)
    gradient = np.random.default_rng(0).normal(size=D)
    unit = directions(basis, 5)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    wanted = unit.T @ (unit @ gradient) * (D / 10 if unbiased else 1.0)
    monkeypatch.setattr(random_basis, "CHUNK", 3 * D)
    step = jnp.array(5)
    found = find_coefficients(basis, step, jnp.asarray(gradient), WHOLE)
    projected = combine(basis, step, found, WHOLE, n_parameters=D)
    np.testing.assert_allclose(projected, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["signs", "normal", "hadamard"])
def test_parts_of_directions_and_of_numbers_make_the_whole(kind):
    basis = RandomBasis(7, kind=kind)
    cuts = [0, 1, 63, 64, 130, 130, D]
    parts = [Segment(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    rows = directions(basis)
    np.testing.assert_array_equal(directions(basis, segments=parts), rows)
    np.testing.assert_array_equal(directions(basis, segments=parts[2:4]), rows[:, 63:130])
    gradient, step = jnp.asarray(rows[0] + 0.5 * rows[6]), jnp.array(0)
    whole = find_coefficients(basis, step, gradient, WHOLE)
    dealt = [
        find_coefficients(basis, step, gradient, WHOLE, own=own)
        for own in (range(3), range(3, 3), range(3, 7))
    ]
    for one, other in zip(jax.tree.map(lambda *x: sum(x), *dealt), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13)


def test_all_directions_and_orthogonal_ones_give_the_gradient():
    """Two parameters, until two signs are neither equal nor opposite: then nothing is lost."""
    drawn = (RandomBasis(2, seed=seed, kind="signs") for seed in range(20))
    pair = [Segment(0, 2)]
    basis = next(one for one in drawn if np.prod(directions(one, segments=pair)) < 0)
    found = find_coefficients(basis, jnp.array(0), jnp.array([3.0, -1.0]), pair)
    projected = combine(basis, jnp.array(0), found, pair, n_parameters=2)
    np.testing.assert_allclose(projected, [3.0, -1.0], rtol=1e-14)


@pytest.mark.parametrize("kind", ["signs", "normal", "hadamard"])
def test_drawn_anew_in_each_step_or_never(kind):
    first = RandomBasis(4, kind=kind)
    fixed = first._replace(redraw=False)
    pairs = np.corrcoef(np.ravel(directions(first, 0)), np.ravel(directions(first, 1)))
    assert abs(pairs[0, 1]) < 5 / np.sqrt(4 * D)
    np.testing.assert_array_equal(directions(fixed, 0), directions(fixed, 1))
    assert np.any(directions(first, 0) != directions(first._replace(seed=1), 0))


def test_a_thousand_draws_are_one_program():
    basis, traces = RandomBasis(2, kind="signs"), []

    @jax.jit
    def projected(step, gradient):
        traces.append(1)
        found = find_coefficients(basis, step, gradient, [Segment(0, 70)])
        return combine(basis, step, found, [Segment(0, 70)], n_parameters=70)

    total = np.zeros(70)
    for step in range(1000):
        total += np.asarray(projected(jnp.asarray(step), jnp.ones(70)))
    assert traces == [1]
    # The mean of projections is d / D of the gradient; a number of one varies by sqrt(2 * 69) / 70.
    np.testing.assert_allclose(total / 1000, 2 / 70, atol=5 * np.sqrt(138 / 1000) / 70)
    assert np.mean(total / 1000) == pytest.approx(2 / 70, rel=5 * np.sqrt(1 / 1000))


def test_rows_of_a_hadamard_matrix_are_orthogonal_and_average_to_the_identity():
    """SciPy's matrix; rows differ, and over draws the mean of v v^T is the identity."""
    rows = directions(RandomBasis(64, kind="hadamard"), segments=[Segment(0, 64)])
    np.testing.assert_array_equal(rows @ rows.T, 64 * np.eye(64))
    # Products of two rows have no signs: they are rows of the matrix, the same ones in any order.
    products = rows[:1] * rows
    matrix = {tuple(row) for row in scipy.linalg.hadamard(64)}
    assert {tuple(row) for row in products.astype(int)} == matrix
    drawn = [
        directions(RandomBasis(2, kind="hadamard"), step, [Segment(0, 40)]) for step in range(500)
    ]
    mean = np.einsum("sji,sjk->ik", drawn, drawn) / 1000
    np.testing.assert_array_equal(np.diag(mean), 1.0)
    assert np.abs(mean - np.eye(40)).max() < 5.5 / np.sqrt(500)
    values = np.random.default_rng(0).normal(size=32)
    np.testing.assert_allclose(
        hadamard.transform(jnp.asarray(values)), scipy.linalg.hadamard(32) @ values, rtol=1e-12
    )
    with pytest.raises(ValueError, match="the length is 12; expected a power of two"):
        hadamard.transform(jnp.zeros(12))
