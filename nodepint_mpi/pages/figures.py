"""Figures of runs and of bench results, as PNG files. Local; drawn by rank 0."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nodepint_mpi.io.history import every_step
from nodepint_mpi.io.records import read_table
from nodepint_mpi.pages.lines import MARKERS, STYLES, draw_loss

FLOOR = 1e-16
"""Smallest error that a logarithmic axis shows."""
MANY_COMPONENTS = 8


def plot_losses(folder: Path) -> Path:
    """Loss, also on the validation set if there is one, and sweeps of every step.

    From the run's history, and from its records where that has nothing. Local.
    """
    records = read_table(folder)
    columns = every_step(folder, records)
    figure = Figure(figsize=(7, 5), layout="constrained")
    losses, sweeps = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    draw_loss(losses, columns["step"], columns["loss"], records)
    losses.grid(alpha=0.3)
    for style, key, label in (("-", "sweeps", "forward"), ("--", "adjoint_sweeps", "adjoint")):
        sweeps.plot(columns["step"], columns[key], style, color="black", label=label)
    sweeps.set_ylabel("sweeps per step")
    sweeps.set_xlabel("optimizer step")
    sweeps.set_ylim(bottom=0)
    sweeps.legend(fontsize="small")
    sweeps.grid(alpha=0.3)
    return save_figure(figure, folder / "loss.png")


def draw_trajectories(
    times: np.ndarray,
    targets: np.ndarray,
    predictions: np.ndarray,
    trained_until: float,
) -> Figure:
    """Observed trajectories as dots, predicted ones as lines; one panel a sample.

    Args:
        times: (times,), or (samples, times) where samples have their own.
        targets: (samples, times, components), NaN where nothing was observed.
        predictions: Of the same axes, NaN where nothing is predicted; (samples, times, paths,
            components) for a stochastic model, drawn as the range of its paths.
        trained_until: The last time of training.
    """
    n_shown = len(targets)
    figure = Figure(figsize=(7, 2.2 * n_shown + 0.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(n_shown, 1, sharex=True))
    components = range(min(targets.shape[-1], len(STYLES)))
    for row, panel in enumerate(panels):
        for i in components:
            color = matplotlib.colormaps["viridis"](i / max(len(components), 2))
            own = times if times.ndim == 1 else times[row]
            panel.plot(own, targets[row, :, i], ".", color=color, markersize=4)
            lines = predictions[row, ..., i]
            if lines.ndim == 2:
                lines = _draw_fan(panel, own, lines, color)
            made = np.isfinite(lines)
            panel.plot(own[made], lines[made], STYLES[i], color=color, label=f"component {i}")
        if trained_until < np.max(times):
            panel.axvline(trained_until, color="gray", linewidth=0.8)
            panel.set_title("trained left of the line", fontsize="small")
        panel.set_ylabel(f"state, test sample {row}")
        panel.grid(alpha=0.3)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(STYLES),
        fontsize="small",
        title="dots: observed, lines: predicted"
        + ("; medians, with 50 % and 90 % of the paths" if predictions.ndim > targets.ndim else ""),
    )
    panels[-1].set_xlabel("time")
    return figure


def _draw_fan(panel: Axes, times: np.ndarray, paths: np.ndarray, color: Any) -> np.ndarray:
    """Shade where the paths (times, paths) are; their median."""
    made = np.all(np.isfinite(paths), axis=1)
    for share, alpha in ((90, 0.15), (50, 0.3)):
        low, high = np.percentile(paths[made], [50 - share / 2, 50 + share / 2], axis=1)
        panel.fill_between(times[made], low, high, color=color, alpha=alpha, linewidth=0)
    return np.median(paths, axis=1)


def draw_labels(images: np.ndarray, labels: np.ndarray, guesses: np.ndarray) -> Figure:
    """Images with true and predicted labels."""
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
    figure.suptitle("predicted label (bold where wrong)", fontsize="small")
    return figure


def draw_reduced(
    times: np.ndarray,
    full: np.ndarray,
    reduced: np.ndarray,
    truth: np.ndarray | None,
) -> Figure:
    """The first test sample by the full and by the reduced model; labels as a scatter.

    Args:
        times: Observation times.
        full: Predictions of the full model, (samples, times, components).
        reduced: Those of the reduced model.
        truth: The first sample's observations, (times, components); None for labels.
    """
    if truth is None:
        return _scatter_logits(full, reduced)
    if truth.shape[1] > MANY_COMPONENTS:
        return _space_time(times, truth, full[0], reduced[0])
    return _lines(times, truth, full[0], reduced[0])


def _space_time(
    times: np.ndarray, truth: np.ndarray, full: np.ndarray, reduced: np.ndarray
) -> Figure:
    """Pictures over component and time, and what lies between the two models."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 4, sharex=True, sharey=True)
    pictures = {
        "observed": truth,
        "full model": full,
        "reduced model": reduced,
        "|full - reduced|": np.abs(full - reduced),
    }
    low, high = min(truth.min(), full.min()), max(truth.max(), full.max())
    images = []
    for panel, (name, values) in zip(panels, pictures.items(), strict=True):
        is_state = name != "|full - reduced|"
        limits = (low, high) if is_state else (0.0, values.max())
        image = panel.pcolormesh(
            np.arange(values.shape[1]), times, values, cmap="viridis" if is_state else "gray_r",
            vmin=limits[0], vmax=limits[1], shading="gouraud", rasterized=True,
        )  # fmt: skip
        panel.set_title(name, fontsize="medium")
        panel.set_xlabel("component of the state")
        images.append(image)
    figure.colorbar(images[0], ax=panels[:3], label="state", shrink=0.9)
    figure.colorbar(images[3], ax=panels[3], label="difference", shrink=0.9)
    panels[0].set_ylabel("time")
    return figure


