"""Heat in two dimensions: a square plate that is cold along its edges, in closed form."""

from pathlib import Path

import datasets
import numpy as np

from nodepint_mpi.data.trajectories import make_trajectories
from nodepint_mpi.errors import DataError


def prepare(
    folder: Path,
    *,
    n_train: int = 64,
    n_test: int = 16,
    n_obs: int = 11,
    n_points: int = 24,
    horizon: float = 1.0,
    kappa: float = 0.02,
    n_waves: int = 4,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Make splits train and test with columns `t` (n_obs) and `u` (n_obs, n_points^2).

    u_t = kappa (u_xx + u_yy) for 0 < x, y < 1, u = 0 along the edges, from
    u(x, y, 0) = sum over k, l = 1 ... n_waves of a_kl sin(k pi x) sin(l pi y), where a_kl is
    normal with deviation 1 / (k l). A state is a picture of n_points rows, one after the other.

    Args:
        folder: Not used.
        n_train: Trajectories in train.
        n_test: Trajectories in test.
        n_obs: Observations of each, equally spaced from t = 0 to t = `horizon`.
        n_points: Points inside the plate in each direction, 1 / (n_points + 1), ...
        horizon: Time of the last observation.
        kappa: Conductivity, positive.
        n_waves: Waves at the start in each direction, at most n_points.
        seed: Of the amplitudes.
    """
    if not kappa > 0 or not 1 <= n_waves <= n_points:
        raise DataError(
            "kappa must be positive and n_waves 1 to n_points, given "
            f"{kappa}, {n_waves} and {n_points}"
        )
    x = np.arange(1, n_points + 1) / (n_points + 1)
    k = np.arange(1, n_waves + 1)
    waves = np.sin(np.pi * k[:, None] * x)
    rates = kappa * np.pi**2 * (k[:, None] ** 2 + k**2)

    def make(draw: np.random.Generator, times: np.ndarray) -> np.ndarray:
        start = draw.normal(size=(n_waves, n_waves)) / (k[:, None] * k)
        amplitudes = start * np.exp(-times[:, None, None] * rates)
        return (waves.T @ amplitudes @ waves).reshape(len(times), -1)

    return datasets.DatasetDict(
        make_trajectories(
            make, n_train=n_train, n_test=n_test, n_obs=n_obs, horizon=horizon, seed=seed
        )
    )
