"""Particles of a fluid: the generator against closed forms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.build.imports import import_file

ROOT = Path(__file__).parents[2]
sph = import_file(ROOT / "tools" / "sph.py", "test")
FLUID = sph.Fluid(n_side=8, viscosity=0.02)


@pytest.fixture(autouse=True)
def as_in_the_tool():
    """The generator runs with JAX's defaults; elsewhere the tests forbid broadcasting."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def some_particles(key):
    first, second = jax.random.split(key)
    x = sph.grid(8) + 0.01 * jax.random.normal(first, (64, 2))
    return sph.Particles(x, jax.random.normal(second, (64, 2)))


def test_the_kernel_is_one_in_all_and_its_slope_is_its_derivative():
    q = (np.arange(3000) + 0.5) / 1000
    np.testing.assert_allclose(2 * np.pi * jnp.mean(sph.kernel(q) * q) * 3, 1, rtol=1e-5)
    by_jax = jax.vmap(jax.grad(sph.kernel))(q[::100])
    np.testing.assert_allclose(sph.kernel_slope(q[::100]), by_jax, rtol=1e-9)


def test_vortices_decay_as_they_should_and_keep_their_momentum(key):
    fluid = sph.Fluid(n_side=12, viscosity=0.02)
    times = np.array([0.0, 0.1])
    start = sph.begin(
        fluid, sph.settle(key, 12), lambda x: sph.taylor_green(x, 0.0, fluid.viscosity)
    )
    end = sph.simulate(fluid, start, jnp.asarray(times), n_steps=30).v[-1]
    exact = 0.25 * np.exp(-16 * np.pi**2 * fluid.viscosity * 0.1)  # 0.73 of the first
    assert abs(sph.kinetic_energy(end) / exact - 1) < 0.15
    np.testing.assert_allclose(jnp.sum(start.v, axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(jnp.sum(end, axis=0), 0, atol=1e-12)


def test_settled_particles_begin_with_the_pressure_of_an_incompressible_flow(key):
    # Of these vortices it is -(cos 4 pi x + cos 4 pi y) / 4, lowest in their centers.
    fluid = sph.Fluid(n_side=20, viscosity=0.01)
    particles = sph.begin(fluid, sph.grid(20), lambda x: sph.taylor_green(x, 0.0, 0.01))
    gap = jax.vmap(lambda x: sph.separation(x, particles.x.T))(particles.x)
    q = jnp.linalg.norm(gap, axis=1) / fluid.spacing
    density = jnp.sum(sph.kernel(q), axis=1)
    wanted = -jnp.sum(jnp.cos(4 * jnp.pi * sph.grid(20)), axis=1) / 4 / fluid.sound_speed**2
    # The kernel smooths what it sees of it.
    seen = density / jnp.mean(density) - 1
    assert jnp.corrcoef(seen, wanted)[0, 1] > 0.95
    assert 0.5 < jnp.std(seen) / jnp.std(wanted) < 1.1


def test_the_grid_sees_a_constant_velocity_as_it_is(key):
    particles = some_particles(key)._replace(v=jnp.tile(jnp.array([[2.0, -1.0]]), (64, 1)))
    seen = sph.velocity_at(sph.grid(5), particles, 1 / 8)
    np.testing.assert_allclose(seen, np.tile([[2.0, -1.0]], (25, 1)), rtol=1e-12)
