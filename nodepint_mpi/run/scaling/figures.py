"""Figures of scaling studies: speed-up, efficiency, and where a step's time goes. Local."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nodepint_mpi.run.figures import MARKERS, STYLES
from nodepint_mpi.run.report.training import COLORS
from nodepint_mpi.run.scaling.measures import SHARES, Curve, Judged

LOOKS = {
    "fine": ("0.45", ""),
    "coarse": ("tab:orange", "////"),
    "messages": ("lightsteelblue", "++++"),
    "idle": ("mistyrose", "..."),
    "other": ("white", ""),
}
"""Colour and hatching, so that neighbours are told apart in black and white."""
MOST_TICKS = 11
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
    handles: dict[str, Artist] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize="small"
    )
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
    panel.set_xticks(places, [ranks_label(point) for point in points])
    margin = 0.6 + max(0, 4 - len(points)) / 2  # so that few bars are no walls
    panel.set_xlim(-margin, len(points) - 1 + margin)
    panel.set_ylim(0, 1)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))


def _speed_ups(panel: Axes, shown: Sequence[Judgement], ranks: Sequence[int]) -> None:
    for i, (curve, points) in enumerate(shown):
        first = next((p.row["n_ranks"] for p in points if p.speed_up is not None), 1)
        _line(panel, i, points, lambda p: p.speed_up, f"measured{_of(curve)}")
        _model_line(
            panel, i, points, f"model{_of(curve)}",
            lambda p, n0=first: p.model_efficiency and p.model_efficiency * p.row["n_ranks"] / n0,
        )  # fmt: skip
    panel.plot(ranks, np.array(ranks) / ranks[0], color="grey", linewidth=0.9, label="ideal")
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_ylabel("speed-up")
    _rank_axis(panel, ranks)


def _efficiencies(panel: Axes, shown: Sequence[Judgement], ranks: Sequence[int]) -> None:
    for i, (curve, points) in enumerate(shown):
        _line(panel, i, points, lambda p: p.efficiency, f"measured{_of(curve)}")
        _model_line(panel, i, points, f"model{_of(curve)}", lambda p: p.model_efficiency)
        counted = [(p.row["n_ranks"], p.counted) for p in points if p.counted is not None]
        if counted:
            panel.plot(
                *zip(*counted, strict=True), linestyle="none", marker=MARKERS[i % len(MARKERS)],
                color=COLORS[i % len(COLORS)], markerfacecolor="white", markersize=9,
                zorder=1.5, label=f"as counted{_of(curve)}",
            )  # fmt: skip
    panel.plot(ranks, np.ones(len(ranks)), color="grey", linewidth=0.9, label="ideal")
    panel.set_ylim(bottom=0, top=max(1.1, panel.get_ylim()[1]))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set_ylabel("efficiency")
    _rank_axis(panel, ranks)


def _line(
    panel: Axes,
    i: int,
    points: Sequence[Judged],
    value: Callable[[Judged], float | None],
    label: str,
) -> None:
    """What was measured: filled markers, joined."""
    found = [(p.row["n_ranks"], y) for p in points if (y := value(p)) is not None]
    if found:
        panel.plot(
            *zip(*found, strict=True), STYLES[0], marker=MARKERS[i % len(MARKERS)],
            color=COLORS[i % len(COLORS)], markersize=5, label=label,
        )  # fmt: skip


def _model_line(
    panel: Axes,
    i: int,
    points: Sequence[Judged],
    label: str,
    value: Callable[[Judged], float | None],
) -> None:
    """What a model has: dashes without markers."""
    found = [(p.row["n_ranks"], y) for p in points if (y := value(p)) is not None]
    if found:
        panel.plot(
            *zip(*found, strict=True), STYLES[1], color=COLORS[i % len(COLORS)], linewidth=1.2,
            label=label,
        )  # fmt: skip


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


def _of(curve: Curve) -> str:
    return f", {curve.label}" if curve.label else ""


def ranks_label(point: Judged) -> str:
    """Ranks; where they form a grid also its lines (of samples) x ranks of a line. Local."""
    n_ranks, lines = point.row["n_ranks"], point.row["data_ranks"]
    return str(n_ranks) if lines == 1 else f"{n_ranks} ({lines} x {n_ranks // lines})"
