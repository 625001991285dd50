"""The section on how the paths of a stochastic model lie about what was observed."""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from nodepint_mpi.pages.lines import draw_lines
from nodepint_mpi.pages.parts import Picture, Section, Table, number
from nodepint_mpi.report.trained import Model

SHARES = (50, 90)
"""Per cent of the paths in a band about their median."""


class Spread(NamedTuple):
    """Of paths about observations, (samples, times) each, NaN where nothing is known.

    The energy score is `misfit`, the mean distance of a path from the observation, less `spread`,
    half of the mean distance of two paths. `inside` has the share of observed numbers within each
    band, where paths have parted.
    """

    misfit: np.ndarray
    spread: np.ndarray
    inside: dict[int, np.ndarray]

    @property
    def score(self) -> np.ndarray:
        """The energy score."""
        return self.misfit - self.spread


def path_energy(model: Model) -> Section | None:
    """Energy score and coverage of the bands, over time."""
    seen = model.predicted
    if seen is None or seen.paths is None or seen.is_labels:
        return None
    n_samples, _, n_paths = seen.paths.shape[:3]
    found = measure_spread(seen.paths, seen.targets[:n_samples])
    rows = [
        ("energy score", number(_mean(found.score))),
        ("mean distance of a path from the observation", number(_mean(found.misfit))),
        ("half the mean distance of two paths", number(_mean(found.spread))),
    ]
    for share, inside in found.inside.items():
        mean = _mean(inside)
        shown = "the paths do not part" if np.isnan(mean) else f"{mean:.1%}"
        rows.append((f"observations within the {share} % band", shown))
    what = f"{n_paths} paths of each of {n_samples} test samples, step {seen.step}."
    parts: list[Table | Picture] = []
    if seen.times.ndim == 1:  # else no two scores are of the same time
        caption = (
            f"Energy score (lower is better), and how many observations are within the bands of "
            f"{what} If the paths had the distribution of the observations, half would be within "
            "the narrow band and nine of ten within the wide one. Paths have no measurement noise."
        )
        parts.append(Picture("path_energy", draw_spread(seen.times, found), caption))
    parts.append(Table(("over all times", "value"), rows, what))
    return Section("Energy of the paths", [*parts])


def measure_spread(paths: np.ndarray, targets: np.ndarray) -> Spread:
    """Compare paths (samples, times, paths, ...) with observations (samples, times, ...). Local.

    What was not observed is NaN. Distances are over all numbers that were observed at one time.
    """
    n_paths = paths.shape[2]
    paths = paths.reshape(*paths.shape[:3], -1).astype(float)
    targets = targets.reshape(*targets.shape[:2], -1).astype(float)
    known = np.isfinite(targets) & np.all(np.isfinite(paths), axis=2)
    there = np.any(known, axis=2)
    paths = np.where(known[:, :, None], paths, 0.0)
    targets = np.where(known, targets, 0.0)
    misfit = np.mean(np.linalg.norm(paths - targets[:, :, None], axis=3), axis=2)
    apart = np.zeros(misfit.shape)
    for k in range(1, n_paths):  # all pairs, each once
        apart += np.sum(np.linalg.norm(paths[:, :, k:] - paths[:, :, :-k], axis=3), axis=2)
    apart /= n_paths * (n_paths - 1) / 2
    parted = known & (np.ptp(paths, axis=2) > 0)
    inside = {}
    for share in SHARES:
        low, high = np.percentile(paths, [50 - share / 2, 50 + share / 2], axis=2)
        within = parted & (low <= targets) & (targets <= high)
        counts = np.sum(parted, axis=2)
        inside[share] = np.where(counts > 0, np.sum(within, axis=2) / np.maximum(counts, 1), np.nan)
    gone = np.where(there, 0.0, np.nan)
    return Spread(misfit + gone, apart / 2 + gone, inside)


def draw_spread(times: np.ndarray, found: Spread) -> Figure:
    """The score with its two parts above, the share of observations in each band below."""
    figure = Figure(figsize=(7.5, 5.4), layout="constrained")
    energy, bands = figure.subplots(2, 1, sharex=True)
    parts = {
        "energy score": found.score,
        "distance from the observation": found.misfit,
        "half the distance of two paths": found.spread,
    }
    draw_lines(energy, times, {name: _along_time(part) for name, part in parts.items()}, log=False)
    energy.set_ylabel("in units of the state")
    energy.set_ylim(bottom=0)
    lines = {
        f"within the {share} % band": _along_time(part) for share, part in found.inside.items()
    }
    draw_lines(bands, times, lines, log=False)
    for share in SHARES:
        bands.axhline(share / 100, color="gray", linestyle=":", linewidth=1.2)
    bands.set_ylim(0, 1.02)
    bands.set_ylabel("share of observations")
    bands.set_xlabel("time")
    for panel in (energy, bands):
        panel.grid(alpha=0.3)
    return figure


def _mean(values: np.ndarray) -> float:
    """Of what is known; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(np.mean(known)) if known.size else np.nan


def _along_time(values: np.ndarray) -> np.ndarray:
    """Means of what is known at every time, over the samples."""
    return np.array([_mean(at_time) for at_time in values.T])
