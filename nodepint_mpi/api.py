"""Commands as functions: `nodepint_mpi.train`, `predict` and `export_rom`.

They start MPI, give each rank its GPU or cores and set JAX's precision, as the commands do. Signals
are left to the caller.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from nodepint_mpi.build.objects import Objects, objects_given, with_objects
from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.io.directory import Which, read_run
from nodepint_mpi.parallel.comms import Comms, make_comms, world
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.rom import export as rom_export
from nodepint_mpi.training import predict as prediction
from nodepint_mpi.training import train as training
from nodepint_mpi.training.callbacks import Callback
from nodepint_mpi.training.predict import Predictions
from nodepint_mpi.training.start import begin, require_same_options


def train(
    config: str | os.PathLike[str] | Config,
    *,
    settings: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    resume: str | None = None,
    callbacks: Sequence[Callback] = (),
    **objects: Unpack[Objects],
) -> dict[str, Any]:
    """Train an experiment, as `nodepint train` does.

    Collective over the world; every rank must pass the same arguments.

    Args:
        config: A file, TOML or Python with a `CONFIG`, or a `Config`.
        settings: Overrides of a file's keys, such as `"run.n_steps=100"`.
        out: Run directory, `runs/NAME` unless given.
        resume: "auto" for the newest good checkpoint of it, or the path of one. What was given as
            an object has to be given again.
        callbacks: Told of the run, on rank 0.
        **objects: `model`, `data`, `loss`, `metrics`, `terms` and `optimizer`, in the place of what
            the config would name. See `nodepint_mpi.Objects`.

    Returns:
        Status, step, losses, test metrics, times, and `run_directory`. Equal on all ranks.

    Raises:
        NodepintError: on all ranks, for anything the user can fix.
    """

    def read() -> Config:
        if isinstance(config, Config):
            if settings:
                raise ConfigError("`settings` override the keys of a file: change the `Config`.")
            return config
        return read_config(Path(config), settings)

    settled = _start(read)
    named, found = with_objects(settled, objects)
    # By name here, and by value where all code is compared.
    require_same_options(world(), {f"`{path.rpartition(':')[0]}`": path for path in found})
    folder = Path(named.output.dir) / named.run.name if out is None else Path(out)
    comms = _world_comms(named.run.data_ranks, named.run.basis_ranks)
    with objects_given(found):
        return training.train(named, folder, comms, StopFlag(), resume=resume, callbacks=callbacks)


def predict(
    run_directory: str | os.PathLike[str],
    columns: Mapping[str, Any],
    *,
    checkpoint: Which = None,
    trust: bool = False,
    model: Any = None,
) -> Predictions:
    """Predictions of a trained run for samples in memory, solved parallel in time.

    Collective over the world; every rank must pass the same arguments.

    Args:
        run_directory: Of a run with a good checkpoint.
        columns: The columns that the run's config names, as in a split of its data: arrays with a
            row for each sample, or lists of arrays where rows differ in length. Targets may be left
            out unless the encoder reads them; of `data.input` only the first observation is then
            read, and a column with that alone, (samples, 1, ...), will do.
        checkpoint: "best", "last", a step or the path of a file; unless given the best one if the
            run keeps it apart (`output.best`), else the newest good one.
        trust: Import the code that the run's config names.
        model: The object or function that the run was started with, if it was given one.

    Returns:
        `times` (times,), or (samples, times) where rows have their own, and `values` (samples,
        times, ...). Labeled samples have one time, the end of the horizon. Equal on all ranks.

    Raises:
        NodepintError: on all ranks, for anything the user can fix.
    """
    config = _start(lambda: read_run(Path(run_directory)))
    return prediction.predict(
        Path(run_directory), config, columns, _world_comms(1),
        checkpoint=checkpoint, trust=trust, model=model,
    )  # fmt: skip


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
def _world_comms(n_groups: int, n_basis: int = 1) -> Comms:
    """Communicators of such a grid, made once and shared by all runs. Collective."""
    return make_comms(world(), n_groups=n_groups, n_basis=n_basis)
