"""The benchmark table: its cells, the table in Markdown, and its place between marks of a page.

A cell is a run directory, OUT/NAME/METHOD, and a note beside it, METHOD.json. Importing this module
loads neither MPI nor JAX.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from nodepint_mpi.bench.studies.kept import QUIET, check_run
from nodepint_mpi.bench.studies.rows import read_scores
from nodepint_mpi.bench.studies.runs import Row, Run, Series
from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.config.plain import plain_config
from nodepint_mpi.config.table import TableList, TableProblem
from nodepint_mpi.errors import ConfigError, OutputError
from nodepint_mpi.io.directory import write_text
from nodepint_mpi.names import hint

TABLE = Series(
    results="table.jsonl",
    lock=".lock",
    rows_lock=None,
    resumes=True,
    begins="training",
    changed="its config or its cores have changed",
    numbers=read_scores,
    noted=("machine", "date", "commit", "busy_share", "load_average", "n_starts"),
)

BEGIN, END = "<!-- table -->", "<!-- /table -->"

_HEAD = (
    "dataset", "method", "training, s", "score", "train", "test", "peak memory of a rank, MB",
    "parameters", "config", "machine",
)  # fmt: skip


def plan_cells(
    table: TableList, out: Path, *, only: Sequence[str] = (), ranks: Sequence[int] = ()
) -> list[Run]:
    """All cells in the order of rows; those to be done are `chosen`. Local; writes nothing.

    Args:
        table: The list.
        out: Where the cells are.
        only: Names of the problems to do; all if there are none.
        ranks: Numbers of ranks for these instead of those of the list.

    Raises:
        NodepintError: for names that nobody knows, configs and numbers of ranks that cannot be,
            and data that are not prepared.
    """
    names = [problem.name for problem in table.problem]
    for name in only:
        if name not in names:
            raise ConfigError(f"`--only {name}`: unknown problem{hint(name, names)}")
    cells = []
    for problem in table.problem:
        chosen = not only or problem.name in only
        if chosen and ranks:
            problem = problem.model_copy(update={"ranks": list(ranks)})
        question = table.question_of(problem)
        asked = {"question": question.title, "why": question.why}
        cells += [
            cell._replace(facts=cell.facts | asked) for cell in _cells_of(problem, out, chosen)
        ]
    return cells


def _cells_of(problem: TableProblem, out: Path, chosen: bool) -> list[Run]:
    config, most = read_config(problem.config), max(problem.ranks)
    if chosen:
        check_run(config, most, problem.config)
    cells = [_make_cell(problem, f"ranks-{n}", n, 1, config, out) for n in problem.ranks]
    if problem.serial:
        differs = "" if config.time.relaxation is None else "without relaxation"
        try:
            plain, why = plain_config(config), ""
        except ConfigError as error:
            plain, why, differs = None, str(error), ""
        serial = _make_cell(problem, "serial", 1, most, plain, out, differs=differs)
        cells = [serial._replace(is_plain=True, left_out=why), *cells]
    return [cell._replace(chosen=chosen) for cell in cells]


def _make_cell(
    problem: TableProblem,
    method: str,
    n_ranks: int,
    n_cores: int,
    config: Config | None,
    out: Path,
    *,
    differs: str = "",
) -> Run:
    """One training: of a problem, by one method.

    `differs` says what plain training cannot do as the config asks.
    """
    return Run(
        label=f"{problem.name}, {method}",
        folder=out / problem.name / method,
        config=config,
        n_ranks=n_ranks,
        n_cores=n_cores,
        facts={
            "problem": problem.name,
            "dataset": problem.dataset,
            "config": problem.config,
            "method": method,
            "n_ranks": n_ranks,
            "cores_of_a_rank": n_cores,
            "differs": differs,
            "note": problem.note or "",
        },
        config_file=problem.config,
        scored=problem.scored,
    )


def format_table(rows: Sequence[Row], home: Path) -> str:
    """The table, a part for each question with who wins, then the machines, dates, and notes.

    Args:
        rows: As `read_rows` gives them.
        home: The folder of the page, which links to configs are relative to.
    """
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row["question"], []).append(row)
    lines = []
    for title, part in parts.items():
        lines += [f"### {title}", ""] if title else []
        lines += [f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
        lines += [f"| {' | '.join(map(_escape, _cells(row, home)))} |" for row in part]
        verdicts = _verdicts(part)
        lines += ["", *verdicts, ""] if verdicts else [""]
        lines += [part[0]["why"], ""] if part[0]["why"] else []
    notes = {row["dataset"]: row["note"] for row in rows if row["note"]}
    below = [*_machines(rows), *(f"{dataset}: {note}." for dataset, note in notes.items())]
    return "\n".join([*lines, *below])


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


def _cells(row: Row, home: Path) -> list[str]:
    config = Path(row["config"])
    link = f"[{config.name}]({Path(os.path.relpath(config, home)).as_posix()})"
    first = [row["dataset"], _method(row)]
    if row["state"] != "finished":
        return [*first, _why_empty(row), *["-"] * 5, link, "-"]
    seconds, peak = f"{row['training_s']:.1f}", f"{max(row['peak_bytes']) / 1e6:.0f}"
    return [*first, seconds, *_score(row), peak, f"{row['n_parameters']:,}", link, _quiet(row)]


def _method(row: Row) -> str:
    if row["method"] == "serial":
        n_cores, differs = row["cores_of_a_rank"], row["differs"] and f", {row['differs']}"
        return f"plain diffrax, {n_cores} {'core' if n_cores == 1 else 'cores'}{differs}"
    return f"nodepint_mpi, {row['n_ranks']} {'rank' if row['n_ranks'] == 1 else 'ranks'}"


def _why_empty(row: Row) -> str:
    match row["state"]:
        case "failed":
            return f"failed: {row['reason']}"
        case "left out":
            return f"left out: {row['reason']}"
        case _:
            return "not measured"


def _score(row: Row) -> list[str]:
    """The name of the first metric, or the loss where there is none, and both its values."""
    scores = row["scores"]
    if not scores:
        return ["-"] * 3
    name = next((name for name in scores["test"] if name != "loss"), "loss")
    values = (scores[split][name] for split in ("train", "test"))
    form = (lambda x: f"{100 * x:.2f} %") if name == "accuracy" else _two_digits
    return [name.replace("_", " "), *map(form, values)]


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """For each dataset, as a list: who took less time on the same cores, and both test scores."""
    lines = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == dataset]
        serial = next((row for row in own if row["method"] == "serial"), None)
        if serial is None or serial["state"] != "finished":
            if serial is not None and serial["state"] == "left out":
                lines.append(f"- {dataset}: no serial training to compare with.")
            continue
        ours = [
            row for row in own if row["method"] != "serial" and row["state"] == "finished"
            and row["n_ranks"] * row["cores_of_a_rank"] == serial["cores_of_a_rank"]
        ]  # fmt: skip
        if ours:
            lines.append(f"- {dataset}: {_verdict(serial, ours[0])}")
    return lines


def _verdict(serial: Row, ours: Row) -> str:
    """Which of two rows on the same cores took less time."""
    share = ours["training_s"] / serial["training_s"]
    (name, _, reached), (other, _, wanted) = _score(ours), _score(serial)
    against = f"; test {name} {reached} against {wanted}" if name == other != "-" else ""
    ranks = f"nodepint_mpi on {ours['n_ranks']} {'rank' if ours['n_ranks'] == 1 else 'ranks'}"
    if share < 1:
        return f"{ranks} takes {share:.2f} of the time of plain diffrax{against}."
    return f"plain diffrax is faster: {ranks} takes {share:.1f} times its time{against}."


def _two_digits(value: float) -> str:
    """0.0042, but 4.2e-6."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if value < 1e-3 else f"{value:.2g}"


def _quiet(row: Row) -> str:
    busy = row["busy_share"]
    said = "quiet" if busy <= QUIET else f"{100 * busy:.0f} % busy"
    return said if row["n_starts"] == 1 else f"{said}; {row['n_starts']} starts"


def _machines(rows: Sequence[Row]) -> list[str]:
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
