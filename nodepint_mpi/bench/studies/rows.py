"""What the run directories of a study hold, a row for each run, and as JSON lines.

Importing this module loads neither MPI nor JAX.
"""

import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nodepint_mpi.bench.studies.launch import sole_use
from nodepint_mpi.bench.studies.runs import TRAIN_SCORES, Row, Run, Series
from nodepint_mpi.errors import DataError
from nodepint_mpi.io.directory import DONE, PHASES, PROVENANCE, write_text

METRICS = "metrics.jsonl"


def read_rows(series: Series, runs: Sequence[Run]) -> list[Row]:
    """A row for each run, with numbers if it is finished. Local.

    Raises:
        DataError: if a finished run cannot be read.
    """
    return [_read_row(series, run) for run in runs]


def write_rows(series: Series, out: Path, runs: Sequence[Run]) -> list[Row]:
    """Read all rows and write them as JSON lines; jobs that do so take turns. Local.

    Raises:
        DataError: if a finished run cannot be read.
        OutputError: if they cannot be written.
    """
    turn = contextlib.nullcontext()
    if series.rows_lock is not None:
        turn = sole_use(out, series.rows_lock, wait=True)
    with turn:
        rows = read_rows(series, runs)
        write_text(out / series.results, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _read_row(series: Series, run: Run) -> Row:
    state = run.state()
    note = {} if state == "left out" else run.kept.note() or {}
    # The note of a study that resumes says why the last start failed, till there is another.
    tells_why = series.resumes or state == "failed"
    reason = run.left_out or (note.get("reason", "") if tells_why else "")
    row: Row = {**run.facts, "state": state, "reason": reason}
    if state != "finished":
        return row
    try:
        row |= series.numbers(run)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{run.folder} is damaged ({type(error).__name__}: {error}): remove it, and its note "
            f"{run.kept.beside('.json').name}, to have it made again."
        ) from error
    return row | {name: note.get(name) for name in series.noted}


def read_scores(run: Run) -> Row:
    """Of a finished run: how long it took, and what it came to. Local."""
    done = _read_json(run.folder / DONE)
    return {
        "training_s": training_time(run),
        "n_parameters": done["n_parameters"],
        "peak_bytes": done["peak_bytes"],
        "scores": _scores(run, done),
    }


def training_time(run: Run) -> float:
    """Of a finished run: seconds of all starts; those in its DONE are of the last one. Local."""
    return json.loads(_metric_lines(run)[-1])["training_s"]


def read_times(run: Run) -> Row:
    """Of a finished run: times of a step by phase, counts of all steps, and what it came to. Local.

    `step_s` is, over the ranks, the median of the steps that neither compiled nor were profiled;
    `counts` are of all steps, those of `profiled` of a step as it was profiled.
    """
    done, times = _read_json(run.folder / DONE), _read_json(run.folder / PHASES)
    start = _read_json(run.folder / PROVENANCE)["starts"][-1]
    metrics = [json.loads(line) for line in _metric_lines(run)]
    phases, profiles = times["phases_s"], times["profiles"]
    estimates = [m["gradient_error_estimate"] for m in metrics if "gradient_error_estimate" in m]
    return {
        "n_steps": times["n_steps"],
        "n_warm_steps": times["n_warm_steps"],
        "step_s": times["step_s"] and _over_ranks(times["step_s"]),
        "phases_s": phases and {name: _over_ranks(phase) for name, phase in phases.items()},
        "unprofiled": profiles["missing"],
        "profiled": None
        if profiles["missing"]
        else {
            "counts": {name: _over_ranks(count) for name, count in profiles["counts"].items()},
            "sweeps": _sweeps([m for m in metrics if m["step"] - 1 in profiles["steps"]]),
        },
        "counts": {
            name: _over_ranks(count) | {"sum": count["sum"]}
            for name, count in times["counts"].items()
            if count is not None
        },
        "compile_s": times["host_s"]["compile"]["max"],
        "loss": done["train_loss"],
        "gradient_error": estimates[-1] if estimates else None,
        "sweeps": _sweeps(metrics),
        "peak_bytes": max(done["peak_bytes"]),
        "n_nodes": len(start["hosts"]),
        "all_cores": start["n_cores"],
        "serial_steps": 0 if run.is_plain else sum(m["sweeps"] == 0 for m in metrics),
        "oversubscribed": 0 < start["n_cores"] < run.n_ranks * run.n_cores,
    }


def _scores(run: Run, done: Row) -> dict[str, dict[str, float]]:
    """Loss and metrics of both splits, by split; none of a run that is not scored."""
    if not run.scored:
        return {}
    train = _read_json(run.folder / TRAIN_SCORES)
    return {
        "train": {name: value for name, value in train.items() if name != "step"},
        "test": {
            name.removeprefix("test_"): value
            for name, value in done.items()
            if name.startswith("test_")
        },
    }


def _sweeps(metrics: Sequence[Row]) -> list[float]:
    """Forward and adjoint, means over these steps."""
    names = "sweeps", "adjoint_sweeps"
    return [statistics.fmean(metric[name] for metric in metrics) for name in names]


def _over_ranks(reduced: Mapping[str, Any]) -> Row:
    """Without the list of all ranks, which may be thousands."""
    return {name: reduced[name] for name in ("min", "mean", "max")}


def _metric_lines(run: Run) -> list[str]:
    return (run.folder / METRICS).read_text(encoding="utf-8").splitlines()


def _read_json(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8"))
