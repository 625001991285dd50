"""`nodepint bench checkpoint`: how fast interface data reach the disk and come back.

A checkpoint beside plain parallel h5py (one collective write, no checksum), and beside `numpy.save`
of what rank 0 has gathered. All end with the bytes on the disk (fsync), and read what the system
still holds in memory.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from mpi4py import MPI

from nodepint_mpi.errors import OutputError
from nodepint_mpi.io.checkpoint import load_checkpoint, save_checkpoint
from nodepint_mpi.ranks.agreement import together

N_OWNED = 16
"""Rows of each rank."""
NAME = "interface"


def run_checkpoint(
    control: MPI.Intracomm, *, megabytes: float, repeats: int, folder: Path
) -> dict[str, Any]:
    """Write and read so many megabytes in three ways, in turn. Collective over `control`.

    Every rank writes, and reads, rows of its own.

    Args:
        control: The ranks.
        megabytes: Size of the data on all ranks together, in units of 1e6 bytes.
        repeats: How often each way is taken.
        folder: Where the files go, and are removed again; seen by all ranks.

    Returns:
        Medians by way: `write_s`, `read_s`, and both as `write_mb_s` and `read_mb_s`.

    Raises:
        OutputError: on all ranks, if the folder cannot be written to.
    """
    width = int(megabytes * 1e6 / 8 / (N_OWNED * control.size))
    block = np.random.default_rng(control.rank).standard_normal((N_OWNED, width))
    scratch = None
    with together(control):
        if control.rank == 0:
            try:
                scratch = tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=folder)
            except OSError as error:
                raise OutputError(f"Cannot write to {folder}: {error.strerror}.") from error
    place = Path(control.bcast(scratch.name if scratch is not None else ""))
    ways: dict[str, tuple[Callable[..., None], Callable[..., np.ndarray]]] = {
        "nodepint_mpi": (_save, _load),
        "parallel h5py": (_write_h5py, _read_h5py),
        "numpy.save on rank 0": (_write_numpy, _read_numpy),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    try:
        for _ in range(repeats):
            for name, (write, read) in ways.items():
                write_s, _ = _timed(control, lambda write=write: write(control, place, block))
                read_s, found = _timed(control, lambda read=read: read(control, place, block))
                assert np.array_equal(found, block)  # else what was timed is no checkpoint
                seconds[name].append((write_s, read_s))
    finally:
        control.Barrier()
        if scratch is not None:
            scratch.cleanup()
    medians = {
        name: [statistics.median(column) for column in zip(*pairs, strict=True)]
        for name, pairs in seconds.items()
    }
    total = block.nbytes * control.size / 1e6
    return {
        "n_ranks": control.size,
        "megabytes": total,
        "ways": {
            name: {
                "write_s": write_s,
                "read_s": read_s,
                "write_mb_s": total / write_s,
                "read_mb_s": total / read_s,
            }
            for name, (write_s, read_s) in medians.items()
        },
    }


def format_checkpoint(result: dict[str, Any]) -> str:
    """A line for each way. Local."""
    lines = [
        f"{result['megabytes']:.0f} MB on {result['n_ranks']} ranks",
        f"{'':22} {'write s':>8} {'MB/s':>7} {'read s':>8} {'MB/s':>7}",
    ]
    for name, way in result["ways"].items():
        lines.append(
            f"{name:22} {way['write_s']:8.2f} {way['write_mb_s']:7.0f} "
            f"{way['read_s']:8.2f} {way['read_mb_s']:7.0f}"
        )
    return "\n".join(lines)


def _timed(control: MPI.Intracomm, do: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the last rank is done, and what this rank has got. Collective."""
    control.Barrier()
    began = time.perf_counter()
    found = do()
    return control.allreduce(time.perf_counter() - began, op=MPI.MAX), found


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _save(control: MPI.Intracomm, place: Path, block: np.ndarray) -> None:
    save_checkpoint(
        control, place, step=1, replicated={}, rows={NAME: block},
        row_start=N_OWNED * control.rank, n_rows=N_OWNED * control.size,
        meta={"fingerprint": ""}, keep=1,
    )  # fmt: skip


def _load(control: MPI.Intracomm, place: Path, block: np.ndarray) -> np.ndarray:
    loaded = load_checkpoint(
        control, place, like_at=lambda step: {}, row_start=N_OWNED * control.rank,
        n_owned_rows=len(block), fingerprint=None,
    )  # fmt: skip
    return loaded.rows[NAME]


def _write_h5py(control: MPI.Intracomm, place: Path, block: np.ndarray) -> None:
    path, first = place / "plain.h5", N_OWNED * control.rank
    with h5py.File(path, "w", driver="mpio", comm=control) as file:
        shape = (N_OWNED * control.size, *block.shape[1:])
        rows = file.create_dataset(NAME, shape, dtype=block.dtype)
        with rows.collective:
            rows[first : first + N_OWNED] = block
    if control.rank == 0:
        _flush(path)


def _read_h5py(control: MPI.Intracomm, place: Path, block: np.ndarray) -> np.ndarray:
    del block
    first = N_OWNED * control.rank
    with h5py.File(place / "plain.h5", "r", driver="mpio", comm=control) as file:
        rows = file[NAME]
        assert isinstance(rows, h5py.Dataset)
        with rows.collective:
            return rows[first : first + N_OWNED]


def _write_numpy(control: MPI.Intracomm, place: Path, block: np.ndarray) -> None:
    shape = (control.size, *block.shape)
    whole = np.empty(shape) if control.rank == 0 else None
    control.Gather(block, whole)
    if whole is not None:
        np.save(place / "plain.npy", whole)
        _flush(place / "plain.npy")


def _read_numpy(control: MPI.Intracomm, place: Path, block: np.ndarray) -> np.ndarray:
    whole = np.load(place / "plain.npy") if control.rank == 0 else None
    mine = np.empty_like(block)
    control.Scatter(whole, mine)
    return mine
