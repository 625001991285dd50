"""Lotka-Volterra: trajectories of the predator-prey equations from random starting points."""

from pathlib import Path

import datasets
import numpy as np
from scipy.integrate import solve_ivp

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
    if min(n_train, n_test) < 1 or n_obs < 2 or not horizon > 0 or seed < 0:
        raise DataError(
            "n_train and n_test must be at least 1, n_obs at least 2, horizon positive and seed "
            f"not negative, given {n_train}, {n_test}, {n_obs}, {horizon}, {seed}"
        )
    if not 0 < start_min <= start_max:
        raise DataError(
            f"starting points need 0 < start_min <= start_max, given {start_min}, {start_max}"
        )

    def field(t: float, u: np.ndarray) -> list[float]:
        prey, predators = u
        return [
            alpha * prey - beta * prey * predators,
            delta * prey * predators - gamma * predators,
        ]

    times = np.linspace(0.0, horizon, n_obs)
    features = datasets.Features(
        t=datasets.List(datasets.Value("float64"), length=n_obs),
        u=datasets.Array2D((n_obs, 2), "float64"),
    )
    splits = {}
    for number, (split, n_rows) in enumerate({"train": n_train, "test": n_test}.items()):
        rows = []
        for index in range(n_rows):
            draw = np.random.default_rng([seed, number, index])
            start = draw.uniform(start_min, start_max, 2)
            solution = solve_ivp(
                field, (0.0, horizon), start, "DOP853", times, rtol=1e-12, atol=1e-12
            )
            if not solution.success:
                raise DataError(f"no solution from {start}: {solution.message}")
            rows.append(solution.y.T)
        columns = {"t": np.tile(times, (n_rows, 1)), "u": np.stack(rows)}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)
