"""The rows of a checkpoint: arrays of which every rank holds a part, each dealt in its own way."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from mpi4py import MPI

from nodepint_mpi.errors import LayoutError
from nodepint_mpi.io.checkpoint_file import Place
from nodepint_mpi.io.hdf5 import open_parallel, read_rows, write_rows
from nodepint_mpi.io.leaves import LeafSpec, find_wrong_row, to_storable, wrong_row

_BUFFER_BYTES = 2**19  # fits in a core's cache, where the checksum then finds it


class Rows(NamedTuple):
    """A rank's rows of an array of which all ranks together have `n_rows`, none of them twice.

    They are consecutive, possibly none; `start` is the global index of the first.
    """

    block: np.ndarray
    start: int
    n_rows: int


def describe_dealt(control: MPI.Intracomm, rows: Mapping[str, Rows]) -> dict[str, LeafSpec]:
    """Shapes of whole arrays, by name, of which those with equally many rows are dealt alike.

    Collective over `control`.

    Raises:
        LayoutError: on all ranks, if the ranks' rows of an array, in whatever order, do not make
            the whole of it.
    """
    named = control.allgather([(name, one.n_rows) for name, one in rows.items()])
    odd = next((rank for rank, names in enumerate(named) if names != named[0]), None)
    if odd is not None:
        raise LayoutError(f"rank {odd} holds rows of other arrays than rank 0")
    totals = sorted({one.n_rows for one in rows.values()} or {0})
    specs: dict[str, LeafSpec] = {}
    for total in totals:
        alike = {name: one for name, one in rows.items() if one.n_rows == total}
        start = next((one.start for one in alike.values()), 0)
        blocks = {name: one.block for name, one in alike.items()}
        specs |= describe_rows(control, blocks, row_start=start, n_rows=total)
    return {name: specs[name] for name in rows}


def describe_rows(
    control: MPI.Intracomm, rows: Mapping[str, np.ndarray], *, row_start: int, n_rows: int
) -> dict[str, LeafSpec]:
    """Shapes of the whole arrays of which every rank holds some rows, all dealt alike.

    Collective over `control`.

    Raises:
        LayoutError: on all ranks, if the ranks' rows, in whatever order, do not make `n_rows`.
    """
    own = {name: (block.shape, block.dtype) for name, block in rows.items()}
    held = [(rank, *part) for rank, part in enumerate(control.allgather((row_start, n_rows, own)))]
    first = {name: (shape[1:], dtype) for name, (shape, dtype) in held[0][-1].items()}
    end = 0
    for rank, start, total, shapes in sorted(held, key=_first_and_count):
        kinds = {name: (shape[1:], dtype) for name, (shape, dtype) in shapes.items()}
        counts = {shape[0] if shape else -1 for shape, _ in shapes.values()}
        if total != n_rows or list(kinds) != list(first):
            raise LayoutError(f"rank {rank} holds rows of other arrays than rank 0")
        if kinds != first:
            raise LayoutError(f"rank {rank} holds rows of another shape or type than rank 0")
        if len(counts) > 1 or -1 in counts:
            raise LayoutError(f"rank {rank} holds arrays with different numbers of rows")
        if counts and start != end:
            raise LayoutError(f"the rows of rank {rank} start at {start}, expected {end}")
        end += sum(counts)
    if first and end != n_rows:
        raise LayoutError(f"the ranks hold {end} rows, expected {n_rows}")
    return {name: LeafSpec((n_rows, *shape), dtype) for name, (shape, dtype) in first.items()}


def _first_and_count(part) -> tuple[int, int]:
    """Where a rank's rows belong: empty ones before those that begin at the same place."""
    _, start, _, shapes = part
    return start, max((shape[0] for shape, _ in shapes.values() if shape), default=0)


def write_all_rows(
    control: MPI.Intracomm,
    path: Path,
    rows: Mapping[str, Rows],
    sums: Mapping[str, np.ndarray],
) -> None:
    """Add every rank's rows, and their checksums, to a file that has been laid out.

    Collective over `control`.
    """
    with open_parallel(control, path, "r+") as file:
        for name, (block, start, _) in rows.items():
            write_rows(control, file["rows"][name], to_storable(block), row_start=start)
            write_rows(control, file["row_xxh3"][name], sums[name], row_start=start)


def read_back(
    path: Path,
    places: Mapping[str, Place],
    specs: Mapping[str, LeafSpec],
    sums: Mapping[str, np.ndarray],
    rows: Mapping[str, Rows],
) -> str:
    """Read this rank's rows and look whether they match their checksums. Local. Raises OSError.

    Past HDF5 and MPI, since all that counts is which bytes are in the file.

    Returns:
        Nothing, or what is wrong.
    """
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with io.BufferedReader(io.FileIO(path), _BUFFER_BYTES) as file:
        for name, place in places.items():
            row_start, row_bytes = rows[name].start, specs[name].n_bytes // specs[name].shape[0]
            file.seek(place.rows + row_start * row_bytes)
            for row, expected in enumerate(sums[name].tolist(), start=row_start):
                if _sum_next(file, name, row_bytes, buffer) != expected:
                    return wrong_row(name, row)
            file.seek(place.sums + row_start * sums[name].itemsize)
            if file.read(sums[name].nbytes) != sums[name].tobytes():
                return f"row_xxh3/{name} is not what was written"
    return ""


def read_all_rows(
    control: MPI.Intracomm, path: Path, specs: Mapping[str, LeafSpec], owned: Mapping[str, range]
) -> tuple[dict[str, np.ndarray], str]:
    """Read the rows a rank owns of each of the arrays of these shapes.

    Collective over `control`.

    Returns:
        The blocks by name; and nothing, or what is wrong with this rank's.
    """
    rows, damage = {}, ""
    with open_parallel(control, path, "r") as file:
        for name, spec in specs.items():
            stored, summed = file["rows"][name], file["row_xxh3"][name]
            start, n_owned = owned[name].start, len(owned[name])
            block = read_rows(control, stored, row_start=start, n_owned=n_owned)
            sums = read_rows(control, summed, row_start=start, n_owned=n_owned)
            block = block.view(spec.dtype)
            damage = damage or find_wrong_row(name, block, sums, start)
            rows[name] = block
    return rows, damage


def _sum_next(file: io.BufferedIOBase, name: str, n_bytes: int, buffer: memoryview) -> int:
    """Checksum of a row of an array: the next bytes of a file."""
    digest = xxhash.xxh3_64(name.encode() + b"\0")
    while n_bytes:
        n_read = file.readinto(buffer[:n_bytes])
        if not n_read:
            raise OSError("it is too short")
        digest.update(buffer[:n_read])
        n_bytes -= n_read
    return digest.intdigest()
