"""Figures of scaling studies: speed-up, efficiency, and where a step's time goes. Local."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from nodepint_mpi.bench.studies.measures import SHARES, Curve, Judged
from nodepint_mpi.core.partition import show_grid
from nodepint_mpi.pages.lines import COLORS, MARKERS

LOOKS = {
    "fine": ("0.45", ""),
    "coarse": ("tab:orange", "////"),
    "messages": ("lightsteelblue", "++++"),
    "idle": ("mistyrose", "..."),
    "other": ("white", ""),
}
"""Color and hatching, so that neighbors are told apart in black and white."""
Look = dict[str, Any]
MEASURED: Look = {"linestyle": "-", "linewidth": 1.4, "markersize": 5}
MODEL: Look = {"linestyle": "--", "linewidth": 1.2}
COUNTED: Look = {"linestyle": "none", "markersize": 9, "markerfacecolor": "white"}
IDEAL: Look = {"linestyle": "-", "linewidth": 0.9, "color": "gray"}

MOST_TICKS = 11
WIDE = 24
"""Letters of labels that fit under a panel of bars, side by side."""
N_COLUMNS = 3

Judgement = tuple[Curve, list[Judged]]


def draw_scaling(judgements: Sequence[Judgement]) -> Figure | None:
    """Speed-up (of strong curves) and efficiency against ranks; None if no point is finished."""
    shown = [(curve, points) for curve, points in judgements if points]
    if not shown:
        return None
    strong = shown[0][0].kind == "strong"
    figure = Figure(figsize=(9.5 if strong else 6.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if strong else 1, squeeze=False)[0]
    ranks = sorted({point.row["n_ranks"] for _, points in shown for point in points})
    if strong:
        _speed_ups(panels[0], shown, ranks)
    _efficiencies(panels[-1], shown, ranks)
    figure.legend(handles=_legend(shown), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def draw_shares(judgements: Sequence[Judgement]) -> Figure | None:
    """Bars of a step's parts against ranks, a panel for each curve; None if none was profiled."""
    shown = [
        (curve, [point for point in points if point.shares is not None])
        for curve, points in judgements
    ]
    shown = [(curve, points) for curve, points in shown if points]
    if not shown:
        return None
    n_columns = min(N_COLUMNS, len(shown))
    n_rows = -(-len(shown) // n_columns)
    size = (max(5.5, 3.2 * n_columns + 1.3), 3.2 * n_rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).ravel()
    for panel in panels[len(shown) :]:
        panel.axis("off")
    for panel, (curve, points) in zip(panels, shown, strict=False):
        _bars(panel, points)
        panel.set_title(curve.label, fontsize="small")
        panel.set_xlabel("ranks")
    for panel in panels[::n_columns]:
        panel.set_ylabel("share of a step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    return figure


def _bars(panel: Axes, points: Sequence[Judged]) -> None:
    places, bottom = np.arange(len(points)), np.zeros(len(points))
    for part in SHARES:
        color, hatch = LOOKS[part]
        heights = np.array([point.shares[part] for point in points if point.shares is not None])
        panel.bar(
            places, heights, 0.7, bottom, color=color, hatch=hatch, edgecolor="black",
            linewidth=0.6, label=part,
        )  # fmt: skip
        bottom += heights
    labels = [ranks_label(point) for point in points]
    panel.set_xticks(places, labels, rotation=90 if len("  ".join(labels)) > WIDE else 0)
    margin = 0.6 + max(0, 4 - len(points)) / 2  # so that few bars are no walls
    panel.set_xlim(-margin, len(points) - 1 + margin)
    panel.set_ylim(0, 1)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))


def _speed_ups(panel: Axes, shown: Sequence[Judgement], ranks: Sequence[int]) -> None:
    for i, (_, points) in enumerate(shown):
        first = next((p.row["n_ranks"] for p in points if p.speed_up is not None), 1)
        _line(panel, i, MEASURED, points, lambda p: p.speed_up)
        _line(
            panel, i, MODEL, points,
            lambda p, n0=first: p.model_efficiency and p.model_efficiency * p.row["n_ranks"] / n0,
        )  # fmt: skip
    panel.plot(ranks, np.array(ranks) / ranks[0], **IDEAL)
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_ylabel("speed-up")
    _rank_axis(panel, ranks)


def _efficiencies(panel: Axes, shown: Sequence[Judgement], ranks: Sequence[int]) -> None:
    for i, (_, points) in enumerate(shown):
        _line(panel, i, COUNTED, points, lambda p: p.counted)
        _line(panel, i, MEASURED, points, lambda p: p.efficiency)
        _line(panel, i, MODEL, points, lambda p: p.model_efficiency)
    panel.plot(ranks, np.ones(len(ranks)), **IDEAL)
    panel.set_ylim(bottom=0, top=max(1.1, panel.get_ylim()[1]))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set_ylabel("efficiency")
    _rank_axis(panel, ranks)


def _line(
    panel: Axes,
    i: int,
    look: Look,
    points: Sequence[Judged],
    value: Callable[[Judged], float | None],
) -> None:
    """One kind of number of curve `i`, where there is one."""
    found = [(p.row["n_ranks"], y) for p in points if (y := value(p)) is not None]
    if found:
        panel.plot(*zip(*found, strict=True), **_of_curve(i, look))


def _of_curve(i: int, look: Look) -> Look:
    """The look of a kind of number in the color, and with the marker, of a curve."""
    marker = {"marker": MARKERS[i % len(MARKERS)]} if "markersize" in look else {}
    return look | marker | {"color": COLORS[i % len(COLORS)]}


def _legend(shown: Sequence[Judgement]) -> list[Line2D]:
    """Kinds of numbers, as the first curve has them, and where there are several what tells curves
    apart."""
    kinds = {"measured": MEASURED, "as counted": COUNTED, "model": MODEL}
    lines = [Line2D([], [], label=name, **_of_curve(0, look)) for name, look in kinds.items()]
    lines.append(Line2D([], [], label="ideal", **IDEAL))
    if len(shown) > 1:
        for i, (curve, _) in enumerate(shown):
            lines.append(Line2D([], [], label=curve.label, **_of_curve(i, MEASURED)))
    return lines


def _rank_axis(panel: Axes, ranks: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    every = -(-len(ranks) // MOST_TICKS)
    ticks = list(ranks[::every])
    panel.set_xticks(ticks, [str(n) for n in ticks])
    panel.set_xticks([], minor=True)
    panel.set_xlim(ranks[0] / 1.25, ranks[-1] * 1.25)
    panel.set_xlabel("ranks")
    panel.grid(alpha=0.3)
    panel.set_axisbelow(True)


def ranks_label(point: Judged) -> str:
    """Ranks, and the grid that they form; see `core.partition.show_grid`. Local."""
    return show_grid(*(point.row[key] for key in ("n_ranks", "data_ranks", "basis_ranks")))
