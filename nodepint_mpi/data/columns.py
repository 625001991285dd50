"""Columns of an Arrow table as NumPy arrays, without copying the table.

A memory-mapped table comes in chunks (record batches). Numbers, and lists of numbers that are
equally long in all rows, lie densely in each chunk, so a chunk is an array of shape
(rows, *shape of a row) that shares the mapped memory. Images and booleans are stored encoded and
decoded row by row when taken.
"""

import abc
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from nodepint_mpi.errors import DataError


class AbstractColumn(abc.ABC):
    """One column: `shape` and `dtype` of a row, and rows by number."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @abc.abstractmethod
    def take(self, index: np.ndarray) -> np.ndarray:
        """Copies of some rows, stacked; `index` holds valid int64 row numbers. Local."""


class ViewColumn(AbstractColumn):
    """Dense numbers: `views` are read-only arrays over the mapped file, one per chunk."""

    def __init__(self, views: tuple[np.ndarray, ...]):
        self.views = views
        self.shape = views[0].shape[1:]
        self.dtype = views[0].dtype
        self._starts = np.cumsum([0, *(len(view) for view in views[:-1])])

    def take(self, index: np.ndarray) -> np.ndarray:
        if len(self.views) == 1:
            return self.views[0][index]
        out = np.empty((len(index), *self.shape), self.dtype)
        chunk = np.searchsorted(self._starts, index, side="right") - 1
        row = index - self._starts[chunk]
        if len(index) < 4 * len(self.views):  # few rows of each chunk: one by one is faster
            for i, (c, r) in enumerate(zip(chunk.tolist(), row.tolist(), strict=True)):
                out[i] = self.views[c][r]
            return out
        order = np.argsort(chunk, kind="stable")
        bounds = np.searchsorted(chunk[order], np.arange(len(self.views) + 1))
        for c, view in enumerate(self.views):
            here = order[bounds[c] : bounds[c + 1]]
            out[here] = view[row[here]]
        return out

    def check_finite(self, name: str, *, missing: bool = False) -> None:
        """Make sure that all numbers are finite, or NaN where they may be `missing`. Local.

        Raises:
            DataError: with the first row of column `name` that holds anything else.
        """
        if not np.issubdtype(self.dtype, np.floating):
            return
        for start, view in zip(self._starts.tolist(), self.views, strict=True):
            bad = np.isinf(view) if missing else ~np.isfinite(view)
            if bad.any():
                row, *entry = (int(i) for i in np.argwhere(bad)[0])
                raise _not_finite(name, start + row, entry, view[(row, *entry)])


def _not_finite(name: str, row: int, entry: list[int], value: Any) -> DataError:
    at = f" at {entry}" if entry else ""
    return DataError(
        f"row {row} of column {name!r} holds {value}{at}, but all numbers must be finite: fix the "
        "data and prepare them again"
    )


class RaggedColumn(AbstractColumn):
    """Lists of numbers, or of equally shaped arrays, that differ in length from row to row.

    `shape` and `dtype` are those of one entry of a list, `lengths` (rows,) the numbers of entries.
    """

    def __init__(self, lengths: np.ndarray, values: np.ndarray):
        self.lengths = lengths
        self.shape = values.shape[1:]
        self.dtype = values.dtype
        self._values = values
        self._ends = np.cumsum(lengths)

    def check_finite(self, name: str, *, missing: bool = False) -> None:
        """As that of `ViewColumn`. Local."""
        if not np.issubdtype(self.dtype, np.floating):
            return
        bad = np.isinf(self._values) if missing else ~np.isfinite(self._values)
        if bad.any():
            place, *entry = (int(i) for i in np.argwhere(bad)[0])
            row = int(np.searchsorted(self._ends, place, side="right"))
            entry = [place - int(self._ends[row] - self.lengths[row]), *entry]
            raise _not_finite(name, row, entry, self._values[place])

    def take(self, index: np.ndarray) -> np.ndarray:
        """Rows filled up with zeros to the longest of all rows: (len(index), longest, *shape)."""
        longest = int(self.lengths.max(initial=0))
        out = np.zeros((len(index), longest, *self.shape), self.dtype)
        for i, row in enumerate(index.tolist()):
            end, length = int(self._ends[row]), int(self.lengths[row])
            out[i, :length] = self._values[end - length : end]
        return out


class EncodedColumn(AbstractColumn):
    """Cells that are decoded one by one; all must have the shape and type of row 0."""

    def __init__(self, name: str, cells: pa.ChunkedArray, decode: Callable[[Any], np.ndarray]):
        self._name = name
        self._cells = cells
        self._decode = decode
        first = self._row(0)
        self.shape = first.shape
        self.dtype = first.dtype

    def take(self, index: np.ndarray) -> np.ndarray:
        out = np.empty((len(index), *self.shape), self.dtype)
        for i, row in enumerate(index.tolist()):
            value = self._row(row)
            if value.shape != self.shape or value.dtype != self.dtype:
                raise DataError(
                    f"row {row} of column {self._name!r} is {value.dtype} of shape "
                    f"{value.shape}, but row 0 is {self.dtype} of shape {self.shape}"
                )
            out[i] = value
        return out

    def _row(self, row: int) -> np.ndarray:
        cell = self._cells[row].as_py()
        try:
            if cell is None:
                raise ValueError("it is missing")
            return self._decode(cell)
        except Exception as error:  # whatever the image library makes of damaged bytes
            raise DataError(
                f"row {row} of column {self._name!r} cannot be decoded ({error})"
            ) from error


def open_series(name: str, cells: pa.ChunkedArray, feature: Any) -> AbstractColumn:
    """A column whose rows may be lists of different lengths. Local.

    Args:
        name: For messages.
        cells: As in the table.
        feature: What `datasets` knows of it.

    Returns:
        A `RaggedColumn` if the lengths differ, else what `open_column` makes of it.

    Raises:
        DataError: for values that are missing, and types that are not numbers.
    """
    chunks = [chunk for chunk in cells.chunks if len(chunk)]
    ragged = [_ragged(chunk) for chunk in chunks]
    lengths = [one for one in ragged if one is not None]
    if len(lengths) < len(chunks):
        return open_column(name, cells, feature)
    rows = np.concatenate([one for one, _ in lengths])
    if (rows == rows[0]).all() and rows[0]:
        return open_column(name, cells, feature)
    try:
        parts = [_dense(values) for _, values in lengths if len(values)]
        if not parts:
            raise ValueError("all lists are empty")
        return RaggedColumn(rows, np.concatenate(parts))
    except ValueError as error:
        raise DataError(f"column {name!r} does not hold series of numbers: {error}") from error


def _ragged(array: pa.Array) -> tuple[np.ndarray, pa.Array] | None:
    """Lengths of the lists of a chunk, and their entries; None if it holds no lists."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if array.null_count or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    offsets = np.from_dlpack(array.offsets)
    return np.diff(offsets), array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))


