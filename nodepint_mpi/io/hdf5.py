"""HDF5 files that all ranks read and write together, without the ways in which they hang.

Three things hang a job with an open parallel file: an exception on one rank, a high-level
collective write in which one rank's part is empty, and metadata written by one rank only. Hence
the division of labour here: rank 0 alone makes the file, with all its datasets and their space on
disk (`creating`); then all ranks open it (`open_parallel`) and move array rows, nothing else
(`write_rows`, `read_rows`).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from nodepint_mpi.errors import CheckpointError, NodepintError, OutputError
from nodepint_mpi.io.errno_text import error_text
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.ranks.guard import abort

if TYPE_CHECKING:  # trained models also load without MPI
    from mpi4py import MPI

LIBVER = ("v110", "v110")
"""File format whose metadata HDF5 checksums itself; read by HDF5 1.10 and later."""

USERBLOCK_BYTES = 512
"""Free space for the seal at the head of the file (see `io.seal`)."""

_PIECE_BYTES = 256 * 2**20  # per rank and call; MPI counts are 32 bit
_LARGE_BYTES = 2**20  # on the average rank


@contextmanager
def creating(path: Path, *, n_bytes: int) -> Iterator[h5py.File]:
    """Make a file of at most `n_bytes`, its disk space reserved before anything is written. Local.

    Reserving first means that a full disk shows as an error here and not in a collective write.
    The file shrinks to what it needs when it is closed.

    Raises:
        OutputError: the folder is missing, not writable or full. No file is left behind.
    """
    _check_free_space(path, n_bytes)
    try:
        with h5py.File(path, "w", libver=LIBVER, userblock_size=USERBLOCK_BYTES, locking=False):
            pass
        _reserve(path, n_bytes)
        with h5py.File(path, "r+", libver=LIBVER, locking=False) as file:
            yield file
    except OSError as error:
        _remove(path)
        raise OutputError(f"cannot write {path}: {error_text(error)}") from error
    except BaseException:
        _remove(path)
        raise


def create_rows(
    group: h5py.Group, name: str, *, shape: tuple[int, ...], dtype: np.dtype
) -> h5py.Dataset:
    """Create a dataset that ranks fill by rows later, its place in the file fixed now. Local."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    parent, _, leaf = name.rpartition("/")
    where = group.require_group(parent) if parent else group
    kind = h5py.h5t.py_create(dtype, logical=True)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(where.id, leaf.encode(), kind, space, dcpl=plist)
    return where[leaf]


@contextmanager
def open_parallel(
    control: "MPI.Intracomm", path: Path, mode: Literal["r", "r+"]
) -> Iterator[h5py.File]:
    """Open an existing file on all ranks for the rows of its datasets.

    Collective over `control`. Inside, all ranks must call `write_rows` and `read_rows` in the
    same order. An exception inside ends the whole job when there is more than one rank, because
    the others could wait for ever: check beforehand, and carry what you find out of the block.

    Raises:
        CheckpointError, OutputError: for reading and for writing; on all ranks, if a rank cannot
            reach the file; on a single rank, also if the system fails later.
    """
    with together(control):
        _check_access(path, mode)
    try:
        file = h5py.File(path, mode, driver="mpio", comm=control, libver=LIBVER)
        try:
            yield file
        except BaseException as error:
            _abort_if_shared(control, path, error)  # before closing, which is collective
            raise
        finally:
            file.close()
    except OSError as error:
        _abort_if_shared(control, path, error)
        raise _access_error(path, mode, error) from error


def write_rows(
    control: "MPI.Intracomm", dataset: h5py.Dataset, block: np.ndarray, *, row_start: int
) -> None:
    """Write this rank's rows of a dataset.

    Collective over `control`, inside `open_parallel`; ranks may own no rows.

    Args:
        control: The communicator the file was opened on.
        dataset: Global array, split along its first axis.
        block: The rows `row_start : row_start + len(block)`, of the dataset's type.
        row_start: Index of the first row in the global array.
    """
    if block.dtype != dataset.dtype or block.shape[1:] != dataset.shape[1:]:
        raise ValueError(
            f"{dataset.name} holds rows {dataset.shape[1:]} of {dataset.dtype}, "
            f"given {block.shape[1:]} of {block.dtype}"
        )
    block = np.asarray(block, order="C")
    plist = _transfer(control, dataset)
    for low, high in _agree_pieces(control, dataset, len(block)):
        memory, stored = _select(dataset, row_start + low, high - low)
        dataset.id.write(memory, stored, block[low:high], dxpl=plist)


