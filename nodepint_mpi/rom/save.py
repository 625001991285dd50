"""Writing the file of a reduced model: whole, or not at all. See `rom.file`."""

import json
import os
from pathlib import Path

import numpy as np

from nodepint_mpi.errors import OutputError
from nodepint_mpi.io.checkpoint_folder import flush_file, partial_path, remove_file, sync_folder
from nodepint_mpi.io.errno_text import error_text
from nodepint_mpi.io.hdf5 import USERBLOCK_BYTES, creating
from nodepint_mpi.io.leaves import to_storable
from nodepint_mpi.rom.file import HEAD_BYTES, RomFile, is_rom, make_head

assert HEAD_BYTES == USERBLOCK_BYTES  # what `creating` leaves free

_BOOKKEEPING_BYTES = 64 * 2**10  # HDF5's own, generously: for the file,
_OBJECT_BYTES = 4 * 2**10  # and for each dataset or group


def check_target(path: Path) -> None:
    """Refuse, before the work is done, a file that could not or should not be written. Local.

    Raises:
        OutputError: if there is no such folder, or what is there is no reduced model.
    """
    try:
        if path.exists() and not (path.is_file() and is_rom(path)):
            raise OutputError(f"{path} exists and is not a reduced model: choose another `--out`.")
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error_text(error)}.") from error
    if not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(
            f"Cannot write {path}: there is no folder {path.absolute().parent}, or it is "
            "write-protected."
        )


def save_rom(path: Path, rom: RomFile) -> int:
    """Write the file under a temporary name, seal it, and give it its name. Local.

    Returns:
        Its size in bytes.

    Raises:
        OutputError: if it cannot be written. What was there before then still is.
    """
    partial = partial_path(path)
    meta = {key: value for key, value in rom.meta.items() if key != "config"}
    texts = {"meta": json.dumps(meta), "config": rom.meta["config"]}
    arrays = {"basis": rom.basis, "energies": rom.energies}
    n_bytes = sum(array.nbytes for array in [*arrays.values(), *rom.leaves.values()])
    n_bytes += sum(4 * len(text) for text in texts.values()) + _BOOKKEEPING_BYTES
    n_bytes += _OBJECT_BYTES * sum(2 + name.count("/") for name in rom.leaves)
    with creating(partial, n_bytes=n_bytes) as file:
        file.attrs.update(rank=len(rom.basis), step=meta["step"])
        file.attrs["fingerprint"] = np.bytes_(meta["fingerprint"].encode())
        for name, text in texts.items():
            file[name] = np.array(text.encode())
        for name, array in arrays.items():
            file[name] = array
        group = file.create_group("model")
        for name, leaf in rom.leaves.items():
            dataset = group.create_dataset(name, data=to_storable(leaf))
            dataset.attrs["dtype"] = np.bytes_(leaf.dtype.name.encode())
    try:
        with open(partial, "r+b") as file:
            file.seek(HEAD_BYTES)
            head = make_head(file.read())
            file.seek(0)
            file.write(head)
        flush_file(partial)
        os.replace(partial, path)
        sync_folder(path.absolute().parent)
        return path.stat().st_size
    except OSError as error:
        remove_file(partial)
        raise OutputError(f"Cannot write {path}: {error_text(error)}.") from error
