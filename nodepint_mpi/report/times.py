"""The section on where the time of a step goes, rank by rank, and on what the ranks did."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nodepint_mpi.pages.parts import Picture, Section, Table, number
from nodepint_mpi.pages.units import show_bytes
from nodepint_mpi.report.facts import Facts

MOST_BARS = 24
"""Of more ranks evenly spaced ones are drawn."""
LOOKS = {
    "fine_forward": ("0.35", ""),
    "fine_adjoint": ("0.65", ""),
    "tangents": ("tab:olive", "xxxx"),
    "coarse": ("tab:orange", "////"),
    "send": ("lightgreen", "||||"),
    "receive": ("tab:cyan", "----"),
    "reduce": ("lightsteelblue", "++++"),
    "encoder": ("khaki", "\\\\\\\\"),
    "loss": ("rosybrown", "...."),
    "snapshots": ("thistle", "xx"),
    "factor": ("palegoldenrod", "**"),
    "update": ("plum", "oooo"),
    "sweep": ("gainsboro", "//"),
    "wait": ("mistyrose", "..."),
    "other": ("white", ""),
}
"""Color and hatching, so that neighbors are told apart in black and white."""


def phases(facts: Facts) -> Section | None:
    """Bars of a step's phases on every rank, and tables of times and counts over the ranks."""
    times = facts.times
    if times is None:
        return None
    parts: list = []
    if times["phases_s"] is None:
        parts.append(f"No step was profiled: {times['profiles']['missing']}.")
    else:
        shown = {name: row for name, row in times["phases_s"].items() if row["max"] > 0}
        parts += [Picture("phases", _draw(shown), _caption(times)), _step_table(shown)]
    parts += [_host_table(times), _count_table(times)]
    return Section("Phases per rank", parts)


def _caption(times: dict[str, Any]) -> str:
    steps = ", ".join(map(str, times["profiles"]["steps"]))
    return (
        f"One optimizer step on every rank, by the shares of each phase in profiles of step {steps}"
        f" and the median of {times['n_warm_steps']} steps that neither compiled nor were profiled."
        " Waiting is what a rank spends in a message beyond the briefest of those that take part."
    )


def _draw(shown: dict[str, dict[str, Any]]) -> Figure:
    """A bar for each rank, stacked from the bottom in the order of the table."""
    n_ranks = len(next(iter(shown.values()))["ranks"])
    drawn = np.unique(np.linspace(0, n_ranks - 1, min(n_ranks, MOST_BARS)).round().astype(int))
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    panel = figure.subplots()
    places, bottom = np.arange(len(drawn)), np.zeros(len(drawn))
    for name, row in shown.items():
        color, hatch = LOOKS[name]
        heights = 1e3 * np.asarray(row["ranks"])[drawn]
        panel.bar(
            places, heights, 0.7, bottom, color=color, hatch=hatch, edgecolor="black",
            linewidth=0.6, label=name.replace("_", " "),
        )  # fmt: skip
        bottom += heights
    panel.set_xticks(places, [str(rank) for rank in drawn])
    margin = 0.6 + max(0, 4 - len(drawn)) / 2  # so that few bars are no walls
    panel.set_xlim(-margin, len(drawn) - 1 + margin)
    panel.set_xlabel("rank")
    panel.set_ylabel("time of a step, ms")
    panel.yaxis.set_major_locator(MaxNLocator(nbins=6))
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    return figure


def _step_table(shown: dict[str, dict[str, Any]]) -> Table:
    whole = sum(row["mean"] for row in shown.values())
    rows = [
        (name.replace("_", " "), *(f"{1e3 * row[key]:.3g}" for key in ("min", "mean", "max")),
         f"{row['mean'] / whole:.1%}")
        for name, row in shown.items()
    ]  # fmt: skip
    head = ("phase of a step", "min, ms", "mean, ms", "max, ms", "share of mean")
    return Table(head, rows, "Over the ranks.")


def _host_table(times: dict[str, Any]) -> Table:
    rows = [
        (name, *(f"{row[key]:.3g}" for key in ("min", "mean", "max")))
        for name, row in times["host_s"].items()
    ]
    caption = (
        f"Whole start, {times['n_steps']} steps, over the ranks. Compiling is mostly within the "
        f"first steps; profiles took {times['profiles']['cost_s']:.2g} s of the steps."
    )
    return Table(("in the loop", "min, s", "mean, s", "max, s"), rows, caption)


def _count(name: str, value: int | float) -> str:
    return show_bytes(value) if name == "bytes" else number(value)


def _count_table(times: dict[str, Any]) -> Table:
    rows = [
        (name.replace("_", " "), *(_count(name, row[key]) for key in ("sum", "min", "mean", "max")))
        for name, row in times["counts"].items()
        if row is not None and row["max"] > 0
    ]
    caption = (
        "Exact counts of the whole start, over the ranks: slices of a rank's samples that were "
        "propagated, pulled back, or pushed along a direction, and what was handed to MPI."
    )
    return Table(("counted", "all ranks", "min", "mean", "max"), rows, caption)
