"""Computed trajectories as a dataset: what the recipe of a dynamical system has in common."""

from collections.abc import Callable

import datasets
import numpy as np
from scipy.integrate import solve_ivp

from nodepint_mpi.errors import DataError


def make_trajectories(
    make: Callable[[np.random.Generator, np.ndarray], np.ndarray],
    *,
    n_train: int,
    n_test: int,
    n_obs: int,
    horizon: float,
    seed: int,
) -> dict[str | datasets.NamedSplit, datasets.Dataset]:
    """Splits train and test with columns `t` (n_obs) and `u` (n_obs, state). Local.

    Args:
        make: From a source of random numbers and the observation times to one trajectory,
            (n_obs, state). The source depends on (seed, split, row) alone, so that a larger
            `n_train` adds trajectories and changes neither the others nor test.
        n_train: Trajectories in train.
        n_test: Trajectories in test.
        n_obs: Observations of each, equally spaced from t = 0 to t = `horizon`, at least 2.
        horizon: Time of the last observation.
        seed: Of the draws, not negative.

    Raises:
        DataError: for numbers out of range.
    """
    if min(n_train, n_test) < 1 or n_obs < 2 or not horizon > 0 or seed < 0:
        raise DataError(
            "n_train and n_test must be at least 1, n_obs at least 2, horizon positive and seed "
            f"not negative, given {n_train}, {n_test}, {n_obs}, {horizon}, {seed}"
        )
    times = np.linspace(0.0, horizon, n_obs)
    splits: dict[str | datasets.NamedSplit, datasets.Dataset] = {}
    for number, (split, n_rows) in enumerate({"train": n_train, "test": n_test}.items()):
        states = np.stack(
            [make(np.random.default_rng([seed, number, i]), times) for i in range(n_rows)]
        )
        features = datasets.Features(
            t=datasets.List(datasets.Value("float64"), length=n_obs),
            u=datasets.Array2D(states.shape[1:], states.dtype.name),
        )
        columns = {"t": np.tile(times, (n_rows, 1)), "u": states}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def solve(
    field: Callable[[float, np.ndarray], np.ndarray], start: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """The solution of u' = field(t, u) from `start`, (times, state), to 1e-12 a step. Local.

    Raises:
        DataError: if there is none.
    """
    solution = solve_ivp(
        field, (times[0], times[-1]), start, "DOP853", times, rtol=1e-12, atol=1e-12
    )
    if not solution.success:
        raise DataError(f"no solution from {start}: {solution.message}")
    return solution.y.T
