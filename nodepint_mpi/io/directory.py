"""The run directory: config, provenance, log, metrics, phases, figures, checkpoints, DONE."""

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.errors import CheckpointError, ConfigError, OutputError
from nodepint_mpi.io.checkpoint_folder import checkpoint_path, find_checkpoints
from nodepint_mpi.io.lock import LOCK, locking

CONFIG, PROVENANCE, LOG, PHASES, CHECKPOINTS, BEST, DONE = (
    "config.toml", "provenance.json", "log.txt", "phases.json", "ckpt", "best", "DONE",
)  # fmt: skip

Which = str | os.PathLike[str] | int | None
"""A checkpoint of a run: "best", "last", its step, or its path; None for the best if the run keeps
it apart, else the last."""

PACKAGES = ("jax", "equinox", "diffrax", "optax", "mpi4py", "mpi4jax", "h5py", "datasets")


def config_text(config: Config) -> str:
    """The resolved config as TOML. Local."""
    # Not in JSON's mode, which would turn an infinity among a network's options into null.
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def check_directory(folder: Path, *, resume: bool) -> None:
    """Check that a run can start, or go on, in this directory; make nothing. Local; rank 0 only.

    Raises:
        OutputError: if a new run would overwrite something.
        CheckpointError: if there is nothing to resume.
    """
    occupied = _is_occupied(folder)
    if occupied and not resume:
        raise OutputError(
            f"{folder} is not empty, and runs are never overwritten: resume it with "
            "`--resume auto`, choose another directory with `--out`, or remove it."
        )
    if resume and not occupied:
        raise CheckpointError(f"There is nothing to resume in {folder}.")
    if resume and not ((folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()):
        raise OutputError(
            f"{folder} is not a run directory, expected one with {CONFIG} and {CHECKPOINTS}/: name "
            "that of the run with `--out`. Files of other kinds are never written over."
        )


@contextlib.contextmanager
def writing_in(folder: Path, *, resume: bool) -> Iterator[None]:
    """Be the only job that writes in a run directory, until it ends. Local; rank 0 only.

    A new run's directory is made, and looked at once more: two jobs may have found it free.

    Raises:
        OutputError, CheckpointError: if another job writes there, or as `check_directory`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write the run directory {folder}: {error.strerror}.") from error
    with locking(folder):
        check_directory(folder, resume=resume)
        yield


def _is_occupied(folder: Path) -> bool:
    """Whether anything is in a folder but the lock of a run that never began."""
    try:
        return any(path.name != LOCK for path in folder.iterdir())
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise OutputError(
            f"{folder} is a file, or below one; choose another run directory with `--out`."
        ) from None
    except OSError as error:
        raise OutputError(f"Cannot read the run directory {folder}: {error.strerror}.") from error


def start_directory(
    folder: Path,
    config: Config,
    *,
    data_ranks: int,
    basis_ranks: int,
    places: Sequence[tuple[str, Collection[int]]],
) -> None:
    """Make the run directory and write config and provenance. Local; rank 0 only.

    Of a run that has finished and now goes on, DONE is taken away.

    Args:
        folder: The run directory.
        config: The experiment.
        data_ranks: Groups of ranks that share the samples.
        basis_ranks: Ranks that share the tangents of the same slices.
        places: Host and cores of every rank; no cores where ranks are not bound to any.

    Raises:
        OutputError: if nothing can be written there.
    """
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if config.output.best is not None:
            (folder / BEST).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write the run directory {folder}: {error.strerror}.") from error
    provenance = _read_json(folder / PROVENANCE)
    provenance.setdefault("starts", []).append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "n_ranks": len(places),
            "data_ranks": data_ranks,
            "basis_ranks": basis_ranks,
            "hosts": sorted({host for host, _ in places}),
            "n_cores": len({(host, core) for host, cores in places for core in cores}),
            "fingerprint": config.fingerprint(),
            "versions": versions(),
            "commit": commit(),
        }
    )
    write_text(folder / CONFIG, config_text(config))
    write_text(folder / PROVENANCE, json.dumps(provenance, indent=1) + "\n")
    (folder / DONE).unlink(missing_ok=True)


def log_to_file(folder: Path) -> None:
    """Add what rank 0 says to the run's log, with the time. Local; rank 0 only."""
    handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("nodepint_mpi").addHandler(handler)


def read_run(folder: Path) -> Config:
    """The config of an existing run. Local.

    Raises:
        ConfigError: if it is no run directory.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} is not a run directory: it has no {CONFIG}.")
    return read_config(folder / CONFIG)


def find_place(folder: Path, config: Config, which: Which) -> Path:
    """Where a checkpoint of a run is: a file, or a folder whose newest good one is meant. Local.

    Args:
        folder: The run directory.
        config: Its config.
        which: The checkpoint.

    Raises:
        CheckpointError: if it is not there.
    """
    best = find_checkpoints(folder / BEST)
    if isinstance(which, str) and which.isdecimal():
        which = int(which)
    match which:
        case None:
            return folder / (BEST if best and config.output.best is not None else CHECKPOINTS)
        case "last":
            return folder / CHECKPOINTS
        case "best":
            if not best:
                raise CheckpointError(
                    f"{folder} has no best checkpoint: a run keeps it apart if its config has "
                    '`output.best`, such as "valid_loss", and after the first validation.'
                )
            return folder / BEST
        case int():
            for place in (CHECKPOINTS, BEST):
                if checkpoint_path(folder / place, which).is_file():
                    return checkpoint_path(folder / place, which)
            names = [path.name for path in [*find_checkpoints(folder / CHECKPOINTS), *best]]
            raise CheckpointError(
                f"{folder} has no checkpoint of step {which}; there are "
                f"{', '.join(dict.fromkeys(names)) or 'none'}."
            )
    if not Path(which).is_file():
        raise CheckpointError(f"The checkpoint {which} does not exist.")
    return Path(which)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole: a reader sees the old one or the new one. Local.

    Raises:
        OutputError: if that is impossible.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror}.") from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers. Local."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages}


def commit() -> str | None:
    """The commit of the source tree, if it is one. Local."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
