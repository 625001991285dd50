"""Figures of a run, as PNG files in the run directory. Local; drawn by rank 0."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nodepint_mpi.io.records import read_records

STYLES = ("-", "--", "-.", ":")


def plot_losses(folder: Path) -> Path:
    """Loss and sweeps per step, from the run's records."""
    records = read_records(folder)
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(7, 5), layout="constrained")
    losses, sweeps = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    losses.semilogy(steps, [record["loss"] for record in records], color="black")
    losses.set_ylabel("training loss")
    losses.grid(alpha=0.3)
    for style, key, label in (("-", "sweeps", "forward"), ("--", "adjoint_sweeps", "adjoint")):
        sweeps.plot(steps, [record[key] for record in records], style, color="black", label=label)
    sweeps.set_ylabel("sweeps per step")
    sweeps.set_xlabel("optimiser step")
    sweeps.set_ylim(bottom=0)
    sweeps.legend(fontsize="small")
    sweeps.grid(alpha=0.3)
    return _save(figure, folder / "loss.png")


def plot_trajectories(
    folder: Path,
    target_times: np.ndarray,
    targets: np.ndarray,
    times: np.ndarray,
    predictions: np.ndarray,
    trained_until: float,
) -> Path:
    """Observed trajectories as dots, predicted ones as lines; one panel a sample."""
    n_shown = len(targets)
    figure = Figure(figsize=(7, 2.2 * n_shown + 0.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(n_shown, 1, sharex=True))
    components = range(min(targets.shape[-1], len(STYLES)))
    for row, panel in enumerate(panels):
        for i in components:
            color = matplotlib.colormaps["viridis"](i / max(len(components), 2))
            panel.plot(target_times, targets[row, :, i], ".", color=color, markersize=4)
            panel.plot(
                times, predictions[row, :, i], STYLES[i], color=color, label=f"component {i}"
            )
        if trained_until < times[-1]:
            panel.axvline(trained_until, color="grey", linewidth=0.8)
            panel.set_title("trained left of the line", fontsize="small")
        panel.set_ylabel(f"test sample {row}")
        panel.grid(alpha=0.3)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(STYLES),
        fontsize="small",
        title="dots: observed, lines: predicted",
    )
    panels[-1].set_xlabel("time")
    return _save(figure, folder / "trajectories.png")


def plot_labels(folder: Path, images: np.ndarray, labels: np.ndarray, guesses: np.ndarray) -> Path:
    """The first test images with true and predicted labels."""
    columns = 8
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(8, 1.25 * rows + 0.3), layout="constrained")
    panels = np.atleast_2d(figure.subplots(rows, columns)).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, image, label, guess in zip(panels, images, labels, guesses, strict=False):
        panel.imshow(image, cmap="gray_r")
        right = label == guess
        title = f"{guess}" if right else f"{guess}, is {label}"
        panel.set_title(title, fontsize="small", fontweight="normal" if right else "bold")
    figure.suptitle("predicted digit (bold where wrong)", fontsize="small")
    return _save(figure, folder / "predictions.png")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
