"""Sections made of the metrics: how training went, step by step."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nodepint_mpi.build.sections import ADJOINT_TOL, JUMP_TOL
from nodepint_mpi.pages.lines import (
    draw_level,
    draw_lines,
    draw_loss,
    draw_steps,
    draw_validated,
    positive,
)
from nodepint_mpi.pages.parts import Picture, Section, number
from nodepint_mpi.pages.units import show_seconds
from nodepint_mpi.report.facts import Facts

_COUNTS = {
    "guarded": "slices kept as they were, since their correction was not finite",
    "damped": "corrections cut to the length they can be trusted to",
    "fallbacks": "times the method handed over to parareal",
}
_SLOW, _ENOUGH, _NAMED = 10, 10, 6
"""How many times the median a step takes that is left out, of how many steps; and those named."""


def loss(facts: Facts) -> Section | None:
    """Loss and gradient norm of every step, and accuracy where it is recorded."""
    by_step = facts.by_step
    losses, norms = by_step["loss"], by_step["grad_norm"]
    if not np.any(np.isfinite(losses)):
        return None
    scores = {name: facts.column(name) for name in facts.columns if name.endswith("accuracy")}
    scores = {name: values for name, values in scores.items() if values is not None}
    checked = scores.pop("valid_accuracy", None)
    has_norms = bool(np.any(np.isfinite(norms)))
    rows = 1 + has_norms + bool(scores or checked is not None)
    figure, panels = _panels(facts, rows)
    draw_loss(panels[0], by_step["step"], losses, facts.columns)
    test_loss = (facts.done or {}).get("test_loss")
    if test_loss is not None:
        draw_level(panels[0], facts.steps, test_loss, "test loss at the end")
    section = facts.config.loss
    name = "" if section is None else f" ({section.name.replace('_', ' ')})"
    panels[0].set_ylabel(f"loss{name}"[:48])
    if has_norms:
        draw_steps(panels[1], by_step["step"], norms, "gradient norm")
        panels[1].set_ylabel("gradient norm")
    if scores or checked is not None:
        if scores:
            draw_lines(panels[-1], facts.steps, scores, log=False)
        if checked is not None:
            draw_validated(panels[-1], facts.steps, checked, "valid_accuracy")
        panels[-1].set_ylabel("accuracy")
    every = "every" if np.all(np.diff(by_step["step"]) == 1) else "every reported"
    caption = f"Loss and norm of its gradient at {every} optimizer step."
    return Section("Loss", [Picture("loss", figure, caption)])


def sweeps(facts: Facts) -> Section | None:
    """Sweeps of the time-parallel solver per step, and what went wrong in them."""
    names = {"sweeps": "forward", "adjoint_sweeps": "adjoint"}
    taken = {label: facts.by_step[name].astype(float) for name, label in names.items()}
    lines = {label: values for label, values in taken.items() if np.any(np.isfinite(values))}
    if not lines or facts.config.time.method == "serial":
        return None
    figure, (panel,) = _panels(facts, 1, height=3.0)
    looks = {"forward": ("0.75", 5.0, "-"), "adjoint": ("black", 1.2, "--")}  # as a rule equal
    for label, values in lines.items():
        color, width, style = looks[label]
        panel.step(facts.by_step["step"], values, style, color=color, linewidth=width, label=label)
    panel.legend(fontsize="small")
    panel.set_ylabel("sweeps of a step")
    panel.set_ylim(bottom=-0.2)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    where = f"{facts.config.time.method}, {facts.config.time.n_slices} slices"
    serial = "" if facts.config.time.tracking is None else " 0: the step was serial."
    parts: list = [Picture("sweeps", figure, f"Sweeps per optimizer step ({where}).{serial}")]
    for name, meaning in _COUNTS.items():
        count = np.nansum(facts.columns.get(name, np.zeros(1)))
        if count:
            parts.append(f"{number(int(count))} {meaning}, in the reported steps.")
    return Section("Sweeps", parts)


def jumps(facts: Facts) -> Section | None:
    """How far the slices are apart at the end of a step, forward and backward."""
    tracked = facts.config.time.tracking is not None
    names = {"jump": "jump of the states", "adjoint_residual": "residual of the cotangents"}
    lines = _taken(facts, names, above_zero=True)
    if not lines:
        return None
    figure, panels = _panels(facts, len(lines), height=2.2)
    states = "relative, r.m.s." if tracked else "largest, units of the state"
    units = {"jump": states, "adjoint_residual": "relative" + (", r.m.s." if tracked else "")}
    tolerances = {} if tracked else _tolerances(facts)
    shown = [name for name in names if names[name] in lines]
    for i, (panel, name) in enumerate(zip(panels, shown, strict=True)):
        draw_lines(panel, facts.steps, {names[name]: lines[names[name]]}, legend=False, first=i)
        if name in tolerances:
            draw_level(panel, facts.steps, tolerances[name], "tolerance")
        panel.set_ylabel(f"{name.replace('_', ' ')}\n({units[name]})")
    caption = (
        "What the sweeps of a step leave: the states' jump between slices, and the same of the "
        "cotangents. Steps solved serially have none."
    )
    return Section("Jumps and adjoint residual", [Picture("jumps", figure, caption)])


def gradient_errors(facts: Facts) -> Section | None:
    """The gradient's relative error: expected in every step, found where it was checked."""
    estimates, found = (facts.column(n) for n in ("gradient_error_estimate", "gradient_error"))
    if estimates is None and found is None:
        return None
    figure, (panel,) = _panels(facts, 1)
    if estimates is not None:
        draw_lines(panel, facts.steps, {"estimate": estimates}, legend=False)
    if found is not None:
        panel.semilogy(
            facts.steps, positive(found), "s", color="tab:orange", markeredgecolor="black",
            label="found, against the serial gradient",
        )  # fmt: skip
    section = facts.config.time.tracking
    if section is not None:
        draw_level(panel, facts.steps, section.bound, "bound")
    panel.legend(fontsize="small")
    panel.set_ylabel("relative error of the gradient")
    parts: list = [Picture("gradient_error", figure, "Error of the gradient a step was offered.")]
    if found is not None:
        seen = found[np.isfinite(found)]
        parts.append(
            f"{len(seen)} of the reported steps were checked: median error "
            f"{number(float(np.median(seen)))}, largest {number(float(seen.max()))}. A step whose "
            "estimate is above the bound is made with the serial gradient instead."
        )
    return Section("Gradient error", parts)


