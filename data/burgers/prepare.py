"""Burgers: smooth waves that steepen and decay, on a fine grid, in closed form."""

from pathlib import Path

import datasets
import numpy as np

from nodepint_mpi.data.trajectories import make_trajectories
from nodepint_mpi.errors import DataError


def prepare(
    folder: Path,
    *,
    n_train: int = 40,
    n_test: int = 16,
    n_obs: int = 11,
    n_points: int = 1024,
    horizon: float = 1.0,
    nu: float = 0.02,
    first_min: float = 0.5,
    first_max: float = 1.0,
    second_max: float = 0.3,
    shift_max: float = 0.05,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Make splits train and test with columns `t` (n_obs) and `u` (n_obs, n_points).

    u_t + u u_x = nu u_xx on the circle 0 <= x < 1, from
    u(x, 0) = a sin(2 pi (x - s)) + b sin(4 pi (x - s)).

    The solution is exact: by Cole and Hopf u = -2 nu w_x / w, where w solves the heat equation.

    Args:
        folder: Not used.
        n_train: Trajectories in train.
        n_test: Trajectories in test.
        n_obs: Observations of each, equally spaced from t = 0 to t = `horizon`, at least 2.
        n_points: Grid points x = 0, 1 / n_points, ..., an even number, at least 64.
        horizon: Time of the last observation.
        nu: Viscosity.
        first_min: a is uniform between this
        first_max: and this,
        second_max: b between minus this and this,
        shift_max: s between minus this and this.
        seed: Of the draws; trajectory i of a split depends on (seed, split, i) alone.
    """
    if n_points < 64 or n_points % 2 or not 0 <= first_min <= first_max:
        raise DataError(
            "n_points must be even and at least 64, and 0 <= first_min <= first_max, given "
            f"{n_points}, {first_min}, {first_max}"
        )
    if not nu * 100 >= first_max + abs(second_max):
        raise DataError(
            f"nu = {nu} is too small for waves of height {first_max + abs(second_max)}: the closed "
            "form loses its digits; take a larger nu"
        )
    x = np.arange(n_points) / n_points

    def make(draw: np.random.Generator, times: np.ndarray) -> np.ndarray:
        first = draw.uniform(first_min, first_max)
        second, shift = draw.uniform(-1.0, 1.0, 2) * [second_max, shift_max]
        return _solve(first, second, x - shift, times, nu)

    return datasets.DatasetDict(
        make_trajectories(
            make, n_train=n_train, n_test=n_test, n_obs=n_obs, horizon=horizon, seed=seed
        )
    )


def _solve(first: float, second: float, x: np.ndarray, times: np.ndarray, nu: float) -> np.ndarray:
    """u at all times, (times, points); see Hopf (1950), Comm. Pure Appl. Math. 3, 201-230."""
    wave = 2 * np.pi
    potential = -first / wave * np.cos(wave * x) - second / (2 * wave) * np.cos(2 * wave * x)
    modes = np.fft.rfft(np.exp((potential.min() - potential) / (2 * nu)))
    k = 1j * wave * np.arange(len(modes))
    modes = modes * np.exp(nu * np.outer(times, (k**2).real))
    return -2 * nu * np.fft.irfft(k * modes, len(x)) / np.fft.irfft(modes, len(x))
