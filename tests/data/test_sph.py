"""Flows of particles: fields that learn them, and the judge of what was learned."""

from math import comb
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.build.imports import import_file
from nodepint_mpi.data.datasets import open_split
from nodepint_mpi.data.prepare import prepare_dataset
from nodepint_mpi.errors import DataError

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.mpi(max_size=1)


@pytest.fixture(scope="module")
def judge():
    return import_file(REPOSITORY / "tools" / "judge_sph.py", "the test")


def taylor_green(n: int) -> np.ndarray:
    """One flow at one time on n x n points, (1, 1, points, 2)."""
    a = 2 * np.pi * (np.arange(n) + 0.5) / n
    u = np.stack(
        [-np.cos(a)[:, None] * np.sin(a), np.sin(a)[:, None] * np.cos(a)],
        axis=-1,
    )
    return u.reshape(1, 1, n**2, 2)


def test_scores_are_shares_of_the_truth_and_leave_the_start_out(judge):
    truth = np.zeros((1, 3, 2, 2))
    truth[0, :, 0, 0] = [7.0, 3.0, 4.0]
    truth[0, :, 1, 1] = [0.0, 0.0, 12.0]  # in all 13, in the second entry of two
    wrong = truth + np.array([9.0, 0.0, 1.3])[:, None, None] * np.eye(2)[:, ::-1] / 2**0.5
    accuracy, basis, persistence = judge.score(truth, wrong, np.eye(4)[:, :2])
    assert accuracy == pytest.approx(0.9)
    assert basis == pytest.approx(1 - 12 / 13)
    assert persistence == pytest.approx(1 - np.sqrt(4**2 + 3**2 + 12**2) / 13)
    skewed = np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # spans entries 0, 2, 3
    skewed = np.concatenate([skewed, np.eye(4)[:, 2:3]], axis=1)
    assert judge.score(truth, truth, skewed) == pytest.approx((1, 1, persistence))
    assert judge.score(truth, truth, None).basis is None


def test_energy_momentum_and_vorticity_of_a_known_flow(judge):
    flow = taylor_green(32)
    decaying = np.concatenate([flow, flow / 2], axis=1)
    np.testing.assert_allclose(judge.energy_left(decaying), [[1.0, 0.25]], rtol=1e-12)
    np.testing.assert_allclose(judge.momentum(flow), 0.0, atol=1e-12)
    np.testing.assert_allclose(judge.momentum(flow + np.array([0.3, -0.4])), 0.5, rtol=1e-12)
    a = 2 * np.pi * (np.arange(32) + 0.5) / 32
    exact = 4 * np.pi * np.cos(a)[:, None] * np.cos(a)
    np.testing.assert_allclose(judge.vorticity(flow)[0, 0], exact, rtol=0.01)


def test_the_reduced_field_begins_with_the_oscillators_of_two_sound_waves():
    make = import_file(REPOSITORY / "data" / "sph_vortices" / "field.py", "the test").make_model
    model = make(jax.random.key(0), input_shape=(9,), output_size=9, latent=5, width=3, depth=1)
    silent = eqx.tree_at(lambda m: m.processor.mlp, model, lambda t, u, args: jnp.zeros_like(u))
    slopes = jax.jacobian(lambda u: silent.processor(jnp.zeros(()), u, None))(jnp.ones(5))
    rates = np.linalg.eigvals(np.asarray(slopes))
    expected = 20 * np.pi * np.array([-(2**0.5), -1, 0, 1, 2**0.5])
    np.testing.assert_allclose(np.sort(rates.imag), expected, atol=1e-3)
    np.testing.assert_allclose(rates.real, 0, atol=1e-3)


