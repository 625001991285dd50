"""SPH vortices: decaying Taylor-Green vortices in a shear, by particles, seen on a grid."""

from functools import partial
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.build.imports import import_file
from nodepint_mpi.data.trajectories import make_trajectories

USES = ("../../tools/sph.py",)


def prepare(
    folder: Path,
    *,
    n_train: int = 40,
    n_test: int = 12,
    n_obs: int = 21,
    n_side: int = 20,
    n_grid: int = 16,
    horizon: float = 0.5,
    viscosity: float = 0.01,
    shear_max: float = 0.5,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Make splits train and test with columns `t` (n_obs) and `u` (n_obs, 2 n_grid^2).

    Taylor-Green vortices plus the shear flow (a sin 2 pi y, b sin 2 pi x), all from the same
    particles: a family of two parameters.

    Args:
        folder: That of this file; the generator is found from it.
        n_train: Trajectories in train.
        n_test: Trajectories in test.
        n_obs: Observations of each, equally spaced from t = 0 to t = `horizon`, at least 2.
        n_side: Particles along a side, at least 8.
        n_grid: Grid points along a side.
        horizon: Time of the last observation.
        viscosity: Kinematic viscosity, positive.
        shear_max: a and b are uniform between minus this and this.
        seed: Of the draws; trajectory i of a split depends on (seed, split, i) alone.
    """
    sph = import_file(folder / USES[0], "USES")
    sph.check_options(n_side=n_side, n_grid=n_grid, viscosity=viscosity, shear_max=shear_max)
    fluid = sph.Fluid(n_side, viscosity)
    settled = sph.settle(jax.random.key(seed), n_side)

    @partial(jax.jit, static_argnames="n_steps")
    def observe(shear, times, n_steps):
        start = sph.begin(fluid, settled, lambda x: sph.sheared_vortices(x, shear))
        states = sph.simulate(fluid, start, times, n_steps=n_steps)
        return sph.seen_on_grid(states, n_grid, fluid.spacing)

    def make(draw: np.random.Generator, times: np.ndarray) -> np.ndarray:
        shear = jnp.asarray(shear_max * draw.uniform(-1, 1, 2))
        n_steps = sph.steps_between(fluid, times)
        return np.asarray(observe(shear, jnp.asarray(times), n_steps), np.float32)

    return datasets.DatasetDict(
        make_trajectories(
            make, n_train=n_train, n_test=n_test, n_obs=n_obs, horizon=horizon, seed=seed
        )
    )
