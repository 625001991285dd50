"""The rows of a checkpoint: arrays over all slices, of which every rank holds a part."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mpi4py import MPI

from nodepint_mpi.errors import LayoutError
from nodepint_mpi.io.hdf5 import agree_pieces, open_parallel, read_rows, write_rows
from nodepint_mpi.io.leaves import LeafSpec, crc32, to_storable

_CHECK_BYTES = 16 * 2**20  # memory for reading back


def describe_rows(
    control: MPI.Intracomm, rows: Mapping[str, np.ndarray], *, row_start: int, n_rows: int
) -> dict[str, LeafSpec]:
    """Shapes of the whole arrays of which every rank holds some rows.

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
    control: MPI.Intracomm, path: Path, rows: Mapping[str, np.ndarray], *, row_start: int
) -> None:
    """Add every rank's rows to a file that has been laid out. Collective over `control`."""
    with open_parallel(control, path, "r+") as file:
        for name, block in rows.items():
            crcs = _row_crcs(block)
            write_rows(control, file["rows"][name], to_storable(block), row_start=row_start)
            write_rows(control, file["row_crc32"][name], crcs, row_start=row_start)


def read_all_rows(
    control: MPI.Intracomm,
    path: Path,
    specs: Mapping[str, LeafSpec],
    *,
    row_start: int,
    n_owned: int,
) -> tuple[dict[str, np.ndarray], str]:
    """Read the rows a rank owns.

    Collective over `control`.

    Returns:
        The blocks by name; and nothing, or what is wrong with this rank's.
    """
    rows, damage = {}, ""
    with open_parallel(control, path, "r") as file:
        for name, spec in specs.items():
            stored, sums = file["rows"][name], file["row_crc32"][name]
            block = read_rows(control, stored, row_start=row_start, n_owned=n_owned)
            crcs = read_rows(control, sums, row_start=row_start, n_owned=n_owned)
            block = block.view(spec.dtype)
            damage = damage or _find_damage(name, block, crcs, row_start)
            rows[name] = block
    return rows, damage


def check_all_rows(
    control: MPI.Intracomm,
    path: Path,
    specs: Mapping[str, LeafSpec],
    *,
    row_start: int,
    n_owned: int,
) -> str:
    """Read the rows a rank owns a few at a time, for their checksums only.

    Collective over `control`. Returns nothing, or what is wrong with this rank's.
    """
    damage = ""
    with open_parallel(control, path, "r") as file:
        for name in specs:
            dataset, sums = file["rows"][name], file["row_crc32"][name]
            ranges = agree_pieces(control, dataset, n_owned, _CHECK_BYTES)
            most = max((high - low for low, high in ranges), default=0)
            buffer = np.empty((most, *dataset.shape[1:]), dataset.dtype)
            for low, high in ranges:
                start, count = row_start + low, high - low
                block = read_rows(control, dataset, row_start=start, n_owned=count, out=buffer)
                crcs = read_rows(control, sums, row_start=start, n_owned=count)
                damage = damage or _find_damage(name, block, crcs, start)
    return damage


def _find_damage(name: str, block: np.ndarray, crcs: np.ndarray, row_start: int) -> str:
    wrong = np.flatnonzero(crcs != _row_crcs(block))
    return (
        f"rows/{name}: row {row_start + wrong[0]} does not match its CRC-32" if wrong.size else ""
    )


def _row_crcs(block: np.ndarray) -> np.ndarray:
    return np.array([crc32(block[n : n + 1]) for n in range(len(block))], np.uint32)
