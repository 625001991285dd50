"""What is inside a checkpoint file.

    /                 attributes: format, step, fingerprint, n_ranks, n_rows
    /meta             JSON text
    /replicated/...   one dataset for each leaf, named by its path, with its checksum
    /rows/...         arrays over all slices, and the optimizer's over parameters, dealt over the
                      ranks along their first axis
    /row_xxh3/...     a checksum for each row of each of them

Rank 0 lays the file out and stores what all ranks hold alike; then every rank adds its rows
(`io.checkpoint_rows`). Checksums are taken from memory, so they guard the whole way from memory to
the file and back. The seal (`io.seal`) guards all that HDF5 has to understand, and the checksums
themselves.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from jaxtyping import PyTree

from nodepint_mpi.errors import CheckpointError
from nodepint_mpi.io.errno_text import error_text
from nodepint_mpi.io.hdf5 import create_rows, creating
from nodepint_mpi.io.hdf5_check import (
    check_contents,
    declared_dtype,
    find_dataset,
    find_group,
    read_attribute_text,
    read_integer,
    read_json_dataset,
)
from nodepint_mpi.io.leaves import (
    LeafSpec,
    checksum,
    describe_leaves,
    find_wrong_row,
    storable_dtype,
    to_storable,
)
from nodepint_mpi.io.seal import FORMAT

_FILE_BYTES = 64 * 2**10  # HDF5's own bookkeeping, generously: for the file,
_OBJECT_BYTES = 4 * 2**10  # and for each dataset or group
_SUM = np.dtype(np.uint64)
_STEP = re.compile(r"step-(\d{6,})\.h5")


class DamagedError(CheckpointError):
    """The file is not what was written; what is wrong with it, without its name."""


class Head(NamedTuple):
    """What a checkpoint says about itself."""

    step: int
    fingerprint: str
    n_rows: int
    meta: dict[str, Any]
    replicated: dict[str, LeafSpec]
    rows: dict[str, LeafSpec]


class Place(NamedTuple):
    """Where in the file, in bytes from its start, an array over all slices lies and its checksums.

    Both are one piece each, row after row. So are arrays over parameters.
    """

    rows: int
    sums: int


def checkpoint_bytes(replicated: PyTree, rows: PyTree, *, meta_bytes: int = 0) -> int:
    """An upper bound for the size of a checkpoint. Local.

    Args:
        replicated: The tree that all ranks hold alike, or its shapes.
        rows: The arrays over all slices by name, whole, or their shapes.
        meta_bytes: Length of the text that goes with it.
    """
    leaves, blocks = describe_leaves(replicated), describe_leaves(rows)
    return _bound(leaves, blocks, meta_bytes)


def lay_out(
    path: Path,
    leaves: Mapping[str, np.ndarray],
    specs: Mapping[str, LeafSpec],
    *,
    step: int,
    n_rows: int,
    n_ranks: int,
    meta: Mapping[str, Any],
) -> dict[str, Place]:
    """Make the file, with everything but the rows. Local. Raises OutputError.

    Returns:
        Where the rows go. Arrays without values have no place.
    """
    places = {}
    text = np.array(json.dumps(meta).encode("ascii"))
    leaf_specs = {name: LeafSpec(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    n_bytes = _bound(leaf_specs, specs, text.nbytes)
    with creating(path, n_bytes=n_bytes) as file:
        file.attrs.update(format=FORMAT, step=step, n_rows=n_rows, n_ranks=n_ranks)
        file.attrs["fingerprint"] = np.bytes_(str(meta["fingerprint"]).encode())
        file["meta"] = text
        group = file.create_group("replicated")
        for name, leaf in leaves.items():
            dataset = group.create_dataset(name, data=to_storable(leaf))
            dataset.attrs["dtype"] = np.bytes_(leaf.dtype.name.encode())
            dataset.attrs["xxh3"] = np.uint64(checksum(leaf, name))
        group, sums = file.create_group("rows"), file.create_group("row_xxh3")
        for name, spec in specs.items():
            kind = storable_dtype(spec.dtype)
            dataset = create_rows(group, name, shape=spec.shape, dtype=kind)
            dataset.attrs["dtype"] = np.bytes_(spec.dtype.name.encode())
            summed = create_rows(sums, name, shape=spec.shape[:1], dtype=_SUM)
            if spec.n_bytes:
                places[name] = Place(dataset.id.get_offset(), summed.id.get_offset())
    return places


def read_head(path: Path) -> Head:
    """Read what is in a file, without the arrays. Local.

    Raises:
        DamagedError: if anything in it is not as `lay_out` and `io.checkpoint_rows` make it.
    """
    with _reading(path) as file:
        check_contents(file, path)
        head = Head(
            step=read_integer(file, "step"),
            fingerprint=read_attribute_text(file, "fingerprint"),
            n_rows=read_integer(file, "n_rows"),
            meta=read_json_dataset(file, "meta"),
            replicated=_specs(find_group(file, "replicated")),
            rows=_specs(find_group(file, "rows")),
        )
        if head.meta.get("fingerprint") != head.fingerprint:
            raise DamagedError("its two fingerprints differ")
        if not isinstance(head.meta.get("config", ""), str):
            raise DamagedError("the config in its metadata is not text")
        named = _STEP.match(path.name)
        if named is not None and int(named[1]) != head.step:
            raise DamagedError(f"it is named {path.name} and holds step {head.step}")
        for name, spec in head.rows.items():
            sums = find_dataset(file, f"row_xxh3/{name}")
            if not spec.shape or sums.shape != spec.shape[:1]:
                raise DamagedError(f"rows/{name} does not have a checksum for each of its rows")
            if sums.dtype != _SUM:
                raise DamagedError(f"row_xxh3/{name} is {sums.dtype}, expected {_SUM}")
        return head


def read_leaves(path: Path, specs: Mapping[str, LeafSpec]) -> dict[str, np.ndarray]:
    """Read what all ranks hold alike. Local. Raises DamagedError."""
    leaves = {}
    with _reading(path) as file:
        for name, spec in specs.items():
            dataset = file["replicated"][name]
            leaf = np.asarray(dataset[()]).view(spec.dtype)
            if checksum(leaf, name) != read_integer(dataset, "xxh3"):
                raise DamagedError(f"replicated/{name} does not match its checksum")
            leaves[name] = leaf
    return leaves


def read_whole_rows(path: Path, specs: Mapping[str, LeafSpec]) -> dict[str, np.ndarray]:
    """Read arrays that were dealt, whole. Local. Raises DamagedError."""
    blocks = {}
    with _reading(path) as file:
        for name, spec in specs.items():
            block = np.asarray(file["rows"][name][()]).view(spec.dtype)
            damage = find_wrong_row(name, block, file["row_xxh3"][name][()], 0)
            if damage:
                raise DamagedError(damage)
            blocks[name] = block
    return blocks


@contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    """Open a file on this rank alone; whatever does not fit its layout is damage."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except DamagedError:
        raise
    except (
        OSError, KeyError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise DamagedError(error_text(error)) from error


def _specs(group: h5py.Group) -> dict[str, LeafSpec]:
    """Names, shapes and types of the datasets in a group."""
    specs = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            specs[name] = LeafSpec(item.shape, declared_dtype(item, name))

    group.visititems(add)
    return specs


def _bound(leaves: Mapping[str, LeafSpec], rows: Mapping[str, LeafSpec], meta_bytes: int) -> int:
    """An upper bound for the size of the file."""
    n_bytes = sum(spec.n_bytes for spec in [*leaves.values(), *rows.values()])
    n_bytes += sum(spec.shape[0] * _SUM.itemsize for spec in rows.values())
    n_objects = sum(2 + name.count("/") for name in [*leaves, *rows, *rows])
    return n_bytes + meta_bytes + _FILE_BYTES + n_objects * _OBJECT_BYTES
