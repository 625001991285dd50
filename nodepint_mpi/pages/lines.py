"""Lines over steps or time that many figures have in common."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

STYLES = ("-", "--", "-.", ":")
COLORS = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">", "h")
N_MARKERS = 12
"""Of a line, about."""
MANY_STEPS = 120
"""A curve of at least this many values is drawn thin, with its moving average over it."""


def draw_loss(
    panel: Axes, steps: np.ndarray, losses: np.ndarray, records: Mapping[str, np.ndarray]
) -> None:
    """The training loss at these steps, and the validation loss that records hold, if any."""
    validated = records.get("valid_loss")
    log = validated is None or bool(np.nanmin(validated, initial=np.inf) >= 0)
    draw_steps(panel, steps, losses, "training loss of the step's batch", log=log)
    if validated is not None:
        draw_validated(panel, records["step"], validated, "validation loss")
    panel.set_ylabel("loss")


def draw_steps(
    panel: Axes, steps: np.ndarray, values: np.ndarray, label: str, *, log: bool = True
) -> None:
    """A quantity of every step; of many steps also what it is on average around each."""
    log = log and bool(np.nanmin(values, initial=np.inf) >= 0)
    if len(steps) < MANY_STEPS:
        draw_lines(panel, steps, {label: values}, log=log)
        return
    shown = positive(values) if log else values
    panel.plot(steps, shown, color="0.65", linewidth=0.7, label=label)
    width = max(3, len(steps) // 50)
    mean = np.exp(smooth(np.log(shown), width)) if log else smooth(shown, width)
    panel.plot(steps, mean, color=COLORS[1], linewidth=1.8, label=f"mean of {width} steps")
    if log:
        panel.set_yscale("log")
    panel.legend(fontsize="small")


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the finite values around each, `width` of them where there are as many. Local."""
    seen = np.isfinite(values)
    window = np.ones(min(width, len(values)))
    sums = np.convolve(np.where(seen, values, 0.0), window, "same")
    counts = np.convolve(seen.astype(float), window, "same")
    return np.where(counts > 0.5, sums / np.maximum(counts, 1.0), np.nan)


def draw_lines(
    panel: Axes,
    x: np.ndarray,
    lines: Mapping[str, np.ndarray],
    *,
    log: bool = True,
    legend: bool = True,
    first: int = 0,
) -> None:
    """Lines told apart by style and marker as well as by color; those of one point are seen too.

    A logarithmic axis is only taken for values above zero; zeros are then left out.
    """
    log = log and all(np.nanmin(values, initial=np.inf) >= 0 for values in lines.values())
    for i, (label, values) in enumerate(lines.items(), start=first):
        panel.plot(
            x, positive(values) if log else values, STYLES[i % len(STYLES)],
            color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=4,
            markerfacecolor="none", markevery=max(1, len(x) // N_MARKERS), linewidth=1.2,
            label=label,
        )  # fmt: skip
    if log:
        panel.set_yscale("log")
    if legend:
        panel.legend(fontsize="small")


def draw_validated(panel: Axes, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """A score on the validation set: not every record has one."""
    seen = np.isfinite(values)
    panel.plot(
        steps[seen], values[seen], "--s", color=COLORS[2], markersize=4,
        markerfacecolor="none", linewidth=1.2, label=label,
    )  # fmt: skip
    panel.legend(fontsize="small")


def draw_level(panel: Axes, x: np.ndarray, level: float, label: str) -> None:
    """A line to compare with, dotted and gray, that the axis makes room for."""
    panel.plot([0, x[-1]], [level, level], ":", color="gray", linewidth=1.6, label=label)
    panel.legend(fontsize="small")


def positive(values: np.ndarray) -> np.ndarray:
    """NaN for what a logarithmic axis cannot show."""
    return np.where(values > 0, values, np.nan)
