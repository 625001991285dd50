"""Flows of particles: fields that learn them, and the judge of what was learned."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.run.imports import import_file

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
    np.testing.assert_allclose(judge.energy(flow), 0.25, rtol=1e-12)
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
