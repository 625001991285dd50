"""Hare and lynx: pelts traded by the Hudson's Bay Company, 1900 to 1920, typed in; no download."""

from pathlib import Path

import datasets
import numpy as np

from nodepint_mpi.errors import DataError

FIRST_YEAR = 1900
# Thousands of pelts, one number a year. Sources: README.md beside this file.
HARE = [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1]
HARE += [40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
LYNX = [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4]
LYNX += [8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
GAPS = [(1904, 0), (1904, 1), (1905, 0), (1905, 1), (1908, 1), (1910, 0)]
"""Years in which nothing is kept of hares (0) or lynxes (1)."""


def prepare(folder: Path, *, last_train_year: int = 1912) -> datasets.DatasetDict:
    """Make splits train (the early years) and test (all years), one trajectory each.

    Columns are `t` (years since 1900), `u` (n_obs, 2: hares, lynxes, in thousands), and `kept`
    (n_obs, 2), which is false in some years of train, for trials with gaps. Both splits start in
    1900, so what is forecast in test are its years after `last_train_year`.

    Args:
        folder: Not used.
        last_train_year: Last year of train, 1901 to 1919.
    """
    last_year = FIRST_YEAR + len(HARE) - 1
    if not FIRST_YEAR < last_train_year < last_year:
        raise DataError(
            f"last_train_year must be {FIRST_YEAR + 1} to {last_year - 1}, given {last_train_year}"
        )
    series = np.stack([HARE, LYNX], axis=1)
    n_obs = {"train": last_train_year - FIRST_YEAR + 1, "test": len(series)}
    kept = {split: np.ones((n, 2), bool) for split, n in n_obs.items()}
    for year, animal in GAPS:
        if year < last_train_year:
            kept["train"][year - FIRST_YEAR, animal] = False
    return datasets.DatasetDict(
        {split: _trajectory(series[:n], kept[split]) for split, n in n_obs.items()}
    )


def _trajectory(states: np.ndarray, kept: np.ndarray) -> datasets.Dataset:
    """A dataset of one row."""
    n_obs = len(states)
    features = datasets.Features(
        t=datasets.List(datasets.Value("float64"), length=n_obs),
        u=datasets.Array2D((n_obs, 2), "float64"),
        kept=datasets.List(datasets.List(datasets.Value("bool"), length=2), length=n_obs),
    )
    times = np.arange(n_obs, dtype=np.float64)
    columns = {"t": times[None], "u": states[None], "kept": kept[None]}
    return datasets.Dataset.from_dict(columns, features=features)