def step_times(facts: Facts) -> Section | None:
    """How long steps took, those that compiled apart."""
    each, steps = facts.by_step["step_s"], facts.by_step["step"]
    if not np.any(np.isfinite(each)):
        return None
    median = float(np.nanmedian(each))
    slow = each > _SLOW * median if len(each) >= _ENOUGH else np.zeros(len(each), bool)
    figure, (panel,) = _panels(facts, 1, height=3.0)
    draw_steps(panel, steps[~slow], 1e3 * each[~slow], "time of a step", log=False)
    draw_level(panel, steps, 1e3 * median, f"median {1e3 * median:.3g} ms")
    panel.set_ylabel("time of a step, ms")
    panel.set_ylim(bottom=0)
    caption = "Time of steps, on rank 0."
    if np.any(slow):
        where = ", ".join(map(str, steps[slow][:_NAMED])) + (", ..." if slow.sum() > _NAMED else "")
        caption += (
            f" Left out: {show_seconds(float(each[slow].sum()))} in steps that took more than "
            f"{_SLOW} times the median, as those do that compile ({where})."
        )
    parts: list = [Picture("step_time", figure, caption)]
    compiling = ((facts.times or {}).get("host_s") or {}).get("compile")
    if compiling is not None:
        parts.append(
            f"Compiling took {show_seconds(compiling['max'])} in the last start, on the rank where "
            "it took longest."
        )
    return Section("Time of a step", parts)


def _panels(facts: Facts, n: int, *, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """Panels one below the other over the optimizer steps."""
    figure = Figure(figsize=(7.5, height * n + 0.6), layout="constrained")
    panels = list(figure.subplots(n, 1, sharex=True, squeeze=False)[:, 0])
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_xlim(0, 1.02 * float(max(facts.steps[-1], facts.by_step["step"][-1])))
    panels[-1].set_xlabel("optimizer step")
    return figure, panels


def _taken(
    facts: Facts, names: Mapping[str, str], *, above_zero: bool = False
) -> dict[str, np.ndarray]:
    """The recorded quantities among these, by label."""
    found = {label: facts.column(name) for name, label in names.items()}
    return {
        label: values
        for label, values in found.items()
        if values is not None and not (above_zero and np.all(np.isnan(positive(values))))
    }


def _tolerances(facts: Facts) -> dict[str, float]:
    """What a step that solves anew is iterated to."""
    section, precision, found = facts.config.time, facts.config.run.precision, {}
    if section.stopping.rule != "sweeps":
        found["jump"] = section.stopping.tol or JUMP_TOL[precision]
    if section.adjoint.sweeps is None:
        found["adjoint_residual"] = section.adjoint.tol or ADJOINT_TOL[precision]
    return found
