"""What the run directories of the table hold, a row for each cell, and as JSON lines.

Importing this module loads neither MPI nor JAX.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nodepint_mpi.bench.studies.table.cells import TRAIN_SCORES, Cell
from nodepint_mpi.errors import DataError
from nodepint_mpi.io.directory import DONE, write_text

RESULTS = "table.jsonl"
METRICS = "metrics.jsonl"


def read_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each cell, with numbers if it is finished. Local.

    Raises:
        DataError: if a finished run cannot be read.
    """
    return [_read(cell) for cell in cells]


def write_rows(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write them as JSON lines. Local.

    Raises:
        OutputError: if that is impossible.
    """
    write_text(out / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))


def _read(cell: Cell) -> dict[str, Any]:
    state = cell.state()
    note = {} if state == "left out" else cell.kept.note() or {}
    row: dict[str, Any] = {
        "problem": cell.problem.name,
        "dataset": cell.problem.dataset,
        "config": cell.problem.config,
        "method": cell.method,
        "n_ranks": cell.n_ranks,
        "cores_of_a_rank": cell.n_cores,
        "differs": cell.differs,
        "note": cell.problem.note or "",
        "state": state,
        "reason": cell.left_out if state == "left out" else note.get("reason", ""),
    }
    if state != "finished":
        return row
    try:
        done = json.loads((cell.folder / DONE).read_text(encoding="utf-8"))
        last = (cell.folder / METRICS).read_text(encoding="utf-8").splitlines()[-1]
        row |= {
            "training_s": json.loads(last)["training_s"],  # of all starts; that in DONE is not
            "n_parameters": done["n_parameters"],
            "peak_bytes": done["peak_bytes"],
            "scores": _scores(cell, done),
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{cell.folder} is damaged ({type(error).__name__}: {error}): remove it, and its note "
            f"{cell.method}.json, to have it made again."
        ) from error
    kept = ("machine", "date", "commit", "busy_share", "load_average", "n_starts")
    return row | {name: note.get(name) for name in kept}


def _scores(cell: Cell, done: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Loss and metrics of both splits, by split; none of a problem that is not scored."""
    if not cell.problem.scored:
        return {}
    train = json.loads((cell.folder / TRAIN_SCORES).read_text(encoding="utf-8"))
    return {
        "train": {name: value for name, value in train.items() if name != "step"},
        "test": {
            name.removeprefix("test_"): value
            for name, value in done.items()
            if name.startswith("test_")
        },
    }
