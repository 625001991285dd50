"""Duffing: trajectories of the unforced, damped oscillator in a double well."""

from pathlib import Path

import datasets
import numpy as np

from nodepint_mpi.data.trajectories import make_trajectories, solve
from nodepint_mpi.errors import DataError


def prepare(
    folder: Path,
    *,
    n_train: int = 64,
    n_test: int = 16,
    n_obs: int = 101,
    horizon: float = 10.0,
    alpha: float = -1.0,
    beta: float = 1.0,
    delta: float = 0.3,
    start_max: float = 1.5,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Make splits train and test with columns `t` (n_obs) and `u` (n_obs, 2: x, x').

    x'' + delta x' + alpha x + beta x^3 = 0

    Args:
        folder: Not used.
        n_train: Trajectories in train.
        n_test: Trajectories in test.
        n_obs: Observations of each, equally spaced from t = 0 to t = `horizon`, at least 2.
        horizon: Time of the last observation.
        alpha: Linear stiffness; negative for a double well.
        beta: Cubic stiffness.
        delta: Damping.
        start_max: x and x' start uniformly between minus this and this.
        seed: Of the starting points; trajectory i of a split depends on (seed, split, i) alone.
    """
    if not start_max > 0:
        raise DataError(f"start_max must be positive, given {start_max}")

    def field(t: float, u: np.ndarray) -> np.ndarray:
        x, v = u
        return np.array([v, -delta * v - alpha * x - beta * x**3])

    def make(draw: np.random.Generator, times: np.ndarray) -> np.ndarray:
        return solve(field, draw.uniform(-start_max, start_max, 2), times)

    return datasets.DatasetDict(
        make_trajectories(
            make, n_train=n_train, n_test=n_test, n_obs=n_obs, horizon=horizon, seed=seed
        )
    )
