"""What the run directories of the studies hold, a row for each point, and as JSON lines.

Importing this module loads neither MPI nor JAX.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nodepint_mpi.bench.studies.scaling.points import Point
from nodepint_mpi.bench.studies.series.launch import sole_use
from nodepint_mpi.errors import DataError
from nodepint_mpi.io.directory import DONE, PHASES, PROVENANCE, write_text

RESULTS = "points.jsonl"
METRICS = "metrics.jsonl"

Row = dict[str, Any]


def read_rows(points: Sequence[Point]) -> list[Row]:
    """A row for each point, with numbers if it is finished. Local.

    Raises:
        DataError: if a finished run cannot be read.
    """
    return [_read(point) for point in points]


def write_rows(out: Path, points: Sequence[Point]) -> list[Row]:
    """Read all rows and write them as JSON lines; jobs that do so take turns. Local.

    Raises:
        DataError: if a finished run cannot be read.
        OutputError: if they cannot be written.
    """
    with sole_use(out, ".lock-points", wait=True):
        rows = read_rows(points)
        write_text(out / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _read(point: Point) -> Row:
    kept = point.kept
    state, note = kept.state(), kept.note() or {}
    time, data = point.config.time, point.config.data
    assert data is not None  # else there is no such point
    row: Row = {
        "study": point.study,
        "kind": point.kind,
        "over": point.over,
        "settings": point.settings,
        "point": point.label,
        "is_plain": point.is_plain,
        "serial": point.serial,
        "n_ranks": point.n_ranks,
        "data_ranks": point.data_ranks,
        "n_cores": point.n_cores,
        "n_slices": time.n_slices,
        "batch_size": data.batch_size,
        "method": time.method,
        "run": str(point.folder),
        "state": state,
        "reason": note.get("reason", "") if state == "failed" else "",
    }
    if state != "finished":
        return row
    try:
        done = _read_json(point.folder / DONE)
        times = _read_json(point.folder / PHASES)
        start = _read_json(point.folder / PROVENANCE)["starts"][-1]
        text = (point.folder / METRICS).read_text(encoding="utf-8")
        metrics = [json.loads(line) for line in text.splitlines()]
        row |= _numbers(done, times, metrics)
        row |= {"n_nodes": len(start["hosts"]), "all_cores": start["n_cores"]}
        row["serial_steps"] = 0 if point.is_plain else sum(m["sweeps"] == 0 for m in metrics)
        row["oversubscribed"] = 0 < start["n_cores"] < point.n_ranks * point.n_cores
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{point.folder} is damaged ({type(error).__name__}: {error}): remove it, and its note "
            f"{kept.beside('.json').name}, to have it made again."
        ) from error
    kept_too = ("machine", "date", "commit", "busy_share", "load_average")
    return row | {name: note.get(name) for name in kept_too}


def _numbers(done: Mapping[str, Any], times: Mapping[str, Any], metrics: Sequence[Row]) -> Row:
    """Of a finished run: times of a step by phase, counts of all steps, and what it came to.

    `step_s` is, over the ranks, the median of the steps that neither compiled nor were profiled;
    `counts` are of all steps, those of `profiled` of a step as it was profiled.
    """
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
    }


def _sweeps(metrics: Sequence[Row]) -> list[float]:
    """Forward and adjoint, means over these steps."""
    names = "sweeps", "adjoint_sweeps"
    return [statistics.fmean(metric[name] for metric in metrics) for name in names]


def _over_ranks(reduced: Mapping[str, Any]) -> Row:
    """Without the list of all ranks, which may be thousands."""
    return {name: reduced[name] for name in ("min", "mean", "max")}


def _read_json(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8"))
