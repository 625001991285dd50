"""Problems: fields against their formulas, and their scaling to a box."""

import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.problems import PROBLEMS, scale_to_box
from nodepint_mpi.errors import ProblemError


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_field_returns_what_its_state_is_made_of(name):
    problem = PROBLEMS[name]
    u = jnp.asarray(problem.initial)
    assert problem.field(jnp.array(0.0), u, problem.args).shape == u.shape


def test_burgers_is_what_its_formula_says():
    problem = PROBLEMS["burgers"]
    u, dx, nu = problem.initial, 2 / 127, 0.01
    slope = problem.field(jnp.array(0.0), jnp.asarray(u), problem.args)
    i = 17
    wanted = nu * (u[i + 1] - 2 * u[i] + u[i - 1]) / dx**2 - u[i] * (u[i + 1] - u[i - 1]) / 2 / dx
    assert np.isclose(slope[i], wanted, rtol=1e-12)
    wrapped = nu * (u[1] - 2 * u[0] + u[-1]) / dx**2 - u[0] * (u[1] - u[-1]) / 2 / dx
    assert np.isclose(slope[0], wrapped, rtol=1e-12)


def test_a_wave_of_heat_decays_at_the_rate_of_its_eigenvalue():
    problem, wave = PROBLEMS["heat"], 5
    d, dx = problem.initial.size, problem.args["dx"]
    u = np.sin(wave * np.pi * np.arange(1, d + 1) * dx)
    slope = problem.field(jnp.array(0.0), jnp.asarray(u), problem.args)
    rate = -4 * problem.args["kappa"] / dx**2 * np.sin(wave * np.pi * dx / 2) ** 2
    np.testing.assert_allclose(slope, rate * u, atol=1e-10 * abs(rate))


def test_phases_are_pulled_by_all_others():
    problem = PROBLEMS["kuramoto"]
    u, d = problem.initial, problem.initial.size
    slope = problem.field(jnp.array(0.0), jnp.asarray(u), problem.args)
    pulls = np.array([np.mean([np.sin(u[j] - u[i]) for j in range(d)]) for i in range(d)])
    own = problem.args["spread"] * np.linspace(-1.0, 1.0, d)
    np.testing.assert_allclose(slope, own + problem.args["coupling"] * pulls, atol=1e-12)


def test_the_image_field_does_not_know_where_the_image_begins():
    problem = PROBLEMS["image_field"]
    u = jnp.asarray(problem.initial)

    def field(image):
        return problem.field(jnp.array(0.0), image, problem.args)

    moved = jnp.roll(u, (3, 5), axis=(0, 1))
    np.testing.assert_allclose(field(moved), jnp.roll(field(u), (3, 5), axis=(0, 1)), atol=1e-12)
    # A single bright pixel spreads two pixels in every direction, and no further.
    spread = np.any(np.asarray(field(jnp.zeros_like(u).at[4, 4].set(1.0))) != 0, axis=-1)
    assert spread[2:7, 2:7].all() and spread.sum() == 25


def test_scaled_and_raw_fields_move_alike():
    raw = PROBLEMS["lorenz"]
    low, high = np.array([-20.0, -25.0, 0.0]), np.array([20.0, 25.0, 50.0])
    scaled = scale_to_box(raw, low, high)
    half = (high - low) / 2
    np.testing.assert_allclose(low + (scaled.initial + 1) * half, raw.initial)
    slopes = [p.field(jnp.array(0.0), jnp.asarray(p.initial), p.args) for p in (scaled, raw)]
    np.testing.assert_allclose(slopes[0] * half, slopes[1])


@pytest.mark.parametrize("box", [([0.0] * 3, [0.0] * 3), ([0.0] * 2, [1.0] * 2)])
def test_a_box_without_volume_or_of_another_dimension_is_refused(box):
    with pytest.raises(ProblemError, match="box"):
        scale_to_box(PROBLEMS["lorenz"], *box)
