"""The report of scaling studies: tables for the terminal, and one page with figures. Local."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nodepint_mpi.bench.studies.figures import (
    Judgement,
    draw_scaling,
    draw_shares,
    ranks_label,
)
from nodepint_mpi.bench.studies.kept import QUIET
from nodepint_mpi.bench.studies.measures import (
    BreakEven,
    Curve,
    Judged,
    Model,
    Row,
    break_even,
    judge,
    make_curves,
)
from nodepint_mpi.config.scaling import Scaling
from nodepint_mpi.pages.page import check_page, write_page
from nodepint_mpi.pages.parts import Picture, Section, Table, number

PAGE = "report.html"
NONE = "-"

_HEAD = (
    "ranks", "ms a step", "speed-up", "efficiency", "as counted", "of plain serial's speed",
    "coarse", "messages", "idle", "model, ms", "model off by",
)  # fmt: skip


def make_report(
    scaling: Scaling,
    source: str,
    rows: Sequence[Row],
    out: Path,
    model_of: Callable[[Curve], Model | None],
) -> dict[str, Any]:
    """Judge all that is finished, and write the page, OUT/report.html, with its figures. Local.

    Args:
        scaling: The studies.
        source: Their file.
        rows: All points.
        out: Their folder.
        model_of: What a step should take, if the points of a curve say.

    Returns:
        `text`, tables in Markdown; `page`; `curves`, the numbers.

    Raises:
        OutputError: if the page cannot be written.
    """
    page = out / PAGE
    out.mkdir(parents=True, exist_ok=True)
    check_page(page)
    curves = make_curves(rows)
    models = [model_of(curve) for curve in curves]
    judgements = [(curve, judge(curve, model)) for curve, model in zip(curves, models, strict=True)]
    pays = [break_even(curve, model) for curve, model in zip(curves, models, strict=True)]
    sections, tables = [_state(scaling, source, rows)], []
    for study in scaling.study:
        own = [(curve, points) for curve, points in judgements if curve.study == study.name]
        section, found = _study(study.name, study.kind, study.grows, own)
        sections.append(section)
        tables += found
    known = [one for one in pays if one is not None]
    if known:
        sections.append(Section("Break-even", [_break_even_table(known)]))
        tables.append(("Break-even", _break_even_table(known)))
    sections.append(Section("All points", [_points_table(rows)]))
    subtitle = f"{source}: {scaling.config}, {scaling.n_steps} optimizer steps a point"
    files = write_page(page, sections, title=f"Scaling: {Path(source).stem}", subtitle=subtitle)
    return {
        "text": "\n\n".join(f"{title}\n\n{format_markdown(table)}" for title, table in tables),
        "page": str(page),
        "figures": [str(file) for file in files],
        "curves": [
            {
                "study": curve.study,
                "kind": curve.kind,
                "over": curve.rows[0]["over"] if curve.rows else {},
                "points": [_plain(point) for point in points],
                "break_even": one and {"measured": one.measured, "model": one.model},
            }
            for (curve, points), one in zip(judgements, pays, strict=True)
        ],
    }


def format_markdown(table: Table) -> str:
    """A table as text that stays legible in a terminal. Local."""
    rows = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    ]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _study(
    name: str, kind: str, grows: Sequence[str], judgements: list[Judgement]
) -> tuple[Section, list[tuple[str, Table]]]:
    """The section of a study, and its tables with their titles."""
    title = f"{kind.capitalize()} scaling: {name}"
    parts: list[Any] = []
    if grows:
        parts.append(f"With the ranks grow {', '.join(grows)}.")
    tables = []
    for curve, points in judgements:
        table = study_table(curve, points)
        parts.append(table)
        tables.append((f"{title}, {curve.label}" if curve.label else title, table))
    figure, shares = draw_scaling(judgements), draw_shares(judgements)
    if figure is not None:
        caption = (
            "Against the point with the fewest ranks. As counted: what the counts of fine and "
            "coarse work promise, if messages cost nothing; it needs no cores of one's own. Model: "
            "a step simulated by the costs of that first point."
        )
        parts.append(Picture(f"{name}_scaling", figure, caption))
    if shares is not None:
        caption = "Mean over the ranks of what a step goes into; idle is waiting for other ranks."
        parts.append(Picture(f"{name}_shares", shares, caption))
    if not any(points for _, points in judgements):
        parts.append("No point of this study is finished.")
    return Section(title, parts), tables


def study_table(curve: Curve, points: Sequence[Judged]) -> Table:
    """A line for each point of a curve, and for plain serial training. Local."""
    rows = [
        (_serial_name(row), _ms(row["step_s"] and row["step_s"]["max"]), *[NONE] * 9)
        for row in curve.serial.values()
    ]
    for point in points:
        shares, row = point.shares or {}, point.row
        shared = row["oversubscribed"]
        rows.append((
            ranks_label(point),
            "cores are shared" if shared else _ms(point.step_s),
            _shown(point.speed_up, ".2f"),
            _shown(point.efficiency, ".0%"),
            _shown(point.counted, ".0%"),
            _shown(point.to_serial, ".2f"),
            *(_shown(shares.get(part), ".1%") for part in ("coarse", "messages", "idle")),
            _ms(point.model and point.model.step_s),
            _shown(point.model_error, "+.0%"),
        ))  # fmt: skip
    return Table(_HEAD, rows, curve.label)


def _break_even_table(known: Sequence[BreakEven]) -> Table:
    rows = []
    for one in known:
        most = max((r["n_ranks"] for r in one.curve.rows if not r["oversubscribed"]), default=0)
        measured = str(one.measured) if one.measured else f"none up to {most}"
        name = ", ".join(filter(None, (one.curve.study, one.curve.label)))
        by_model = NONE if one.model is None else str(one.model)
        rows.append((name, _ms(one.serial_s), measured, by_model))
    return Table(
        ("study", "plain serial, ms a step", "faster from ranks, measured", "by the model"), rows
    )


def _state(scaling: Scaling, source: str, rows: Sequence[Row]) -> Section:
    """What there is, and where it was measured."""
    states = [row["state"] for row in rows]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    parts: list[Any] = [f"Of {len(rows)} points: {', '.join(counts)}."]
    done = [row for row in rows if row["state"] == "finished"]
    where: dict[tuple[str, ...], None] = {
        (row["machine"], row["date"], str(row["commit"]), str(row["n_nodes"])): None for row in done
    }
    if where:
        head = ("machine of the first rank", "date", "commit", "machines")
        parts.append(Table(head, list(where)))
    busy = [row["point"] for row in done if row["busy_share"] > QUIET]
    if busy:
        parts.append(
            f"Something else kept the cores busy before or after {', '.join(busy)}: these times "
            "are not to be relied on."
        )
    shared = [row["point"] for row in done if row["oversubscribed"]]
    if shared:
        parts.append(
            f"More ranks than cores had {', '.join(shared)}: what they counted is shown, their "
            "times are not."
        )
    serial = [f"{r['point']} ({r['serial_steps']})" for r in done if r["serial_steps"]]
    if serial:
        parts.append(
            f"Steps with a serial gradient, since sweeps missed their bound: {', '.join(serial)}. "
            "They are among those whose median is shown."
        )
    failed = [(row["point"], row["reason"]) for row in rows if row["state"] == "failed"]
    if failed:
        parts.append(Table(("failed", "reason"), failed))
    return Section("What there is", parts)


def _points_table(rows: Sequence[Row]) -> Table:
    head = (
        "point", "state", "slices", "fine solves of all ranks", "of the busiest", "messages",
        "MB sent", "sweeps", "loss", "gradient error", "peak memory of a rank, MB", "compiling, s",
    )  # fmt: skip
    lines = []
    for row in rows:
        if row["state"] != "finished":
            lines.append((row["point"], row["state"], *[NONE] * 10))
            continue
        counts = row["counts"]
        lines.append((
            row["point"],
            row["state"],
            str(row["n_slices"]),
            number(counts["fine"]["sum"]),
            number(counts["fine"]["max"]),
            number(counts["messages"]["sum"]),
            f"{counts['bytes']['sum'] / 1e6:.3g}",
            " + ".join(f"{n:.2f}" for n in row["sweeps"]),
            f"{row['loss']:.4g}",
            _shown(row["gradient_error"], ".1e"),
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['compile_s']:.1f}",
        ))  # fmt: skip
    return Table(head, lines, "Counts are of all steps. Sweeps are forward and adjoint, a mean.")


def _serial_name(row: Row) -> str:
    return f"plain serial, {row['n_slices']} slices" if row["kind"] == "weak" else "plain serial"


def _plain(point: Judged) -> Mapping[str, Any]:
    """A judgment as JSON takes it, by the name of its point."""
    fields = point._asdict()
    fields["row"] = point.row["point"]
    fields["model"] = point.model and point.model._asdict()
    return fields


def _ms(seconds: float | None) -> str:
    return NONE if seconds is None else f"{1e3 * seconds:.4g}"


def _shown(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"
