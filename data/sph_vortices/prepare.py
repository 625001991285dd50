"""SPH vortices: decaying Taylor-Green vortices in a shear, by particles, seen on a grid."""

from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.errors import DataError
from nodepint_mpi.run.imports import import_file

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
    if min(n_train, n_test, n_grid) < 1 or n_obs < 2 or not horizon > 0 or seed < 0:
        raise DataError(
            "n_train, n_test and n_grid must be at least 1, n_obs at least 2, horizon positive and "
            f"seed not negative, given {n_train}, {n_test}, {n_grid}, {n_obs}, {horizon}, {seed}"
        )
    if n_side < 8 or not viscosity > 0 or not 0 <= shear_max <= 1:
        raise DataError(
            "n_side must be at least 8, viscosity positive and shear_max from 0 to 1, given "
            f"{n_side}, {viscosity}, {shear_max}"
        )
    sph = import_file(folder / USES[0], "USES")
    fluid = sph.Fluid(n_side, viscosity)
    times = np.linspace(0.0, horizon, n_obs)
    n_steps = sph.steps_between(fluid, times)
    points = sph.grid(n_grid)

    settled = sph.settle(jax.random.key(seed), n_side)

    @jax.jit
    def observe(shear):
        def velocity(x):
            return sph.taylor_green(x, 0.0, viscosity) + shear[None] * jnp.sin(
                2 * jnp.pi * x[:, ::-1]
            )

        start = sph.begin(fluid, settled, velocity)
        states = sph.simulate(fluid, start, jnp.asarray(times), n_steps=n_steps)
        on_grid = jax.lax.map(lambda u: sph.velocity_at(points, u, fluid.spacing), states)
        return on_grid.reshape(n_obs, -1)

    features = datasets.Features(
        t=datasets.List(datasets.Value("float64"), length=n_obs),
        u=datasets.Array2D((n_obs, 2 * n_grid**2), "float32"),
    )
    splits = {}
    for number, (split, n_rows) in enumerate({"train": n_train, "test": n_test}.items()):
        rows = []
        for index in range(n_rows):
            draw = np.random.default_rng([seed, number, index])
            shear = jnp.asarray(shear_max * draw.uniform(-1, 1, 2))
            rows.append(np.asarray(observe(shear), np.float32))
        columns = {"t": np.tile(times, (n_rows, 1)), "u": np.stack(rows)}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)
