"""A folder of checkpoints: names, the step from a temporary name to the final one, the oldest."""

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path

from nodepint_mpi.errors import CheckpointError, OutputError
from nodepint_mpi.io.errno_text import error_text

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{6,})\.h5")
_PARTIAL = ".partial"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Name of the checkpoint of a step. Local."""
    return folder / f"step-{step:06d}.h5"


def partial_path(path: Path) -> Path:
    """Name a checkpoint has while it is written. Local."""
    return path.with_name(path.name + _PARTIAL)


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first; none if there is no such folder. Local."""
    try:
        return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=_step)[::-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot look into {folder}: {error_text(error)}") from error


def remove_partials(folder: Path) -> None:
    """Remove what killed runs have left; also finds out whether there is such a folder. Local."""
    try:
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name.removesuffix(_PARTIAL)) and path.name.endswith(_PARTIAL):
                path.unlink()
    except OSError as error:
        raise OutputError(f"cannot save checkpoints in {folder}: {error_text(error)}") from error


def flush_file(path: Path) -> None:
    """Bring what this rank has written to the disk, where late write errors show. Local."""
    try:
        handle = os.open(path, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error_text(error)}") from error


def publish(partial: Path, path: Path) -> None:
    """Give the file its name, on the disk when this returns. Local."""
    try:
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error_text(error)}") from error


def prune(folder: Path, *, step: int, keep: int) -> None:
    """Remove old checkpoints, the newest `keep` up to this step excepted. Local.

    Checkpoints of later steps are left alone: the run is on its way to them.
    """
    try:
        older = [path for path in find_checkpoints(folder) if _step(path) <= step]
        for path in older[max(1, keep) :]:
            path.unlink()
    except (CheckpointError, OSError) as error:
        _log.warning("cannot remove old checkpoints in %s: %s", folder, error_text(error))


def keep_steps(folder: Path, steps: Collection[int]) -> None:
    """Remove all checkpoints but those of some steps. Local."""
    try:
        for path in find_checkpoints(folder):
            if _step(path) not in steps:
                path.unlink()
    except (CheckpointError, OSError) as error:
        _log.warning("cannot remove old checkpoints in %s: %s", folder, error_text(error))


def remove_file(path: Path) -> None:
    """Remove a file if it can be; a failure is only logged. Local."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, error_text(error))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk. Local. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1