def read_rows(
    control: "MPI.Intracomm",
    dataset: h5py.Dataset,
    *,
    row_start: int,
    n_owned: int,
) -> np.ndarray:
    """Read the rows `row_start : row_start + n_owned` of a dataset.

    Collective over `control`, inside `open_parallel`; ranks may ask for no rows.
    """
    block = np.empty((n_owned, *dataset.shape[1:]), dataset.dtype)
    plist = _transfer(control, dataset)
    for low, high in _agree_pieces(control, dataset, n_owned):
        memory, stored = _select(dataset, row_start + low, high - low)
        dataset.id.read(memory, stored, block[low:high], dxpl=plist)
    return block


def _agree_pieces(
    control: "MPI.Intracomm", dataset: h5py.Dataset, n_owned: int
) -> list[tuple[int, int]]:
    """Cut this rank's rows into ranges of so many bytes as go into one call, or one row.

    Collective over `control`: all ranks get as many ranges as the one with most rows, so that
    each range can be one collective call; those that are too many are empty.
    """
    row_bytes = int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize
    most = max(1, _PIECE_BYTES // max(1, row_bytes))
    from mpi4py import MPI

    n_pieces = control.allreduce(-(-n_owned // most), op=MPI.MAX)
    cuts = [min(n_owned, piece * most) for piece in range(n_pieces + 1)]
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def _abort_if_shared(control: "MPI.Intracomm", path: Path, error: BaseException) -> None:
    if control.size > 1:
        abort(f"failure inside the open parallel file {path}: {error_text(error)}")


def _transfer(control: "MPI.Intracomm", dataset: h5py.Dataset) -> Any:
    """How rows travel; the same on all ranks.

    Large pieces go straight from each rank to the file. Collective calls first exchange them, which
    is for many small ones: of 1 GB it made 0.40 s of work instead of 0.04 on each of 4 ranks for
    writing and 0.39 instead of 0.14 for reading.
    """
    plist = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    large = control.size == 1 or dataset.nbytes >= _LARGE_BYTES * control.size
    plist.set_dxpl_mpio(h5py.h5fd.MPIO_INDEPENDENT if large else h5py.h5fd.MPIO_COLLECTIVE)
    return plist


def _select(dataset: h5py.Dataset, start: int, count: int) -> tuple[Any, Any]:
    """Memory and file selections of some rows; both are empty where there is nothing to move."""
    shape = (count, *dataset.shape[1:])
    memory, stored = h5py.h5s.create_simple(shape), dataset.id.get_space()
    if 0 in shape:
        memory.select_none()
        stored.select_none()
    else:
        stored.select_hyperslab((start, *(0 for _ in shape[1:])), shape)
    return memory, stored


def _check_free_space(path: Path, n_bytes: int) -> None:
    """Say how much is missing; whether there really is enough is settled by `_reserve`."""
    try:
        disk = os.statvfs(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error_text(error)}") from error
    free = disk.f_bavail * disk.f_frsize
    if n_bytes > free:
        raise OutputError(
            f"cannot write {path}: it needs {n_bytes / 2**20:.1f} MiB and {free / 2**20:.1f} MiB "
            f"are free; free some space or choose another folder"
        )


def _reserve(path: Path, n_bytes: int) -> None:
    """Make the system set the space aside, which also meets quotas and limits on file size."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    handle = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(handle, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def _check_access(path: Path, mode: str) -> None:
    """Open as an ordinary file: MPI does not agree on a file that one rank cannot open."""
    try:
        os.close(os.open(path, os.O_RDONLY if mode == "r" else os.O_RDWR))
    except OSError as error:
        raise _access_error(path, mode, error) from error


def _access_error(path: Path, mode: str, error: OSError) -> NodepintError:
    kind, verb = (CheckpointError, "read") if mode == "r" else (OutputError, "write")
    return kind(f"cannot {verb} {path}: {error_text(error)}")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the reason it could not be written is the one to tell
