"""The table in Markdown, and its place between two marks in a page. All of it is local.

Importing this module loads neither MPI nor JAX.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nodepint_mpi.errors import OutputError
from nodepint_mpi.io.directory import write_text

BEGIN, END = "<!-- table -->", "<!-- /table -->"
QUIET = 0.05
"""The largest share of the cores that others may have kept busy on a quiet machine."""

_HEAD = (
    "dataset", "method", "training, s", "score", "train", "test", "peak memory of a rank, MB",
    "parameters", "config", "machine",
)  # fmt: skip


def format_table(rows: Sequence[dict[str, Any]], home: Path) -> str:
    """The table, and under it the machines, the dates, and notes.

    Args:
        rows: As `read_rows` gives them.
        home: The folder of the page, which links to configs are relative to.
    """
    lines = [f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
    lines += [f"| {' | '.join(map(_escape, _cells(row, home)))} |" for row in rows]
    notes = {row["dataset"]: row["note"] for row in rows if row["note"]}
    below = [*_machines(rows), *(f"{dataset}: {note}." for dataset, note in notes.items())]
    return "\n".join([*lines, "", *below])


def read_page(path: Path) -> tuple[str, str]:
    """What a page has up to the table and after it.

    Raises:
        OutputError: if it cannot be read, or has not both marks, once and in order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"Cannot read {path}: {reason}.") from error
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end or BEGIN in old + after or END in before + after:
        raise OutputError(
            f"{path} has no place for the table: it must have `{BEGIN}` and, below, `{END}`, once."
        )
    return before, after


def write_page(path: Path, table: str) -> None:
    """Put a table between the marks of a page, in place of the one that is there.

    Raises:
        OutputError: if that is impossible.
    """
    before, after = read_page(path)
    write_text(path, f"{before}{BEGIN}\n{table}\n{END}{after}")


def _cells(row: dict[str, Any], home: Path) -> list[str]:
    config = Path(row["config"])
    link = f"[{config.name}]({Path(os.path.relpath(config, home)).as_posix()})"
    first = [row["dataset"], _method(row)]
    if row["state"] != "finished":
        return [*first, _why_empty(row), *["-"] * 5, link, "-"]
    seconds, peak = f"{row['training_s']:.1f}", f"{max(row['peak_bytes']) / 1e6:.0f}"
    return [*first, seconds, *_score(row), peak, f"{row['n_parameters']:,}", link, _quiet(row)]


def _method(row: dict[str, Any]) -> str:
    if row["method"] == "serial":
        n_cores, differs = row["cores_of_a_rank"], row["differs"] and f", {row['differs']}"
        return f"plain diffrax, {n_cores} {'core' if n_cores == 1 else 'cores'}{differs}"
    return f"nodepint_mpi, {row['n_ranks']} {'rank' if row['n_ranks'] == 1 else 'ranks'}"


def _why_empty(row: dict[str, Any]) -> str:
    match row["state"]:
        case "failed":
            return f"failed: {row['reason']}"
        case "left out":
            return f"left out: {row['reason']}"
        case _:
            return "not measured"


def _score(row: dict[str, Any]) -> list[str]:
    """The name of the first metric, or the loss where there is none, and both its values."""
    scores = row["scores"]
    if not scores:
        return ["-"] * 3
    name = next((name for name in scores["test"] if name != "loss"), "loss")
    values = (scores[split][name] for split in ("train", "test"))
    form = (lambda x: f"{100 * x:.2f} %") if name == "accuracy" else _two_digits
    return [name.replace("_", " "), *map(form, values)]


def _two_digits(value: float) -> str:
    """0.0042, but 4.2e-6."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if value < 1e-3 else f"{value:.2g}"


def _quiet(row: dict[str, Any]) -> str:
    busy = row["busy_share"]
    said = "quiet" if busy <= QUIET else f"{100 * busy:.0f} % busy"
    return said if row["n_starts"] == 1 else f"{said}; {row['n_starts']} starts"


def _machines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """On what, and when, it was measured."""
    done = [row for row in rows if row["state"] == "finished"]
    if not done:
        return ["Nothing has been measured yet."]
    where: dict[str, set[str]] = {}
    for row in done:
        where.setdefault(row["machine"], set()).add(row["date"])
    spans = (f"{one}, {_span(sorted(dates))}" for one, dates in where.items())
    return [f"Machine: {'; '.join(spans)}."]


def _span(dates: list[str]) -> str:
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
