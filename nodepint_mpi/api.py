"""Commands as functions: `nodepint_mpi.train` and `nodepint_mpi.export_rom`.

They start MPI, give each rank its GPU or cores and set JAX's precision, as the commands do. Signals
are left to the caller.
"""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.io.directory import Which, read_run
from nodepint_mpi.parallel.comms import Comms, make_comms, world
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.rom import export as rom_export
from nodepint_mpi.training import train as training
from nodepint_mpi.training.start import begin


def train(
    config_file: str | os.PathLike[str],
    *,
    settings: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Train the experiment of a config file, as `nodepint train` does.

    Collective over the world; every rank must pass the same arguments.

    Args:
        config_file: TOML, or a Python file with a `CONFIG`.
        settings: Overrides such as `"run.n_steps=100"`.
        out: Run directory, `runs/NAME` unless given.
        resume: "auto" for the newest good checkpoint of it, or the path of one.

    Returns:
        Status, step, losses, test metrics, times, and `run_directory`. Equal on all ranks.

    Raises:
        NodepintError: on all ranks, for anything the user can fix.
    """
    config = _start(lambda: read_config(Path(config_file), settings))
    folder = Path(config.output.dir) / config.run.name if out is None else Path(out)
    comms = _world_comms(config.run.data_ranks)
    return training.train(config, folder, comms, StopFlag(), resume=resume)


def export_rom(
    run_directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    checkpoint: Which = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Write the reduced model of a run to one file, as `nodepint rom export` does.

    Collective over the world; every rank must pass the same arguments.

    Args:
        run_directory: Of a run with a good checkpoint.
        out: The file; one that is there is replaced if it is a reduced model.
        rank: How many directions.
        energy: Or the share of the trajectories' sum of squares that they must hold.
        checkpoint: "best", "last", a step or the path of a file; unless given the best one if the
            run keeps it apart (`output.best`), else the newest good one.
        trust: Import the code that the run's config names; without, such a run is refused.

    Returns:
        Rank, energy, size of the file and of the state. Equal on all ranks.

    Raises:
        NodepintError: on all ranks, for anything the user can fix.
    """
    _start(lambda: read_run(Path(run_directory)))
    return rom_export.export_rom(
        Path(run_directory), Path(out), _world_comms(1), rank=rank, energy=energy,
        checkpoint=checkpoint, trust=trust,
    )  # fmt: skip


def _start(read: Callable[[], Config]) -> Config:
    """The config; what a rank computes on is settled by the first. Collective over the world."""
    return begin(world(), read, placed=_world_comms.cache_info().currsize > 0)


@functools.cache
def _world_comms(n_groups: int) -> Comms:
    """Communicators with this number of groups, made once and shared by all runs. Collective."""
    return make_comms(world(), n_groups=n_groups)
