"""Reduced models: with all directions they are the full model."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.basis import identity_directions, random_directions
from nodepint_mpi.core.propagators import AdaptiveSteps, FixedSteps
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.models.networks import make_conv, make_dense
from nodepint_mpi.rom.model import Origin, make_stepper, reduce_model

ORIGIN = Origin("test", "0", 1, (0.0, 1.0), (1.0,), 1.0, ())
EDGES = np.linspace(0.0, 1.0, 5)
TIMES = jnp.array([0.0, 0.2, 0.5, 1.0])
STEPPER = make_stepper(FixedSteps(RK4(), 3), EDGES)


def dense(key):
    return make_dense(
        key, input_shape=(6,), output_size=6, width=8, depth=2, activation="tanh",
        time_dependent=True, positive=False,
    )  # fmt: skip


def conv(key):
    return make_conv(key, input_shape=(6, 5), output_size=3, channels=2)


def solve_full(model, x, stepper):
    @jax.jit
    def solve(x):
        since = stepper.since_start(TIMES)
        states = stepper(lambda t, u, args: model.processor(t, u, args), model.encoder(x), since)
        return jax.vmap(model.decoder)(states)

    return solve(x)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("make, shape", [(dense, (6,)), (conv, (6, 5))])
@pytest.mark.parametrize("is_rotated", [False, True])
def test_with_all_directions_it_is_the_full_model(key, make, shape, is_rotated):
    model = jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, make(key))
    x = jax.random.normal(key, shape)
    state = model.encoder(x)
    basis = identity_directions(state.shape, state.dtype)
    if is_rotated:
        basis = random_directions(key, state.size, state.shape, state.dtype)
    rom = reduce_model(model, basis, jnp.ones(state.size), stepper=STEPPER, origin=ORIGIN)
    assert rom.is_projected == (make is dense)
    np.testing.assert_allclose(rom.solve(x, TIMES), solve_full(model, x, STEPPER), rtol=1e-12)
    np.testing.assert_allclose(rom.lift(rom.project(state)), state, atol=1e-14)
    c, t = rom.project(state), jnp.array(0.3)
    slope = rom.project(model.processor(t, state, None))
    np.testing.assert_allclose(rom.field(t, c, None), slope, atol=1e-13)


@pytest.mark.mpi(max_size=1)
def test_a_solve_takes_batches_and_times_after_the_horizon(key):
    basis = random_directions(key, 3, (6,), float)
    rom = reduce_model(dense(key), basis, jnp.ones(3), stepper=STEPPER, origin=ORIGIN)
    xs, ts = jax.random.normal(key, (4, 6)), jnp.array([0.5, 1.7])
    together = jax.vmap(rom.solve, in_axes=(0, None))(xs, ts)
    assert together.shape == (4, 2, 6)
    np.testing.assert_allclose(together[2], rom.solve(xs[2], ts), rtol=1e-12)
    np.testing.assert_allclose(rom.solve(xs[2], ts[:1])[0], together[2, 0], rtol=1e-12)
    arrays = jax.tree.leaves(eqx.filter(rom.processor, eqx.is_array))
    assert sum(array.size for array in arrays) == (4 + 1) * 8 + (8 + 1) * 8 + (8 + 1) * 3
    assert "3 of 6 directions" in repr(rom)


@pytest.mark.mpi(max_size=1)
def test_it_steps_as_the_slices_did(key):
    model, x = dense(key), jax.random.normal(key, (6,))
    u, params = x, None
    for left, right in zip(EDGES, EDGES[1:], strict=False):
        edges = jnp.asarray(left), jnp.asarray(right)
        steps = FixedSteps(RK4(), 3)
        u = steps.integrate(model.processor, params, u, *edges, jnp.zeros(0)).end
    np.testing.assert_allclose(solve_full(model, x, STEPPER)[-1], u, rtol=1e-13)
    adaptive = make_stepper(AdaptiveSteps(diffrax.Tsit5(), 1e-9, 1e-9), EDGES)
    np.testing.assert_allclose(solve_full(model, x, adaptive)[-1], u, rtol=1e-4)
