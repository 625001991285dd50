"""Forecasts of growth against exponents in closed form."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.noise import draw_increments, path_key
from nodepint_mpi.errors import ProblemError

# On more ranks than one `nodepint solve` begins with a forecast: see tests/cli.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.mpi(max_size=1)]
N_SLICES, N_FINE, LAST = 8, 32, 2.0
EDGES = np.linspace(0.0, LAST, N_SLICES + 1)
ARGS = {"mu": np.array([-1.0, 0.5]), "sigma": np.array([0.3, 0.6])}


def test_the_exponent_of_geometric_brownian_motion_is_that_of_its_paths(comms):
    """The larger of mu - sigma^2 / 2, and along a path with sigma W(T) / T more."""
    n_paths = 300
    found = nm.forecast(
        lambda t, u, args: args["mu"] * u, jnp.ones(2), EDGES,
        diffusion=lambda t, u, args: args["sigma"] * u, args=ARGS,
        noise=nm.Noise(3, np.arange(n_paths)), in_axes=(None, None),
        fine=nm.FixedSteps(diffrax.Euler(), N_FINE), coarse=nm.FixedSteps(diffrax.Euler(), 8),
        stopping=nm.JumpTolerance(1e-6), comm=comms.time,
    )  # fmt: skip
    means = ARGS["mu"] - ARGS["sigma"] ** 2 / 2
    assert found.n_samples == n_paths and found.n_unfollowed == 0
    assert found.exponent_error < 0.05
    assert abs(found.exponent - means.max()) < 3 * found.exponent_error
    assert found.sweeps is not None and found.sweeps <= N_SLICES
    width, n_steps = jnp.asarray(LAST / N_SLICES / N_FINE), N_SLICES * N_FINE
    draw = lambda path: draw_increments(path_key(3, path), 0, n_steps, width, (2,)).w  # noqa: E731
    w = np.sum(jax.vmap(draw)(jnp.arange(n_paths)), axis=1)
    growth = np.max(means * LAST + ARGS["sigma"] * np.asarray(w), axis=1)
    np.testing.assert_allclose(found.exponent, growth.mean() / LAST, atol=0.01)
    np.testing.assert_allclose(found.log10_growth_worst, growth.max() / np.log(10), atol=0.05)


def test_errors_of_an_ornstein_uhlenbeck_process_shrink_alike_on_all_paths(comms):
    found = nm.forecast(
        lambda t, u, args: -1.5 * u, jnp.array(1.0), EDGES, diffusion=lambda t, u, args: 0.7,
        noise=nm.Noise(0, np.arange(5), additive=True), in_axes=(None, None),
        fine=nm.FixedSteps(diffrax.ShARK(), N_FINE), coarse=nm.FixedSteps(diffrax.ShARK(), 4),
        comm=comms.time,
    )  # fmt: skip
    np.testing.assert_allclose(found.exponent, -1.5, atol=2e-3)
    np.testing.assert_allclose(found.log10_growth_worst, found.log10_growth, rtol=1e-10)
    assert "in the worst of 5 samples" in found.advice


def test_slices_that_coarse_steps_do_not_get_over_are_counted(comms):
    found = nm.forecast(
        lambda t, u, args: -(u**3), np.array([1.0, 30.0]), EDGES, in_axes=(0, None),
        fine=nm.FixedSteps(diffrax.Euler(), 2000), coarse=nm.FixedSteps(diffrax.Euler(), 2),
        comm=comms.time,
    )  # fmt: skip
    assert found.sweeps is None and 0 < found.n_unfollowed < 2 * N_SLICES
    assert f"but for {found.n_unfollowed} of 16 slices that coarse steps" in found.advice
    assert np.isfinite(found.exponent)


def test_a_forecast_says_what_it_needs():
    noisy = {"diffusion": lambda t, u, args: u, "noise": nm.Noise(0)}
    steps = nm.FixedSteps(diffrax.Euler(), 2)
    with pytest.raises(ProblemError, match="needs the steps of the coarse"):
        nm.forecast(lambda t, u, args: u, 1.0, EDGES, fine=steps, coarse=None)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="with noise needs `fine`"):
        nm.forecast(lambda t, u, args: u, 1.0, EDGES, coarse=steps, **noisy)
    with pytest.raises(ProblemError, match="2 steps a slice and `noise.n_fine` is 3"):
        noise = nm.Noise(0, n_fine=3)
        nm.solve(lambda t, u, args: u, 1.0, EDGES, fine=steps, coarse=steps,
                 **noisy | {"noise": noise})  # fmt: skip
