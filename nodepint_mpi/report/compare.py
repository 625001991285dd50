"""`nodepint compare`: several runs beside each other, in a table and on a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.pages.lines import draw_lines
from nodepint_mpi.pages.page import check_page, write_page
from nodepint_mpi.pages.parts import Picture, Section, Table, number
from nodepint_mpi.report.facts import (
    Facts,
    final_numbers,
    rank_counts,
    read_facts,
    seconds,
)
from nodepint_mpi.report.tables import flatten

LEFT_OUT = ("output.dir", "run.name")
MISSING = "-"


def compare_runs(folders: Sequence[Path], page: Path | None = None) -> dict[str, Any]:
    """What differs between runs, what they came to, and a page if one is asked for. Local.

    Returns:
        `runs` (their labels), `config` (differing keys only), `results`: values by key, one a
        run, None where a run has none; and `page` if it was written.

    Raises:
        NodepintError: if there are fewer than two runs, or one cannot be read.
    """
    if len(folders) < 2:
        raise ConfigError(f"`nodepint compare` got {len(folders)} run; it needs at least two.")
    if page is not None:
        check_page(page)
    runs = [read_facts(folder) for folder in folders]
    labels = label_runs(folders)
    flat = [flatten(run.config) for run in runs]
    order = list(Config.model_fields)
    keys = sorted({key: None for one in flat for key in one}, key=lambda k: order.index(_part(k)))
    rows = {key: [one.get(key) for one in flat] for key in keys if key not in LEFT_OUT}
    config = {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
    finals = [{"ranks": rank_counts(run)} | final_numbers(run) for run in runs]
    names = {name: None for final in finals for name in final}
    results = {name: [final.get(name) for final in finals] for name in names}
    result: dict[str, Any] = {"runs": labels, "config": config, "results": results}
    if page is not None:
        sections = [*tables(result), *_figures(labels, runs)]
        title, subtitle = f"{len(runs)} runs compared", ", ".join(map(str, folders))
        files = write_page(page, sections, title=title, subtitle=subtitle)
        result |= {"page": str(page), "figures": [str(file) for file in files]}
    return result


def label_runs(folders: Sequence[Path]) -> list[str]:
    """Names that tell the runs apart: their folders', with as much of the path as it takes."""
    parts = [folder.absolute().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-n:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{folder} ({i})" for i, folder in enumerate(folders, 1)]  # one named twice


def tables(result: dict[str, Any]) -> list[Section]:
    """The comparison as sections. Local."""
    head = "", *result["runs"]

    def table(first: str, rows: dict[str, list[Any]]) -> Table:
        return Table(
            (first, *head[1:]),
            [
                (name, *(MISSING if value is None else number(value) for value in row))
                for name, row in rows.items()
            ],
        )

    same = "The configs do not differ, but for the name and where results go."
    differing = table("key", result["config"]) if result["config"] else same
    return [
        Section("Results", [table("quantity", result["results"])]),
        Section("Config keys that differ", [differing]),
    ]


def format_comparison(result: dict[str, Any]) -> str:
    """The same as text. Local."""
    lines = []
    for section in tables(result):
        lines.append(section.title)
        for part in section.parts:
            if isinstance(part, Table):
                rows = [part.head, *part.rows]
                widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
                for row in rows:
                    cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                    lines.append("  " + "  ".join(cells).rstrip())
            else:
                lines.append(f"  {part}")
        lines.append("")
    if "page" in result:
        lines.append(f"page: {result['page']}")
    return "\n".join(lines).rstrip()


def _part(key: str) -> str:
    """The section a dotted key belongs to."""
    return key.partition(".")[0]


def _figures(labels: list[str], runs: list[Facts]) -> list[Section]:
    """Loss against step and against seconds, a line a run."""
    losses = {label: run.column("loss") for label, run in zip(labels, runs, strict=True)}
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    timed = Figure(figsize=(7.5, 4.2), layout="constrained")
    by_step, by_time = figure.subplots(), timed.subplots()
    estimated = []
    for i, (label, run) in enumerate(zip(labels, runs, strict=True)):
        loss, spent = losses[label], seconds(run)
        if loss is None:
            continue
        draw_lines(by_step, run.steps, {label: loss}, first=i)
        if spent is not None:
            draw_lines(by_time, spent[0], {label: loss}, first=i)
            estimated += [] if spent[1] else [label]
    by_step.set_xlabel("optimizer step")
    by_time.set_xlabel("seconds in optimizer steps, compilation included")
    for panel in (by_step, by_time):
        panel.set_ylabel("training loss")
        panel.grid(alpha=0.3)
    caption = "Training loss against the time spent in optimizer steps."
    if estimated:
        caption += f" Estimated from the reported steps: {', '.join(estimated)}."
    return [
        Section(
            "Loss",
            [
                Picture("loss_by_step", figure, "Training loss against optimizer steps."),
                Picture("loss_by_seconds", timed, caption),
            ],
        )
    ]
