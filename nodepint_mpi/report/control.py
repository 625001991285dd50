"""Sections of a control problem: cost of every iteration, states, controls, multipliers."""

import io
import zipfile

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nodepint_mpi.errors import DataError
from nodepint_mpi.optimal_control.run import TRAJECTORY
from nodepint_mpi.pages.lines import COLORS, STYLES, draw_lines
from nodepint_mpi.pages.parts import Picture, Section, number
from nodepint_mpi.report.facts import Facts

FEW = 8
"""As many numbers are drawn as lines; more of them as a picture over index and time."""
N_SAMPLES = 16

Sampled = dict[str, np.ndarray]


def cost(facts: Facts) -> Section | None:
    """The cost of every iteration, and what goes with it."""
    if facts.config.control is None:
        return None
    shown = {
        "cost": "cost", "loss": "loss of learning", "gap": "largest gap of the constraint",
        "update": "change by a sweep of ParaOpt",
    }  # fmt: skip
    found = {label: facts.column(name) for name, label in shown.items()}
    found = {label: values for label, values in found.items() if values is not None}
    if not found:
        return None
    figure = Figure(figsize=(7.5, 2.4 * len(found) + 0.6), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (label, values) in zip(panels, found.items(), strict=True):
        there = np.isfinite(values)
        log = bool(np.all(values[there] >= 0))
        draw_lines(panel, facts.steps[there], {label: values[there]}, log=log, legend=False)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("iteration")
    text = ""
    if (contraction := facts.column("contraction")) is not None:
        expected = number(float(contraction[np.isfinite(contraction)][0]))
        text = f" A sweep of ParaOpt was expected to reduce errors to {expected} of them."
    return Section(
        "Cost of every iteration",
        [Picture("cost", figure, f"What every iteration found.{text}")],
    )


def trajectory(facts: Facts) -> Section | None:
    """States, controls and multipliers of the best control, once the run is finished."""
    if facts.config.control is None or not (facts.folder / TRAJECTORY).exists():
        return None
    sampled = _read(facts)
    parts: list = [
        _picture("states", sampled["times"], sampled["states"], "state", facts, goal=True),
        _picture("controls", sampled["control_times"], sampled["controls"], "control", facts),
    ]
    if "multipliers" in sampled:
        parts.append(
            _picture("multipliers", sampled["edges"], sampled["multipliers"], "multiplier", facts)
        )
    parts.append(
        f"{TRAJECTORY} holds these as arrays: times, states, control_times, controls, edges and "
        "multipliers, the derivatives of the cost with respect to the states at the slice edges."
    )
    return Section("States, controls and multipliers", parts)


def _read(facts: Facts) -> Sampled:
    path = facts.folder / TRAJECTORY
    try:
        content = io.BytesIO(path.read_bytes())  # NumPy leaves a damaged file open
        with np.load(content, allow_pickle=False) as file:
            sampled = {name: np.asarray(file[name]) for name in file.files}
        for name, at in (("states", "times"), ("controls", "control_times")):
            if sampled[name].ndim < 2 or len(sampled[name]) != len(sampled[at]):
                raise ValueError(f"{name} do not fit {at}")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}. Resume the run to write it anew.") from error
    return sampled


def _picture(
    name: str, times: np.ndarray, values: np.ndarray, what: str, facts: Facts, *, goal: bool = False
) -> Picture:
    """Over time: lines of a few numbers, a picture of many; of several samples the first ones."""
    several = values.ndim > 2
    rows = values.reshape(len(values), -1, values.shape[-1])[:, :N_SAMPLES]
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    panel = figure.subplots()
    whose = f" Of the first {rows.shape[1]} samples or paths." if several else ""
    if values.shape[-1] > FEW:
        index = np.arange(values.shape[-1])
        image = panel.pcolormesh(times, index, rows[:, 0].T, shading="nearest", rasterized=True)
        figure.colorbar(image, ax=panel, label=what)
        panel.set_ylabel(f"index of the {what}")
        whose = " Of the first sample or path." if several else ""
    else:
        _draw_few(panel, times, rows, what, steps=_is_held(facts, name))
        if goal:
            _draw_goal(panel, times, rows.shape[-1], facts)
        panel.legend(fontsize="small")
        panel.set_ylabel(what)
        panel.grid(alpha=0.3)
    panel.set_xlabel("time")
    return Picture(name, figure, f"The {name} over time.{whose}")


def _is_held(facts: Facts, name: str) -> bool:
    section = facts.config.control
    return name == "controls" and section is not None and section.kind == "constant"


def _draw_few(panel: Axes, times: np.ndarray, rows: np.ndarray, what: str, *, steps: bool) -> None:
    for i in range(rows.shape[-1]):
        for sample in range(rows.shape[1]):
            panel.plot(
                times, rows[:, sample, i], STYLES[i % len(STYLES)], color=COLORS[i % len(COLORS)],
                linewidth=1.4 if sample == 0 else 0.6, alpha=1.0 if sample == 0 else 0.4,
                drawstyle="steps-post" if steps else "default",
                label=f"{what} {i}" if sample == 0 else None,
            )  # fmt: skip


def _draw_goal(panel: Axes, times: np.ndarray, n: int, facts: Facts) -> None:
    """What a quadratic cost asks for, as marks at the end."""
    section = facts.config.control
    assert section is not None  # it is a control problem
    if section.cost.name != "quadratic" or not (section.cost.terminal or section.cost.reach):
        return
    of = list(range(n)) if section.cost.of is None else section.cost.of
    target = np.broadcast_to(np.asarray(section.cost.target, float), (len(of),))
    for i, value in zip(of, target, strict=True):
        label = "target" if i == of[0] else None
        color = COLORS[i % len(COLORS)]
        panel.plot(times[-1], value, "*", color=color, markersize=11, label=label)
