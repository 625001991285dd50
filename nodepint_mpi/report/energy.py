"""The section on how few directions hold the states."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nodepint_mpi.pages.lines import draw_lines
from nodepint_mpi.pages.parts import Picture, Section
from nodepint_mpi.report.trained import Model

N_SHOWN = 128
FLOOR = 1e-14
"""Shares below are rounding, and not drawn."""
FEW = 4
"""A state with fewer entries needs no basis."""


def basis_energy(model: Model) -> Section | None:
    """The share of the states' sum of squares that the first directions leave out."""
    if model.predicted is None:
        return None
    snapshots, bases = model.predicted.snapshots, model.predicted.bases
    if snapshots.shape[1] < FEW and not bases:
        return None
    lines = {"best possible for these states": energy_left(snapshots, None)}
    lines |= {name: energy_left(snapshots, rows) for name, rows in bases.items()}
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    panel = figure.subplots()
    for i, (name, left) in enumerate(lines.items()):
        shown = left[: N_SHOWN + 1]
        shown = shown[: 1 + int(np.flatnonzero(shown > FLOOR)[-1])]
        draw_lines(panel, np.arange(len(shown)), {name: shown}, first=i)
    panel.set_xlabel("number of directions")
    panel.set_ylabel("share of the sum of squares left out")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    what = "observations" if "learned basis" in bases else "states"
    caption = (
        f"{len(snapshots)} {what} of test samples, of {snapshots.shape[1]} entries each, against "
        "the number of directions that are kept of a basis."
    )
    return Section("Energy of the basis", [Picture("basis_energy", figure, caption)])


def energy_left(snapshots: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """The share of the snapshots' squares outside the first k directions, k = 0, 1, ... Local.

    Args:
        snapshots: (snapshots, entries).
        rows: Orthonormal directions (directions, entries); None for the best ones there are.
    """
    if rows is None:
        held = np.linalg.svd(snapshots, compute_uv=False) ** 2
    else:
        held = np.sum(np.square(snapshots @ rows.T), axis=0)
    total = np.sum(np.square(snapshots))
    left = 1 - np.cumsum(held) / total if total > 0 else np.zeros(len(held))
    return np.concatenate([[1.0], np.maximum(left, 0.0)])
