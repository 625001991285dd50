"""Data that a function of the user's own makes: `data.source = "file.py:function"`.

The function is called with `data.options` and returns a `datasets.DatasetDict`, or for each split
the columns as arrays, a row for each sample:

    {"train": {"t": times, "u": states}, "test": {"t": times, "u": states}}

What it makes is kept in `data/made/NAME-DIGEST` under the working directory. The digest is that of
the code in the function's file, of the options and of the precision, so other code makes other
data and the same is not made twice. A run's `config.toml` names that folder: a run that is resumed
or evaluated reads the data it was started with.
"""

import hashlib
import inspect
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from nodepint_mpi.build.objects import is_object
from nodepint_mpi.data.columns import open_column, open_series
from nodepint_mpi.data.datasets import Split
from nodepint_mpi.data.prepare import resolve_options
from nodepint_mpi.data.prepared import no_progress_bars, save_prepared
from nodepint_mpi.data.sources import MADE, PROVENANCE
from nodepint_mpi.errors import DataError, NodepintError

_log = logging.getLogger(__name__)

_ARRAYS = {3: datasets.Array2D, 4: datasets.Array3D, 5: datasets.Array4D, 6: datasets.Array5D}


def make_own_data(
    function: Callable[..., Any],
    name: str,
    code: str,
    options: Mapping[str, Any],
    *,
    missing: bool = False,
) -> Path:
    """The folder of what `function(**options)` makes, made unless it is there. Local.

    Args:
        function: The user's.
        name: Import path, for messages; the folder is named after its file.
        code: What the function depends on, for the digest.
        options: Those that have no default must be given.
        missing: Whether NaN stands for observations that were not made.

    Returns:
        The folder, relative to the working directory.

    Raises:
        DataError: for options that do not fit, a function that fails, and data that are empty, of
            no use or not finite.
    """
    parameters = list(inspect.signature(function).parameters.values())
    precision = jnp.zeros(()).dtype.name  # of what the function computes by JAX
    origin = {
        "name": name,
        "options": resolve_options(parameters, options, name),
        "precision": precision,
        "code_sha256": hashlib.sha256(code.encode()).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
    home, _, own = name.rpartition(":")
    target = MADE / f"{own if is_object(name) else Path(home).stem}-{digest}"
    if (target / PROVENANCE).is_file():  # its files are compared with that when they are opened
        return target
    made = _call(function, name, origin["options"])
    rows = save_prepared(made, target, origin, replace=False, missing=missing)
    counts = ", ".join(f"{count} rows {split}" for split, count in rows.items())
    _log.info("%s made: %s", name, counts)
    return target


def _call(
    function: Callable[..., Any], name: str, options: Mapping[str, Any]
) -> dict[str, datasets.Dataset]:
    """The splits that the function returns."""
    try:
        with no_progress_bars():
            made = function(**options)
    except NodepintError:
        raise
    except Exception as error:
        raise DataError(f"{name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, Mapping) or not made:
        raise DataError(
            f"{name} must return a datasets.DatasetDict, or columns by split as in "
            f'{{"train": {{"t": times, "u": states}}, "test": ...}}, given {type(made).__name__}'
        )
    return {str(split): _as_split(part, split, name) for split, part in made.items()}


def content_of(made: Any, name: str) -> str:
    """A digest of data that are given and not made, by all their numbers. Local.

    Args:
        made: Columns or a dataset for each split.
        name: For messages.

    Raises:
        DataError: if they are neither.
    """
    whole = hashlib.sha256()
    for split, part in _call(lambda: made, name, {}).items():
        part = _in_order(part)
        table = part.data.table
        whole.update(f"{split} {part.features}".encode())
        with pa.ipc.new_stream(pa.PythonFile(_Hashing(whole), mode="w"), table.schema) as stream:
            stream.write_table(table)
    return whole.hexdigest()


class _Hashing(io.RawIOBase):
    """A file that keeps nothing but a digest of what is written."""

    def __init__(self, whole: Any):
        self._whole = whole

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._whole.update(data)
        return len(data)


def columns_as_split(columns: Any, name: str, series: Sequence[str]) -> Split:
    """Columns of one split in memory as those of a file are opened. Local.

    Args:
        columns: Arrays by name, a row for each sample, or a `datasets.Dataset`.
        name: For messages.
        series: Those whose rows may be lists of different lengths.

    Raises:
        DataError: if they are something else.
    """
    dataset = _in_order(_as_split(columns, "given", name))
    opened = {
        name: (open_series if name in series else open_column)(
            name, dataset.data.column(name), dataset.features[name]
        )
        for name in dataset.column_names
    }
    return Split(dataset.num_rows, opened)


def _in_order(dataset: datasets.Dataset) -> datasets.Dataset:
    """With the rows of its Arrow table, of which a dataset may be a selection."""
    if dataset._indices is None:
        return dataset
    with no_progress_bars():
        return dataset.flatten_indices()


def _as_split(part: Any, split: Any, name: str) -> datasets.Dataset:
    try:
        return part if isinstance(part, datasets.Dataset) else _as_dataset(part)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} made no data for split {split!r}: {error}") from error


def _as_dataset(columns: Any) -> datasets.Dataset:
    """Arrays by column as a dataset, in their own types; ValueError where that cannot be."""
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(f"it must be a dict of arrays, given {type(columns).__name__}")
    arrays = {str(name): _as_rows(array) for name, array in columns.items()}
    lengths = {name: len(a) for name, a in arrays.items()}
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
        raise ValueError(f"columns need equally many rows, at least one, given {lengths}")
    features = datasets.Features({
        name: _series_feature(name, a) if isinstance(a, list) else _feature(name, a)
        for name, a in arrays.items()
    })  # fmt: skip
    return datasets.Dataset.from_dict(arrays, features=features)


def _as_rows(column: Any) -> np.ndarray | list[np.ndarray]:
    """A column as one array, or as a list of arrays where series differ in length."""
    if isinstance(column, list | tuple):
        rows = [np.asarray(row) for row in column]
        if len({row.shape for row in rows}) > 1:
            return rows
    array = np.asarray(column)
    return array if array.ndim else np.zeros(0)


def _series_feature(name: str, rows: list[np.ndarray]) -> Any:
    """Of a column of series: lists of numbers, or of arrays of one shape."""
    if any(row.ndim == 0 or row.shape[1:] != rows[0].shape[1:] for row in rows):
        shapes = sorted({row.shape for row in rows})
        raise ValueError(f"column {name!r} has rows of shapes {shapes}: only the first may differ")
    kind = np.result_type(*rows)
    real = np.issubdtype(kind, np.number) and not np.issubdtype(kind, np.complexfloating)
    if not (real or kind == np.dtype(bool)):
        raise ValueError(f"column {name!r} must hold real numbers, given {kind}")
    feature: Any = datasets.Value(kind.name)
    for length in reversed(rows[0].shape[1:]):
        feature = datasets.List(feature, length=length)
    return datasets.List(feature)


def _feature(name: str, array: np.ndarray) -> Any:
    if not (
        array.dtype == np.dtype(bool)
        or (np.issubdtype(array.dtype, np.number) and np.isrealobj(array))
    ):
        raise ValueError(f"column {name!r} must hold real numbers, given {array.dtype}")
    match array.shape:
        case [_]:
            return datasets.Value(array.dtype.name)
        case [_, length]:
            return datasets.List(datasets.Value(array.dtype.name), length=length)
        case [_, *shape] if array.ndim in _ARRAYS:
            return _ARRAYS[array.ndim](tuple(shape), array.dtype.name)
    raise ValueError(f"column {name!r} has rows of {array.ndim - 1} axes, at most 5 are possible")
