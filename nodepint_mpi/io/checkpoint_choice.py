"""Which files to load from, and whether they are of this program and this experiment."""

import os
from pathlib import Path

from nodepint_mpi.errors import CheckpointError
from nodepint_mpi.io.checkpoint_file import Head
from nodepint_mpi.io.checkpoint_folder import find_checkpoints
from nodepint_mpi.io.difference import describe_difference
from nodepint_mpi.io.seal import FORMAT, read_format


def list_candidates(where: Path) -> tuple[list[Path], bool]:
    """Files to try in order, and whether they were found in a folder. Local.

    Raises:
        CheckpointError: if there is no such file or folder.
    """
    if os.path.isdir(where):
        return find_checkpoints(where), True
    if not os.path.exists(where):
        raise CheckpointError(f"no checkpoint at {where}: there is no such file or folder")
    return [where], False


def check_format(path: Path) -> None:
    """Refuse a file that another version of the program wrote. Local. Raises CheckpointError."""
    found = read_format(path)
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, this program reads format {FORMAT}; resume with the "
            "version of nodepint_mpi that wrote it"
        )


def check_belongs(path: Path, head: Head, *, fingerprint: str | None, config: str | None) -> None:
    """Check that it is a checkpoint of this experiment. Local. Raises CheckpointError."""
    if fingerprint is not None and head.fingerprint != fingerprint:
        how = describe_difference(head.meta.get("config"), config)
        raise CheckpointError(
            f"{path} belongs to another experiment (fingerprint {head.fingerprint}, expected "
            f"{fingerprint}){how}; resume with the config it was saved with, or start a new run"
        )
