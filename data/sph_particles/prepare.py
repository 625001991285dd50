"""SPH particles: the flows of `sph_vortices`, each by particles of its own, all of them given."""

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
    n_train: int = 24,
    n_test: int = 12,
    n_obs: int = 11,
    n_side: int = 16,
    n_grid: int = 16,
    horizon: float = 0.2,
    viscosity: float = 0.01,
    shear_max: float = 0.5,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Make splits train and test with columns `t` (n_obs), `u` (n_obs, 4 n_side^2) and `seen`
    (n_obs, 2 n_grid^2).

    The flows of `sph_vortices`, each from particles that were shaken and settled for it alone.
    A state is all positions, not wrapped, then all velocities; `seen` is the velocity on a grid.

    Args:
        folder: That of this file; the generator is found from it.
        n_train: Trajectories in train.
        n_test: Trajectories in test.
        n_obs: Observations of each, equally spaced from t = 0 to t = `horizon`, at least 2.
        n_side: Particles along a side, at least 8.
        n_grid: Grid points along a side.
        horizon: Time of the last observation.
        viscosity: Kinematic viscosity, positive.
        shear_max: The shear's two amplitudes are uniform between minus this and this.
        seed: Of the draws; trajectory i of a split depends on (seed, split, i) alone.
    """
    sph = import_file(folder / USES[0], "USES")
    sph.check_options(n_side=n_side, n_grid=n_grid, viscosity=viscosity, shear_max=shear_max)
    fluid = sph.Fluid(n_side, viscosity)

    @partial(jax.jit, static_argnames="n_steps")
    def move(key, shear, times, n_steps):
        settled = sph.settle(key, n_side)
        start = sph.begin(fluid, settled, lambda x: sph.sheared_vortices(x, shear))
        states = sph.simulate(fluid, start, times, n_steps=n_steps)
        return jnp.stack(states, axis=1).reshape(len(times), -1)

    @jax.jit
    def see(states):
        particles = sph.Particles(*jnp.moveaxis(states.reshape(n_obs, 2, -1, 2), 1, 0))
        return sph.seen_on_grid(particles, n_grid, fluid.spacing)

    def make(draw: np.random.Generator, times: np.ndarray) -> np.ndarray:
        key = jax.random.key(int(draw.integers(2**31)))
        shear = jnp.asarray(shear_max * draw.uniform(-1, 1, 2))
        n_steps = sph.steps_between(fluid, times)
        return np.asarray(move(key, shear, jnp.asarray(times), n_steps), np.float32)

    made = make_trajectories(
        make, n_train=n_train, n_test=n_test, n_obs=n_obs, horizon=horizon, seed=seed
    )
    feature = datasets.Array2D((n_obs, 2 * n_grid**2), "float32")
    for split, part in made.items():
        features = datasets.Features(part.features | {"seen": feature})
        rows = part[:]
        states = np.asarray(rows["u"], np.float32)
        columns = rows | {"seen": np.stack([np.asarray(see(u)) for u in states])}
        made[split] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(made)
