"""The section on true against predicted trajectories."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nodepint_mpi.pages.figures import MANY_COMPONENTS, draw_trajectories
from nodepint_mpi.pages.lines import draw_lines
from nodepint_mpi.pages.parts import Picture, Section, Table, number
from nodepint_mpi.report.trained import Model, Predicted
from nodepint_mpi.training.evaluate import N_SHOWN


def trajectories(model: Model) -> Section | None:
    """Some trajectories to look at, and how the error grows along all of them."""
    seen = model.predicted
    if seen is None or seen.is_labels:
        return None
    sizes = relative_errors(seen)
    worst = int(np.argmax(sizes))
    whole = np.linalg.norm(errors_of(seen)) / np.linalg.norm(np.nan_to_num(seen.targets))
    rows = [(name, number(value)) for name, value in seen.scores.items()]
    rows += [
        ("relative L2 error, all test samples", number(float(whole))),
        ("relative L2 error, median sample", number(float(np.median(sizes)))),
        (f"relative L2 error, worst sample ({worst})", number(float(sizes[worst]))),
    ]
    n_samples = f"{len(seen.targets)} test samples, step {seen.step}."
    along_time = []
    if seen.times.ndim == 1:  # else no two errors are of the same time
        caption = "Error along time, over " + n_samples
        along_time.append(Picture("error_along_time", _along_time(seen), caption))
    return Section(
        "Trajectories",
        [
            Picture("trajectories", *_pictures(seen)),
            *_portrait(seen),
            *along_time,
            Table(("of the newest checkpoint", "value"), rows, n_samples),
        ],
    )


def relative_errors(seen: Predicted) -> np.ndarray:
    """Relative L2 error of every sample, over times and components. Local."""
    axes = tuple(range(1, seen.targets.ndim))
    squares = np.sum(np.square(errors_of(seen)), axis=axes)
    return np.sqrt(squares / np.maximum(np.nansum(np.square(seen.targets), axis=axes), 1e-300))


def errors_of(seen: Predicted) -> np.ndarray:
    """Predictions minus observations, zero where there is none. Local."""
    return np.nan_to_num(seen.predictions - seen.targets)


def _pictures(seen: Predicted) -> tuple[Figure, str]:
    if seen.targets.shape[-1] > MANY_COMPONENTS and seen.times.ndim == 1:
        return _space_time(seen), "Observed and predicted state over component and time."
    shown = slice(N_SHOWN["trajectories"])
    figure = draw_trajectories(
        seen.times if seen.times.ndim == 1 else seen.times[shown],
        seen.targets[shown],
        (seen.predictions if seen.paths is None else seen.paths)[shown],
        seen.trained_until,
    )
    caption = "The first test samples, observed and predicted from their first observation"
    if seen.paths is not None:
        n_paths = seen.paths.shape[2]
        caption += f": the median of {n_paths} paths of each, and where half and 90 % of them are"
    return figure, caption + "."


def _portrait(seen: Predicted) -> list[Picture]:
    """The first test samples in the plane, or the space, of their states, if these have two or
    three components and one prediction each."""
    n_components = seen.targets.shape[-1]
    if seen.targets.ndim != 3 or n_components not in (2, 3) or seen.paths is not None:
        return []
    shown = min(N_SHOWN["trajectories"], len(seen.targets))
    figure = Figure(figsize=(7.5, 6.0), layout="constrained")
    kind = {"projection": "3d"} if n_components == 3 else {}
    panel: Any = figure.add_subplot(1, 1, 1, **kind)
    for row in range(shown):
        color = matplotlib.colormaps["viridis"](0.85 * row / max(shown - 1, 1))
        panel.plot(*seen.targets[row].T, ".", color=color, markersize=4)
        panel.plot(*seen.predictions[row].T, "-", color=color, linewidth=1.4, label=f"sample {row}")
    panel.set_xlabel("component 0")
    panel.set_ylabel("component 1")
    if n_components == 3:
        panel.set_zlabel("component 2")
    else:
        panel.grid(alpha=0.3)
    panel.legend(fontsize="small", title="dots: observed, lines: predicted", title_fontsize="small")
    return [Picture("phase_portrait", figure, "Phase portrait of the first test samples.")]


def _space_time(seen: Predicted) -> Figure:
    """Two samples: observed, predicted, difference."""
    n_shown = min(2, len(seen.targets))
    figure = Figure(figsize=(8.5, 2.9 * n_shown), layout="constrained")
    panels = figure.subplots(n_shown, 3, sharex=True, sharey=True, squeeze=False)
    for row, line in enumerate(panels):
        truth, guess = seen.targets[row], seen.predictions[row]
        errors = np.abs(guess - truth)
        low, high = float(truth.min()), float(truth.max())
        columns = (
            ("observed", truth, "viridis", low, high),
            ("predicted", guess, "viridis", low, high),
            ("|predicted - observed|", errors, "gray_r", 0.0, float(errors.max())),
        )
        images = []
        for panel, (name, values, colors, bottom, top) in zip(line, columns, strict=True):
            images.append(
                panel.pcolormesh(
                    np.arange(values.shape[1]), seen.times, values,
                    cmap=matplotlib.colormaps[colors], vmin=bottom, vmax=top,
                    shading="gouraud", rasterized=True,
                )
            )  # fmt: skip
            if row == 0:
                panel.set_title(name, fontsize="medium")
            if seen.trained_until < seen.times[-1]:
                panel.axhline(seen.trained_until, color="white", linewidth=0.8)
        line[0].set_ylabel(f"test sample {row}\ntime")
        figure.colorbar(images[0], ax=list(line[:2]), label="state")
        figure.colorbar(images[2], ax=line[2], label="difference")
    for panel in panels[-1]:
        panel.set_xlabel("component of the state")
    return figure


def _along_time(seen: Predicted) -> Figure:
    """Distance at every time, relative to the sample's root mean square over all times."""
    axes = tuple(range(2, seen.targets.ndim))
    distance = np.sqrt(np.sum(np.square(errors_of(seen)), axis=axes))
    sizes = np.sqrt(np.mean(np.nansum(np.square(seen.targets), axis=axes), axis=1, keepdims=True))
    errors = distance / np.maximum(sizes, 1e-300)
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    panel = figure.subplots()
    lines = {"median sample": np.median(errors, axis=0), "worst sample": np.max(errors, axis=0)}
    draw_lines(panel, seen.times, lines)
    if seen.trained_until < seen.times[-1]:
        panel.axvline(seen.trained_until, color="gray", linewidth=0.8, label="trained until here")
    panel.set_xlabel("time")
    panel.set_ylabel("error relative to the state's r.m.s.")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    return figure
