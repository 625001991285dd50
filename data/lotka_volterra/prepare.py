"""Lotka-Volterra: trajectories of the predator-prey equations from random starting points."""

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
    alpha: float = 1.5,
    beta: float = 1.0,
    gamma: float = 3.0,
    delta: float = 1.0,
    start_min: float = 1.0,
    start_max: float = 3.0,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Make splits train and test with columns `t` (n_obs) and `u` (n_obs, 2: prey, predators).

    prey' = alpha prey - beta prey predators,  predators' = delta prey predators - gamma predators

    Args:
        folder: Not used.
        n_train: Trajectories in train.
        n_test: Trajectories in test.
        n_obs: Observations of each, equally spaced from t = 0 to t = `horizon`, at least 2.
        horizon: Time of the last observation.
        alpha: Growth of the prey.
        beta: Loss of prey per predator.
        gamma: Death of predators.
        delta: Growth of predators per prey.
        start_min: Both populations start uniformly between this, positive,
        start_max: and this.
        seed: Of the starting points; trajectory i of a split depends on (seed, split, i) alone.
    """
    if not 0 < start_min <= start_max:
        raise DataError(
            f"starting points need 0 < start_min <= start_max, given {start_min}, {start_max}"
        )

    def field(t: float, u: np.ndarray) -> np.ndarray:
        prey, predators = u
        meetings = prey * predators
        return np.array([alpha * prey - beta * meetings, delta * meetings - gamma * predators])

    def make(draw: np.random.Generator, times: np.ndarray) -> np.ndarray:
        return solve(field, draw.uniform(start_min, start_max, 2), times)

    return datasets.DatasetDict(
        make_trajectories(
            make, n_train=n_train, n_test=n_test, n_obs=n_obs, horizon=horizon, seed=seed
        )
    )
