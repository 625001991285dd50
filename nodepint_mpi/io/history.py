"""A few numbers of every optimizer step, in records of fixed size.

Steps are gathered in memory and appended when a checkpoint is saved, before it: whatever a run goes
on from, all its steps are there, and later ones are dropped. Each record has a checksum, so what a
crash has torn is found. One rank writes, usually rank 0.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from nodepint_mpi.errors import OutputError
from nodepint_mpi.io.errno_text import error_text

HISTORY = "history.bin"
AT_MOST = 10_000
"""Steps that are gathered before they are written without a checkpoint."""

_FIELDS: list[tuple[str, str]] = [
    ("step", "<i8"), ("loss", "<f8"), ("grad_norm", "<f8"), ("step_s", "<f8"),
    ("sweeps", "<i4"), ("adjoint_sweeps", "<i4"), ("xxh3", "<u8"),
]  # fmt: skip
RECORD = np.dtype(_FIELDS)
_SUMMED = RECORD.itemsize - 8

_log = logging.getLogger(__name__)


class History:
    """The steps of a run, open for more. Local: made and used on one rank alone."""

    def __init__(self, folder: Path, *, resume_step: int | None = None):
        """Start the history of a run, or go on with it.

        Args:
            folder: The run directory. A new run makes its file with the first steps.
            resume_step: Step of the checkpoint the run goes on from: later steps are dropped.

        Raises:
            OutputError: if the file cannot be read or cut.
        """
        self._path, self._mode = folder / HISTORY, "xb" if resume_step is None else "ab"
        self._taken: list[tuple[int, float, float, float, int, int, int]] = []
        if resume_step is not None:
            self._cut(resume_step)

    def append(
        self, step: int, *, loss: float, grad_norm: float, step_s: float, sweeps: tuple[int, int]
    ) -> None:
        """Add a step, with its sweeps forward and back; it is written later. Raises OutputError."""
        self._taken.append((step, loss, grad_norm, step_s, *sweeps, 0))
        if len(self._taken) >= AT_MOST:
            self.write()

    def write(self) -> None:
        """Bring all steps so far to the disk. Raises OutputError."""
        if not self._taken:
            return
        records = np.array(self._taken, RECORD)
        records["xxh3"] = _sums(records)
        try:
            with open(self._path, self._mode) as file:
                file.write(records.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error_text(error)}") from error
        self._taken, self._mode = [], "ab"

    def _cut(self, step: int) -> None:
        """Leave no step after this one, and nothing that is damaged."""
        kept = _read(self._path)
        kept = kept[kept["step"] <= step]
        try:
            if self._path.exists():
                os.truncate(self._path, kept.nbytes)
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error_text(error)}") from error
        if len(kept) and kept["step"][-1] < step:
            _log.warning(
                "%s ends at step %d: the steps up to %d are missing in it",
                self._path, kept["step"][-1], step,
            )  # fmt: skip


def read_history(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Numbers of every optimizer step of a run, as columns of equal length. Local; no MPI.

    Args:
        folder: The run directory; the run may still go on.

    Returns:
        `step` (steps done), `loss` of the step's batch, `grad_norm`, `step_s` (seconds), `sweeps`
        and `adjoint_sweeps`; no rows if nothing has been written, as before the first checkpoint.

    Raises:
        OutputError: if the file cannot be read.
    """
    records = _read(Path(folder) / HISTORY)
    return {name: records[name].copy() for name, _ in _FIELDS if name != "xxh3"}


def every_step(folder: Path, records: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of `read_history`, and before and after them those of the records. Local.

    A run that an older version began has records alone at first, and one under way has records
    of steps after its last checkpoint.

    Args:
        folder: The run directory.
        records: Columns of the run's records, with `step`; NaN stands for what they lack.

    Raises:
        OutputError: if the history cannot be read.
    """
    history = read_history(folder)
    steps, recorded = history["step"], records["step"]
    inside = np.zeros(len(recorded), bool)
    if len(steps):
        inside = (recorded >= steps[0]) & (recorded <= steps[-1])
    order = np.argsort(np.concatenate([recorded[~inside], steps]), kind="stable")
    unknown = np.full(len(recorded), np.nan)
    return {
        name: np.concatenate([records.get(name, unknown)[~inside], column])[order]
        for name, column in history.items()
    }


def _read(path: Path) -> np.ndarray:
    """The records up to the first that is damaged, torn, or not later than the one before."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return np.zeros(0, RECORD)
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error_text(error)}") from error
    n_whole = len(content) // RECORD.itemsize
    records = np.frombuffer(content[: n_whole * RECORD.itemsize], RECORD)
    good = records["xxh3"] == _sums(records)
    good[1:] &= records["step"][1:] > records["step"][:-1]
    n_good = n_whole if good.all() else int(np.argmin(good))
    if n_good * RECORD.itemsize < len(content):
        _log.warning("%s: what follows %d good records is damaged and was left out", path, n_good)
    return records[:n_good]


def _sums(records: np.ndarray) -> np.ndarray:
    """XXH3 of the numbers of each record."""
    rows = memoryview(records.tobytes())
    starts = range(0, len(rows), RECORD.itemsize)
    sums = [xxhash.xxh3_64_intdigest(rows[start : start + _SUMMED]) for start in starts]
    return np.array(sums, np.uint64)