def _lines(times: np.ndarray, truth: np.ndarray, full: np.ndarray, reduced: np.ndarray) -> Figure:
    """One panel a component."""
    n_shown = truth.shape[1]
    figure = Figure(figsize=(7, 1.6 * n_shown + 1.0), layout="constrained")
    panels = figure.subplots(n_shown, 1, sharex=True, squeeze=False)[:, 0]
    for i, panel in enumerate(panels):
        panel.plot(times, truth[:, i], ".", color="gray", markersize=4, label="observed")
        panel.plot(times, full[:, i], "-", color="black", label="full model")
        panel.plot(times, reduced[:, i], "--", color="tab:orange", label="reduced model")
        panel.set_ylabel(f"component {i}")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    panels[-1].set_xlabel("time")
    return figure


def _scatter_logits(full: np.ndarray, reduced: np.ndarray) -> Figure:
    """What the two models predict for all test samples."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    panel = figure.subplots()
    panel.plot(full.ravel(), reduced.ravel(), ".", color="black", markersize=2)
    panel.axline((0, 0), slope=1, color="gray", linewidth=0.8)
    panel.set_xlabel("prediction of the full model")
    panel.set_ylabel("prediction of the reduced model")
    return figure


def plot_sweeps(path: Path, result: dict[str, Any]) -> Path:
    """Error against sweeps and against work, forward and adjoint, a line per method."""
    figure = Figure(figsize=(10, 8.5), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    columns = (("sweeps", "sweeps"), ("work", "fine-solve equivalents per slice"))
    rows = (
        ("forward", "relative error of the states"),
        ("adjoint", "relative error of the gradient"),
    )
    for i, (direction, ylabel) in enumerate(rows):
        for panel, (key, xlabel) in zip(panels[i], columns, strict=True):
            for number, row in enumerate(result["methods"]):
                errors = np.maximum(row[direction]["errors"], FLOOR)
                x = row[direction]["work"] if key == "work" else np.arange(len(errors))
                panel.semilogy(
                    x, errors, STYLES[number % len(STYLES)], marker=MARKERS[number % len(MARKERS)],
                    color=matplotlib.colormaps["viridis"](0.9 * number / len(result["methods"])),
                    markersize=5, markerfacecolor="none", linewidth=1, label=row["method"],
                )  # fmt: skip
            panel.axhline(result["tol"], color="gray", linewidth=0.8)
            panel.set_xlabel(f"{direction} {xlabel}" if key == "sweeps" else xlabel)
            panel.grid(alpha=0.3)
            panel.set_ylim(FLOOR / 3, 30)
        panels[i, 0].set_ylabel(f"{direction}: {ylabel}")
        panels[i, 1].set_xscale("log")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"{result['problem']}, {result['n_slices']} slices; gray: tolerance")
    return save_figure(figure, path)


def plot_contest(path: Path, result: dict[str, Any]) -> Path:
    """Loss against time, a line per contestant."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(result["contestants"]):
        time = row["step_s"] * np.arange(1, len(row["losses"]) + 1)
        style, marker = STYLES[number % len(STYLES)], MARKERS[number % len(MARKERS)]
        axes.semilogy(time, row["losses"], style, marker=marker, markevery=0.2, label=row["name"])
    axes.axhline(result["target_loss"], color="gray", linewidth=0.8)
    axes.set_xlabel("time without compilation, s")
    axes.set_ylabel("training loss")
    axes.legend(fontsize="small")
    axes.set_title(f"{result['name']}; gray: the loss that plain diffrax ends with")
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and return its path. Local."""
    figure.savefig(path, dpi=150)
    return path
