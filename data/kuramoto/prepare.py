"""Kuramoto: coupled phases that start anywhere on the circle and fall into step."""

from pathlib import Path

import datasets
import numpy as np

from nodepint_mpi.data.trajectories import make_trajectories, solve
from nodepint_mpi.errors import DataError


def prepare(
    folder: Path,
    *,
    n_train: int = 32,
    n_test: int = 16,
    n_obs: int = 26,
    horizon: float = 5.0,
    n_phases: int = 8,
    coupling: float = 2.0,
    spread: float = 1.0,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Make splits train and test with columns `t` (n_obs) and `u` (n_obs, n_phases), in radians.

    u_i' = w_i + (coupling / n) sum_j sin(u_j - u_i),  w_i evenly over [-spread, spread]

    Args:
        folder: Not used.
        n_train: Trajectories in train.
        n_test: Trajectories in test.
        n_obs: Observations of each, equally spaced from t = 0 to t = `horizon`.
        horizon: Time of the last observation.
        n_phases: Number of oscillators, at least 2.
        coupling: Strength of the coupling.
        spread: Of the oscillators' own frequencies.
        seed: Of the starting phases, uniform on the circle.
    """
    if n_phases < 2:
        raise DataError(f"n_phases must be at least 2, given {n_phases}")
    frequencies = spread * np.linspace(-1.0, 1.0, n_phases)

    def field(t: float, u: np.ndarray) -> np.ndarray:
        return frequencies + coupling * np.mean(np.sin(u - u[:, None]), axis=1)

    def make(draw: np.random.Generator, times: np.ndarray) -> np.ndarray:
        return solve(field, draw.uniform(0.0, 2 * np.pi, n_phases), times)

    return datasets.DatasetDict(
        make_trajectories(
            make, n_train=n_train, n_test=n_test, n_obs=n_obs, horizon=horizon, seed=seed
        )
    )