def open_column(name: str, cells: pa.ChunkedArray, feature: Any) -> AbstractColumn:
    """The column of at least one row that holds `cells`. Local.

    Args:
        name: For messages.
        cells: As in the table.
        feature: What `datasets` knows of it; tells an image from a struct. None for numbers.

    Raises:
        DataError: for values that are missing, rows of unequal length, and types that are not
            numbers.
    """
    if _is_image(feature):
        return EncodedColumn(name, cells, lambda cell: _decode_image(feature, cell))
    if pa.types.is_boolean(cells.type):
        return EncodedColumn(name, cells, np.asarray)
    views: list[np.ndarray] = []
    start = 0
    for chunk in cells.chunks:
        if not len(chunk):
            continue
        try:
            view = _dense(chunk)
            if views and view.shape[1:] != views[0].shape[1:]:
                raise ValueError(f"{view.shape[1:]} from here on, {views[0].shape[1:]} before")
        except ValueError as error:
            raise DataError(
                f"column {name!r} is not an array of numbers with one shape in all rows: "
                f"{error} (in the chunk of rows {start} to {start + len(chunk) - 1})"
            ) from error
        views.append(view)
        start += len(chunk)
    if not views[0][0].size:
        raise DataError(f"column {name!r} is empty: each row has shape {views[0].shape[1:]}")
    return ViewColumn(tuple(views))


def _dense(array: pa.Array) -> np.ndarray:
    """A view of `array` with one axis for each level of lists; ValueError where there is none."""
    if isinstance(array, pa.ExtensionArray):  # Array2D and its like: lists inside
        array = array.storage
    kind = array.type
    if array.null_count:
        raise ValueError(f"{array.null_count} values are missing")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = np.from_dlpack(array.offsets)
        lengths = np.diff(offsets)
        width = int(lengths[0])
        if (lengths != width).any():
            raise ValueError(f"lists of {lengths.min()} to {lengths.max()} entries")
        inner = array.values.slice(int(offsets[0]), len(array) * width)
    elif pa.types.is_fixed_size_list(kind):
        width = kind.list_size
        inner = array.values.slice(array.offset * width, len(array) * width)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return np.from_dlpack(array)  # `to_numpy` would load pandas
    elif pa.types.is_boolean(kind):  # stored as bits
        return array.to_numpy(zero_copy_only=False)
    else:
        raise ValueError(f"its type is {kind}")
    values = _dense(inner)
    return values.reshape(len(array), width, *values.shape[1:])


def _is_image(feature: Any) -> bool:
    if feature is None:
        return False
    import datasets  # loaded already by what made the feature

    return isinstance(feature, datasets.Image)


def _decode_image(feature: Any, cell: dict[str, Any]) -> np.ndarray:
    """Pixels of one stored image: uint8, (height, width) if gray, else (height, width, bands)."""
    import datasets

    image = datasets.Image(mode=feature.mode).decode_example(cell)
    image = image.convert({"1": "L", "P": "RGB"}.get(image.mode, image.mode))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"its pixels are {pixels.dtype} (mode {image.mode}), not uint8")
    return pixels
