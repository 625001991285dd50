"""The file of a reduced model, and how it is read: by h5py alone, on a machine without MPI.

    /             attributes: rank, step, fingerprint of the run
    /meta         JSON text: all else that is not an array, such as the suggested integrator
    /config       the run's resolved config, TOML text
    /basis        (rank, *sample), orthonormal rows
    /energies     (rank,), squared singular values of the snapshots
    /model/...    one dataset for each array of encoder, processor and decoder, named by its path

At the head of the file, in the space that HDF5 leaves free, stand the format and the SHA-256 of
all that follows; no damaged file is handed to HDF5. Written by `io.rom_save`.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from nodepint_mpi.errors import ReducedModelError

PARTS = "encoder", "processor", "decoder"
FORMAT = 1
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
    leaves = {}

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            leaves[name] = np.asarray(item[()]).view(np.dtype(item.attrs["dtype"]))

    try:
        with h5py.File(path, "r", locking=False) as file:
            file["model"].visititems(take)
            meta = json.loads(file["meta"][()]) | {"config": file["config"][()].decode()}
            return RomFile(file["basis"][()], file["energies"][()], leaves, meta)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ReducedModelError(f"Cannot read the reduced model {path}: {error}.") from error


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
            f"{path} is no reduced model; `nodepint rom export RUN_DIR --out FILE` makes one."
        )
    match = _HEAD.fullmatch(head)
    if match is not None and int(match[1]) != FORMAT:
        raise ReducedModelError(
            f"{path} has format {int(match[1])}, and this version of nodepint_mpi reads format "
            f"{FORMAT}: take the version it was written by."
        )
    if head != make_head(content):
        raise ReducedModelError(
            f"{path} is damaged: its {len(whole)} bytes are not those that were written. Copy it "
            "again, or export it anew."
        )
