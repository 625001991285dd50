"""What a run directory holds, read without its data or its model. Local."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.partition import show_grid
from nodepint_mpi.errors import DataError
from nodepint_mpi.io.checkpoint_folder import find_checkpoints
from nodepint_mpi.io.directory import BEST, CHECKPOINTS, DONE, LOG, PHASES, PROVENANCE, read_run
from nodepint_mpi.io.history import every_step
from nodepint_mpi.io.records import JSON_LINES, TABLE, read_records, read_table

Columns = dict[str, np.ndarray]
"""Quantities by name, one entry a record, aligned with `step`; NaN where a record lacks one."""


class Facts(NamedTuple):
    """A run as its directory tells it.

    `by_step` are loss, gradient norm, seconds and sweeps of every step, as far as the run's history
    has them, and else of the records. `done` holds the final numbers; None if the run is not
    finished. `times` are those of the last start that came to an end, from `profiling`; None if
    there is none. `n_damaged` counts the lines of the metrics that could not be read. `checkpoints`
    are names and bytes, newest first, and then the best one.
    """

    folder: Path
    config: Config
    columns: Columns
    by_step: Columns
    n_damaged: int
    done: dict[str, Any] | None
    times: dict[str, Any] | None
    starts: list[dict[str, Any]]
    checkpoints: list[tuple[str, int]]
    log: list[str]

    @property
    def steps(self) -> np.ndarray:
        """Optimizer steps done at every record."""
        return self.columns["step"]

    def column(self, name: str) -> np.ndarray | None:
        """A quantity at every record; None if no record has it."""
        values = self.columns.get(name)
        return None if values is None or not np.any(np.isfinite(values)) else values


def read_facts(folder: Path) -> Facts:
    """Read a run directory; the run need not be finished.

    Raises:
        ConfigError: if it is none.
        DataError: if no step was recorded, or what is recorded cannot be read.
    """
    config = read_run(folder)
    records = read_records(folder)
    columns = as_columns(records, folder / JSON_LINES) if records else read_table(folder)
    n_damaged = _count_lines(folder / JSON_LINES) - len(records)
    if not len(columns.get("step", ())):
        why = f"none of its {n_damaged} lines can be read" if n_damaged else "it is empty or gone"
        raise DataError(
            f"{folder} has no recorded step: {JSON_LINES}: {why}, and there is no {TABLE}. A run "
            "reports its first step after `output.log_every` of them."
        )
    done, times = _read_json(folder / DONE), _read_json(folder / PHASES)
    starts = (_read_json(folder / PROVENANCE) or {}).get("starts", [])
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise DataError(f"{folder / PROVENANCE} is damaged: `starts` is not a list of tables.")
    paths = find_checkpoints(folder / CHECKPOINTS) + find_checkpoints(folder / BEST)
    checkpoints = [
        (
            path.name if path.parent.name == CHECKPOINTS else f"{BEST}/{path.name}",
            path.stat().st_size,
        )
        for path in paths
    ]
    return Facts(
        folder,
        config,
        columns,
        every_step(folder, columns),
        n_damaged,
        done,
        times,
        starts,
        checkpoints,
        _lines(folder / LOG),
    )


def as_columns(records: list[dict[str, Any]], path: Path) -> Columns:
    """Records as columns; what is a list or a table in a record is left out. Local.

    Raises:
        DataError: if text stands where a number should.
    """
    columns: Columns = {"step": np.array([record["step"] for record in records], np.int64)}
    for name in {name: None for record in records for name in record if name != "step"}:
        values = [record.get(name) for record in records]
        if any(isinstance(value, list | dict) for value in values):
            continue
        try:
            columns[name] = np.array([np.nan if v is None else v for v in values], float)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path} is damaged: `{name}` is not always a number: {error}"
            ) from None
    return columns


def seconds(facts: Facts) -> tuple[np.ndarray, bool] | None:
    """Seconds in optimizer steps at every record, and whether they were measured. Local.

    Of runs that did not record them they are estimated: all steps since the last record are taken
    to have lasted as long as the one that is reported.
    """
    measured = facts.column("training_s")
    if measured is not None and np.all(np.isfinite(measured)):
        return measured, True
    each = facts.column("step_s")
    if each is None:
        return None
    return np.cumsum(np.diff(facts.steps, prepend=0) * each), False


def final_numbers(facts: Facts) -> dict[str, Any]:
    """What the run came to, or how far it has come. Local.

    `training_s` is of all starts where that was recorded, else of the last one.
    """
    loss, cost, spent = facts.column("loss"), facts.column("cost"), seconds(facts)
    if facts.done is not None:
        left_out = ("run_directory", "n_ranks")
        done = {name: value for name, value in facts.done.items() if name not in left_out}
        return done | ({"training_s": float(spent[0][-1])} if spent and spent[1] else {})
    return {
        "status": "not finished",
        "step": int(facts.steps[-1]),
        "train_loss": None if loss is None else float(loss[-1]),
        "training_s": None if spent is None else float(spent[0][-1]),
    } | ({} if cost is None else {"cost": float(cost[-1])})


def rank_counts(facts: Facts) -> str:
    """Ranks of every start, such as "2, 4 (2 x 2)". Local."""
    return ", ".join(map(format_ranks, facts.starts))


def format_ranks(start: dict[str, Any]) -> str:
    """Ranks of a start; where they form a grid also its groups (of samples) x ranks along time, and
    x ranks that share tangents if there are any."""
    n_ranks = start.get("n_ranks")
    if n_ranks is None:
        return "?"
    return show_grid(n_ranks, start.get("data_ranks", 1), start.get("basis_ranks", 1))


def _read_json(path: Path) -> dict[str, Any] | None:
    """None if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it holds no table of names and values.")
    return content


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
