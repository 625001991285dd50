"""Lorenz: short pieces of trajectories on the chaotic attractor."""

from pathlib import Path

import datasets
import numpy as np

from nodepint_mpi.data.trajectories import make_trajectories, solve
from nodepint_mpi.errors import DataError

CENTER = np.array([0.0, 0.0, 25.0])
SCALE = np.array([10.0, 10.0, 10.0])


def prepare(
    folder: Path,
    *,
    n_train: int = 64,
    n_test: int = 16,
    n_obs: int = 41,
    horizon: float = 1.0,
    sigma: float = 10.0,
    rho: float = 28.0,
    beta: float = 8.0 / 3.0,
    lead: float = 10.0,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Make splits train and test with columns `t` (n_obs) and `u` (n_obs, 3).

    x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z; u is (x, y, z - 25) / 10.

    Args:
        folder: Not used.
        n_train: Trajectories in train.
        n_test: Trajectories in test.
        n_obs: Observations of each, equally spaced from t = 0 to t = `horizon`.
        horizon: Time of the last observation; errors grow by a factor e in about 1.1.
        sigma: Prandtl number.
        rho: Rayleigh number over its critical one.
        beta: Shape of the rolls.
        lead: Time from a random start near the attractor to t = 0; not negative.
        seed: Of the random starts.
    """
    if not lead >= 0:
        raise DataError(f"lead must not be negative, given {lead}")

    def field(t: float, u: np.ndarray) -> np.ndarray:
        x, y, z = u
        return np.array([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])

    def make(draw: np.random.Generator, times: np.ndarray) -> np.ndarray:
        start = CENTER + SCALE * draw.uniform(-1.0, 1.0, 3)
        if lead > 0:
            start = solve(field, start, np.array([0.0, lead]))[-1]
        return (solve(field, start, times) - CENTER) / SCALE

    return datasets.DatasetDict(
        make_trajectories(
            make, n_train=n_train, n_test=n_test, n_obs=n_obs, horizon=horizon, seed=seed
        )
    )