def test_each_flow_has_particles_of_its_own_and_begins_as_vortices_in_a_shear(root, judge):
    small = {"n_train": 2, "n_test": 1, "n_obs": 2, "n_side": 8, "n_grid": 4, "horizon": 0.002}
    # As on the command line; the tests forbid broadcasting for the sake of the package.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        place = prepare_dataset("sph_particles", root=root, options=small)
    train = open_split(place, "train", ["t", "u", "seen"])
    states = train.take("u", range(2)).reshape(2, 2, 2, 64, 2)  # rows, times, x or v, particles
    shears = []
    for x, v in states[:, 0]:
        a, b = 2 * np.pi * x.T
        rest = v - np.stack([-np.cos(a) * np.sin(b), np.sin(a) * np.cos(b)], axis=-1)
        for place_of, part in zip((b, a), rest.T, strict=True):
            waves = np.stack([np.sin(place_of), np.ones(64)], axis=1)  # no momentum: a constant
            fit = np.linalg.lstsq(waves, part, rcond=None)[0]
            np.testing.assert_allclose(waves @ fit, part, atol=1e-5)
            shears.append(fit[0])
    assert np.abs(shears).max() <= 0.5 and len(np.unique(np.round(shears, 3))) == 4
    apart = states[0, 0, 0] - states[1, 0, 0]
    assert np.abs(apart - np.round(apart)).max() > 0.02
    np.testing.assert_allclose(states[:, :, 1].mean(axis=2), 0, atol=1e-6)
    moved = states[:, 1, 0] - states[:, 0, 0]
    np.testing.assert_allclose(moved, 0.002 * states[:, 0, 1], atol=5e-4)
    assert np.abs(moved).max() > 1e-3

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        seen = judge.see(states[:, :, 0], states[:, :, 1], 4)
    np.testing.assert_allclose(train.take("seen", range(2)), seen.reshape(2, 2, 32), atol=1e-5)
    with pytest.raises(DataError, match="n_side must be at least 8"):
        prepare_dataset("sph_particles", root=root, options=small | {"n_side": 7}, force=True)


def naive_slope(field, u: np.ndarray) -> np.ndarray:
    """The formula in the field's description, pair by pair."""
    x, v = u.reshape(2, -1, 2)
    n = len(x)
    reach = 3 / np.sqrt(n)
    polynomials = np.asarray(field.polynomials, float)
    degree = polynomials.shape[1] - 1

    def pair(i, j):
        e = x[i] - x[j]
        e = (e - np.round(e)) / reach
        q = min(float(np.sqrt(e @ e + 1e-12)), 1.0)
        bernstein = [comb(degree, k) * q**k * (1 - q) ** (degree - k) for k in range(degree + 1)]
        return e, (1 - q) ** 2 * polynomials @ np.array(bernstein)

    d = [100 * (sum(pair(i, j)[1][0] for j in range(n)) - 1) for i in range(n)]
    p = [each + float(field.mlp(jnp.asarray([each]))[0]) for each in d]
    slope = np.stack([v, np.zeros_like(v)])
    for i in range(n):
        for j in range(n):
            e, (_, push, drag, drift) = pair(i, j)
            slope[0, i] += drift * e
            slope[1, i] += (p[i] + p[j]) * push * e / reach + drag * (v[j] - v[i])
    return slope.ravel()


def test_the_field_of_pairs_is_its_formula_and_conserves_momentum():
    make = import_file(REPOSITORY / "data" / "sph_particles" / "field.py", "the test").make_field
    field = make(jax.random.key(1), input_shape=(80,), output_size=80, degree=3, width=4, depth=1)
    draw = np.random.default_rng(0)
    field = eqx.tree_at(lambda f: f.polynomials, field, jnp.asarray(draw.normal(size=(4, 4))))
    u = np.concatenate([3 * draw.uniform(size=40), draw.normal(size=40)])  # outside the square too
    slope = np.asarray(eqx.filter_jit(field)(0.0, jnp.asarray(u), None))
    expected = naive_slope(field, u)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    pulls = slope[40:].reshape(20, 2)
    np.testing.assert_allclose(pulls.sum(axis=0), 0, atol=1e-9 * np.abs(pulls).max())
