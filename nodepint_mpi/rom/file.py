"""The file of a reduced model, and how it is read: by h5py alone, on a machine without MPI.

    /             attributes: rank, step, fingerprint of the run
    /meta         JSON text: all else that is not an array, such as the suggested integrator
    /config       the run's resolved config, TOML text
    /basis        (rank, *sample), orthonormal rows
    /energies     (rank,), squared singular values of the snapshots
    /model/...    one dataset for each array of encoder, processor and decoder, named by its path

At the head of the file, in the space that HDF5 leaves free, stand the format and the SHA-256 of
all that follows; no damaged file is handed to HDF5. Written by `rom.save`.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from nodepint_mpi.errors import ReducedModelError
from nodepint_mpi.io.hdf5_check import (
    check_contents,
    declared_dtype,
    find_dataset,
    find_group,
    read_attribute_text,
    read_integer,
    read_json_dataset,
    read_text_dataset,
)
from nodepint_mpi.io.leaves import list_nonfinite

PARTS = "encoder", "processor", "decoder"
FORMAT = 2
HEAD_BYTES = 512

_MAGIC = b"nodepint reduced model\n"
_HEAD = re.compile(_MAGIC + rb"format (\d+)\nbytes (\d+)\nsha256 ([0-9a-f]{64})\n\0*")


class RomFile(NamedTuple):
    """What is in the file. `meta` holds the run's resolved config as TOML text in "config"."""

    basis: np.ndarray
    energies: np.ndarray
    leaves: dict[str, np.ndarray]
    meta: dict[str, Any]


def read_rom(path: Path) -> RomFile:
    """Read the file of a reduced model. Local.

    Raises:
        ReducedModelError: if it cannot be read, is none, or is damaged.
    """
    _check_seal(path)
    try:
        with h5py.File(path, "r", locking=False) as file:
            check_contents(file, path)
            found = RomFile(
                _read_array(file, "basis"),
                _read_array(file, "energies"),
                _read_leaves(find_group(file, "model")),
                read_json_dataset(file, "meta") | {"config": read_text_dataset(file, "config")},
            )
            _check_meta(found.meta)
            if read_integer(file, "rank") != len(found.basis):
                raise ValueError("its attribute `rank` is not the number of directions")
            if read_integer(file, "step") != found.meta["step"]:
                raise ValueError("its attribute `step` is not the step in its metadata")
            if read_attribute_text(file, "fingerprint") != found.meta["fingerprint"]:
                raise ValueError("its two fingerprints differ")
    except (
        OSError, KeyError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ReducedModelError(f"Cannot read the reduced model {path}: {reason}.") from error
    _check_arrays(path, found)
    return found


def _read_array(file: h5py.File, name: str) -> np.ndarray:
    dataset = find_dataset(file, name)
    if dataset.dtype.kind != "f" or dataset.dtype.itemsize > 8 or dataset.ndim == 0:
        raise ValueError(f"{name} is {dataset.dtype} of shape {dataset.shape}, expected floats")
    return np.asarray(dataset[()])


def _read_leaves(group: h5py.Group) -> dict[str, np.ndarray]:
    leaves = {}

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            leaves[name] = np.asarray(item[()]).view(declared_dtype(item, name))

    group.visititems(take)
    return leaves


def _check_meta(meta: dict[str, Any]) -> None:
    """The fields of the metadata, each of its type."""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**31

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
        return isinstance(value, list) and all(map(holds, value))

    def is_texts(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())

    expected = {
        "step": is_count,
        "output_size": is_count,
        "input_shape": lambda value: is_list(value, is_count),
        "times": lambda value: is_list(value, is_number),
        "energy": is_number,
        "fingerprint": lambda value: isinstance(value, str),
        "versions": is_texts,
    }
    for key, fits in expected.items():
        if not fits(meta.get(key)):
            text = json.dumps(meta.get(key))[:40]
            raise ValueError(f"its metadata has {key} = {text}, which is not what is written there")


def _check_arrays(path: Path, found: RomFile) -> None:
    """A basis of finite directions with their energies, and finite parameters."""
    basis, energies = found.basis, found.energies
    if basis.ndim < 2 or not basis.size or energies.shape != basis.shape[:1]:
        raise ReducedModelError(
            f"{path} has a basis of shape {basis.shape} and energies of shape {energies.shape}; "
            "expected (rank, *sample) and (rank,). Export it again."
        )
    wrong = list_nonfinite({"basis": basis, "energies": energies} | found.leaves)
    if wrong:
        raise ReducedModelError(f"{path} holds NaN or infinity in {wrong}. Export it again.")


def make_head(content: bytes) -> bytes:
    """The head of a file whose other bytes are `content`. Local."""
    digest = hashlib.sha256(content).hexdigest()
    text = f"format {FORMAT}\nbytes {HEAD_BYTES + len(content)}\nsha256 {digest}\n"
    return (_MAGIC + text.encode()).ljust(HEAD_BYTES, b"\0")


def is_rom(path: Path) -> bool:
    """Whether a file begins like that of a reduced model. Local. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _check_seal(path: Path) -> None:
    try:
        whole = path.read_bytes()
    except OSError as error:
        raise ReducedModelError(
            f"Cannot read the reduced model {path}: {error.strerror}."
        ) from error
    head, content = whole[:HEAD_BYTES], whole[HEAD_BYTES:]
    if not head.startswith(_MAGIC):
        raise ReducedModelError(
            f"{path} is not a reduced model; `nodepint rom export RUN_DIR --out FILE` makes one."
        )
    match = _HEAD.fullmatch(head)
    if match is not None and int(match[1]) != FORMAT:
        raise ReducedModelError(
            f"{path} has format {int(match[1])}, and this version of nodepint_mpi reads format "
            f"{FORMAT}: export it again from its run, or take the version it was written by."
        )
    if head != make_head(content):
        raise ReducedModelError(
            f"{path} is damaged: its {len(whole)} bytes are not those that were written. Copy it "
            "again, or export it again."
        )
