"""The numbers a run reports: one JSON line each, and the same as columns in HDF5.

The JSON lines are the record: each is on its way to the disk when `append` returns, and a crash
costs at most the last one. The HDF5 file is made from them, whole, at checkpoints and at the end.
One rank writes, usually rank 0.
"""

import io
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from nodepint_mpi.errors import DataError, OutputError
from nodepint_mpi.io.errno_text import error_text
from nodepint_mpi.io.hdf5 import LIBVER
from nodepint_mpi.io.hdf5_check import check_contents, find_dataset
from nodepint_mpi.io.history import History

JSON_LINES = "metrics.jsonl"
TABLE = "metrics.h5"

_log = logging.getLogger(__name__)


class Records:
    """Metrics of a run, open for more. Local: made and used on one rank alone.

    With the `history` of all steps, which is written when these are closed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None = None,
        copy_to: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        """Start the metrics of a run, or go on with them.

        Args:
            folder: The run directory.
            resume_step: Step of the checkpoint the run goes on from; records of later steps are
                dropped, since they will be made again. None for a new run.
            copy_to: Is given every new record as well.

        Raises:
            OutputError: if the folder cannot be written, or a new run finds metrics there.
        """
        self.folder, self._copy_to = folder, copy_to
        self.history = History(folder, resume_step=resume_step)
        self.last: dict[str, Any] = {}  # of the records a resumed run goes on from
        self._steps: list[int] = []  # of all records there should be
        path = folder / JSON_LINES
        try:
            if resume_step is not None:
                kept = [record for record in _read(path) if record["step"] <= resume_step]
                _replace(path, "".join(map(_line, kept)).encode())
                self.last = kept[-1] if kept else {}
                self._steps = [record["step"] for record in kept]
            self._file = open(path, "x" if resume_step is None else "a", encoding="ascii")
        except FileExistsError as error:
            raise OutputError(f"{path} exists; resume that run or choose another folder") from error
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error_text(error)}") from error

    def append(self, step: int, **numbers: Any) -> None:
        """Add one record: plain numbers or arrays of one number. Raises OutputError."""
        record = {"step": step} | {name: _plain(value) for name, value in numbers.items()}
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self._file.name}: {error_text(error)}") from error
        self._steps.append(int(step))
        if self._copy_to is not None:
            self._copy_to(record)

    def write_table(self, **attributes: str | int | float) -> None:
        """Make `metrics.h5` anew from all records so far.

        One dataset for each quantity, aligned with the dataset `step`; NaN where a record lacks
        the quantity. The attributes (config text, fingerprint) go to the file.

        Raises:
            OutputError: if it cannot be written, or the records in the file are not those that
                were made, as when another program wrote there too.
        """
        records = read_records(self.folder)
        found = [record["step"] for record in records]
        if found != self._steps:
            last = f"up to step {found[-1]}" if found else "at all"
            raise OutputError(
                f"{self.folder / JSON_LINES} holds {len(found)} records, {last}, expected the "
                f"{len(self._steps)} that were made, up to step {max(self._steps, default=0)}: "
                "another process changed or removed that file. Check that one job only uses this "
                "directory, and resume the run."
            )
        path = self.folder / TABLE
        image = io.BytesIO()  # in memory first: HDF5 does not recover from a full disk
        with h5py.File(image, "w", libver=LIBVER) as file:
            file.attrs.update(attributes)
            for name, column in _columns(records).items():
                file.create_dataset(name, data=column, maxshape=(None,))
        try:
            _replace(path, image.getvalue())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error_text(error)}") from error

    def close(self) -> None:
        """Bring the records to the disk and close. Raises OutputError."""
        if self._file.closed:
            return
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self._file.name}: {error_text(error)}") from error
        finally:
            self.history.write()

    def __enter__(self) -> "Records":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in the order they were made; none if there are none. Local."""
    try:
        return _read(folder / JSON_LINES)
    except OSError as error:
        raise OutputError(f"cannot read {folder / JSON_LINES}: {error_text(error)}") from error


def read_table(folder: Path) -> dict[str, np.ndarray]:
    """The columns of `metrics.h5`; none if there is no such file. Local.

    Raises:
        DataError: if it is damaged.
    """
    path = folder / TABLE
    if not path.exists():
        return {}
    try:
        with h5py.File(path, "r", locking=False) as file:
            check_contents(file, path, chunked=True)
            return _read_columns(file)
    except (
        OSError, KeyError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise DataError(f"{path} is damaged: {error_text(error)}") from error


def _read_columns(file: h5py.File) -> dict[str, np.ndarray]:
    """Columns of numbers, all as long as the column of steps. Raises ValueError."""
    steps, columns = find_dataset(file, "step"), {}
    if steps.dtype.kind not in "iu" or steps.ndim != 1:
        raise ValueError(
            f"step is {steps.dtype} of shape {steps.shape}, expected a list of integers"
        )
    for name in file:
        dataset = find_dataset(file, name)
        if dataset.dtype.kind not in "biuf" or dataset.shape != steps.shape:
            raise ValueError(
                f"{name} is {dataset.dtype} of shape {dataset.shape}, expected {len(steps)} numbers"
            )
        columns[name] = np.asarray(dataset[()], np.int64 if name == "step" else float)
    return columns


def _read(path: Path) -> list[dict[str, Any]]:
    """The records in a file; a line that a crash has torn is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # the last one has no end of line
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
            if not isinstance(record, dict) or abs(record["step"]) >= 2**63:
                raise ValueError("no record of a step")
            records.append(record)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            _log.warning("%s: line %d is damaged and was skipped", path, number)
    if lines[-1]:
        _log.warning("%s: the last line is incomplete and was skipped", path)
    return records


def _line(record: Mapping[str, Any]) -> str:
    """One record; NaN and Infinity as Python's `json` writes and reads them."""
    return json.dumps(record) + "\n"


def _plain(value: Any) -> int | float:
    value = np.asarray(value).item()
    return value if isinstance(value, int) else float(value)


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = {name: None for record in records for name in record if name != "step"}
    columns: dict[str, np.ndarray] = {
        "step": np.array([record["step"] for record in records], np.int64)
    }
    for name in names:
        columns[name] = np.array([record.get(name, np.nan) for record in records], np.float64)
    return columns


def _replace(path: Path, content: bytes) -> None:
    """Give a file new content, at once or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
