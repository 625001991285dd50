"""Prepared datasets as memory-mapped columns, read by global row index.

All ranks map the same Arrow files; a row is copied only when it is taken, in the type it was
stored in (the array formats of Hugging Face `datasets` would turn float64 into float32 and uint8
into int32). Which rows make a mini-batch is a pure function of seed and step, so a run does not
depend on the number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from mpi4py import MPI

from nodepint_mpi.data.columns import AbstractColumn, ViewColumn, open_column, open_series
from nodepint_mpi.data.sources import load, unknown
from nodepint_mpi.errors import DataError


class Split:
    """Some columns of one split of a dataset, memory-mapped.

    Local. `n_rows` is the number of rows, `columns` the column objects by name; a `ViewColumn`
    gives its chunks as read-only arrays in `views`, without a copy. A part of a split has some of
    its rows, numbered anew: `rows` are their numbers in the `whole`, None where it has them all.
    """

    def __init__(
        self,
        n_rows: int,
        columns: Mapping[str, AbstractColumn],
        rows: np.ndarray | None = None,
    ):
        self.n_rows = n_rows if rows is None else len(rows)
        self.columns = dict(columns)
        self.rows = rows
        self.whole = self if rows is None else Split(n_rows, columns)

    def part(self, rows: np.ndarray) -> "Split":
        """Some rows of a whole split, by number. Local."""
        return Split(self.n_rows, self.columns, rows)

    def number(self, row: int | np.integer) -> int:
        """What a row's number is in the whole split. Local."""
        return int(row) if self.rows is None else int(self.rows[row])

    def column(self, name: str) -> AbstractColumn:
        """The opened column `name`, with the `shape` and `dtype` of one row. Local.

        Raises:
            DataError: if it is not one of the columns this split was opened with.
        """
        if name not in self.columns:
            raise DataError(unknown("column", name, self.columns))
        return self.columns[name]

    def take(self, name: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Copy some rows of one column. Local.

        Args:
            name: Column.
            indices: Global row numbers, each in [0, n_rows), in any order, repeats allowed.

        Returns:
            Array of shape (len(indices), *shape of a row), in the stored type.

        Raises:
            DataError: for an unknown column or an index that is no row; negative ones are none.
        """
        column = self.column(name)
        index = np.asarray(indices)
        if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
            raise DataError(
                f"row indices must be a list of integers, given {index.dtype} of shape "
                f"{index.shape}"
            )
        if index.size and not (0 <= index.min() and index.max() < self.n_rows):
            bad = index[(index < 0) | (index >= self.n_rows)][0]
            raise DataError(f"there is no row {bad}: rows are numbered 0 to {self.n_rows - 1}")
        index = index.astype(np.int64)
        return column.take(index if self.rows is None else self.rows[index])


def open_split(
    source: str | Path,
    split: str,
    columns: Sequence[str],
    *,
    series: Sequence[str] = (),
    verify: bool = False,
) -> Split:
    """Open some columns of one split of a prepared dataset, or of one on the hub.

    Local. Nothing but the offsets of nested columns is read; rows are read when taken.

    Args:
        source: One of: the name of a dataset made by `nodepint data prepare NAME`; its folder
            (`data/NAME` or `data/NAME/prepared`), or any folder written by `save_to_disk`; a
            folder in hub layout (`DIR/data/train-00000-of-00001.parquet`); `hub:OWNER/NAME` for
            a dataset on the Hugging Face hub (set HF_HUB_OFFLINE=1 where there is no network,
            or the hub's client tries for half a minute).
        split: Name of the split, as a rule `train` or `test`.
        columns: Names of the columns to open.
        series: Those of them whose rows may be lists of different lengths.
        verify: Compare the files with the checksums noted when they were prepared (files of up
            to 256 MiB; sizes are compared always).

    Raises:
        DataError: if the data are missing (with the command that makes them), damaged, empty or
            ragged, or if the split or a column is not there (with what is there).
    """
    splits = load(source, verify=verify)
    if split not in splits:
        raise DataError(unknown("split", split, splits) + f" in {source}")
    dataset = splits[split]
    if dataset.num_rows == 0:
        raise DataError(f"split {split!r} of {source} has no rows")
    for name in columns:
        if name not in dataset.column_names:
            where = f" in split {split!r} of {source}"
            raise DataError(unknown("column", name, dataset.column_names) + where)
    if dataset._indices is not None:  # a selection: its rows are not those of the Arrow table
        dataset = dataset.flatten_indices()
    try:
        opened = {
            name: (open_series if name in series else open_column)(
                name, dataset.data.column(name), dataset.features[name]
            )
            for name in columns
        }
    except DataError as error:
        raise DataError(f"{error} (split {split!r} of {source})") from error
    return Split(dataset.num_rows, opened)


def open_split_together(
    control: MPI.Comm,
    source: str | Path,
    split: str,
    columns: Sequence[str],
    series: Sequence[str] = (),
) -> Split:
    """`open_split` on all ranks, with rank 0 first.

    Collective over `control`; every rank must pass the same arguments. Rank 0 verifies the
    checksums, and downloads or converts what comes from the hub; the others then map the same
    files, which must therefore be on a file system that all ranks see.

    Returns:
        The split, on each rank.

    Raises:
        DataError: on all ranks, if any rank could not open it, in the words of the first one
            that failed; for a rank other than 0, its number comes with them.
    """
    opened: Split | None = None
    for first in (True, False):
        cause = failure = None
        if (control.rank == 0) == first:
            try:
                opened = open_split(source, split, columns, series=series, verify=first)
            except Exception as error:  # told to all ranks below, where it is raised
                cause = error
                kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
                failure = f"{kind}{error}" + ("" if first else f" (on rank {control.rank})")
        failures = [text for text in control.allgather(failure) if text is not None]
        if failures:
            raise DataError(failures[0]) from cause
    assert opened is not None  # each rank had its turn
    return opened


def check_finite(split: Split, columns: Iterable[str]) -> None:
    """Make sure that float columns hold finite numbers only; others are passed over.

    Local, with the same outcome on all ranks that map the same files. Reads the columns once,
    chunk by chunk, at about the speed of memory.

    Raises:
        DataError: naming the first row and column with a NaN or an infinity.
    """
    for name in columns:
        column = split.column(name)
        if isinstance(column, ViewColumn):
            column.check_finite(name)


def batch_indices(seed: int, step: int, batch_size: int, n_rows: int) -> np.ndarray:
    """Global row numbers of the mini-batch of one optimizer step.

    Local; a pure function of its arguments, the same on all ranks and in all versions of NumPy.
    Epoch e is a permutation of all rows drawn from Philox with the key (seed, e), cut into whole
    batches: the `n_rows % batch_size` rows left at the end of an epoch are dropped, others in
    each epoch. A batch of all rows comes in natural order.

    Args:
        seed: Not negative.
        step: Optimizer step, counted from 0.
        batch_size: Rows of one global batch, at most `n_rows`.
        n_rows: Rows in the split.

    Returns:
        Read-only int64 array of `batch_size` different row numbers.

    Raises:
        DataError: for a negative seed or step, or a batch that is empty or larger than the data.
    """
    if not 1 <= batch_size <= n_rows:
        raise DataError(
            f"a batch of {batch_size} rows cannot be drawn from {n_rows}: "
            f"choose a batch size from 1 to {n_rows}"
        )
    if seed < 0 or step < 0:
        raise DataError(f"seed and step must not be negative, given {seed} and {step}")
    if batch_size == n_rows:
        order, start = _natural_order(n_rows), 0
    else:
        epoch, batch = divmod(step, n_rows // batch_size)
        order, start = _epoch_order(seed, epoch, n_rows), batch * batch_size
    return order[start : start + batch_size]


def held_out_rows(seed: int, fraction: float, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are trained on, and which are held out for validation.

    Local; a pure function of its arguments, as `batch_indices`. Drawn as the order of an epoch that
    no run comes to, the last one there could be.

    Args:
        seed: Not negative.
        fraction: Share to hold out, between 0 and 1; what is held out is rounded to whole rows.
        n_rows: Rows in the split.

    Returns:
        Two int64 arrays of row numbers in ascending order.

    Raises:
        DataError: if one of them would be empty.
    """
    n_held = round(fraction * n_rows)
    if not 0 < n_held < n_rows:
        what = "none for validation" if n_held == 0 else "none to train on"
        raise DataError(
            f"`data.valid_fraction = {fraction:g}` of {n_rows} training rows leaves {what}: "
            f"choose a fraction from {1 / n_rows:.3g} to {1 - 1 / n_rows:.3g}, or name a split by "
            "`data.valid_split`"
        )
    order = _epoch_order(seed, 2**64 - 1, n_rows)
    return np.sort(order[n_held:]), np.sort(order[:n_held])


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """All rows in the order of one epoch.

    Sorted raw output, not `Generator.permutation`: NumPy promises to keep the former.
    """
    try:
        source = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    except OverflowError as error:
        raise DataError(f"seed {seed} is too large: choose one below 2**64") from error
    order = np.argsort(source.random_raw(n_rows), kind="stable")
    order.setflags(write=False)
    return order


@lru_cache(maxsize=2)
def _natural_order(n_rows: int) -> np.ndarray:
    """All rows in natural order."""
    order = np.arange(n_rows)
    order.setflags(write=False)
    return order
