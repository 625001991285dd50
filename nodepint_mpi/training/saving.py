"""What a run's checkpoint holds, and how a run goes on from one, on any grid of ranks."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from nodepint_mpi.data.samples import shapes_of_data
from nodepint_mpi.io.checkpoint import load_checkpoint, require_finite, save_checkpoint
from nodepint_mpi.io.directory import BEST, CHECKPOINTS, config_text, versions
from nodepint_mpi.parallel.dealing import join_samples, split_samples
from nodepint_mpi.training.error_control import Stepper, kept_like, make_stepper
from nodepint_mpi.training.setup import Experiment, at_step, slice_rows
from nodepint_mpi.training.train_state import TrainState
from nodepint_mpi.training.watch import Watch, resumed_watch

_log = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """A run as it was when it was saved: `step` optimizer steps are done."""

    experiment: Experiment
    state: TrainState
    step: int
    stepper: Stepper
    watch: Watch | None


def save_run(
    experiment: Experiment,
    folder: Path,
    state: TrainState,
    stepper: Stepper,
    step: int,
    *,
    watch: Watch | None = None,
    best: bool = False,
) -> Path:
    """Checkpoint what is equal on all ranks once, and interface data by global slice and sample.

    Collective over `experiment.comms`.

    Args:
        experiment: As the next step is taken with.
        folder: The run directory.
        state: After `step` optimizer steps.
        stepper: What took them.
        step: How many there were.
        watch: What the validations have come to.
        best: Whether to put it with the best ones, none of which is then removed.

    Raises:
        OutputError: on all ranks, if it cannot be written.
    """
    config, comms = experiment.config, experiment.comms
    kept, rows = stepper.kept()
    whole, dealt = experiment.update.held.kept(state)
    rows, first = join_samples(comms.data, rows, slice_rows(config, comms.time)[0])
    if comms.time.basis_rank > 0:  # what ranks with the same slices hold is written once
        rows = {name: block[:0] for name, block in rows.items()}
    return save_checkpoint(
        comms.control,
        folder / (BEST if best else CHECKPOINTS),
        step=step,
        replicated=whole | kept,
        rows=rows,
        row_start=first,
        n_rows=config.time.n_slices,
        meta={
            "fingerprint": config.fingerprint(),
            "config": config_text(config),
            "versions": versions(),
            "seed": config.run.seed,
            "data_cursor": step,
            "model": shapes_of_data(experiment.train),
        }
        | ({} if watch is None else {"validation": watch.as_meta()}),
        keep=None if best else config.output.keep,
        dealt=dealt,
    )


def resume_run(
    experiment: Experiment,
    folder: Path,
    resume: str,
    make: Callable[[Experiment], Stepper] = make_stepper,
) -> Resumed:
    """A run as a checkpoint has it, on this grid of ranks whatever the one that saved it.

    Collective over `experiment.comms`.

    Args:
        experiment: Its config made ready.
        folder: The run directory.
        resume: "auto" for the newest good checkpoint, or the path of one.
        make: Makes what takes the steps.

    Raises:
        CheckpointError: on all ranks, if there is none that can be read and belongs to it.
    """
    config, comms = experiment.config, experiment.comms
    first, n_owned = slice_rows(config, comms.time)
    made = cache(lambda step: at_step(experiment, step - 1))
    loaded = load_checkpoint(
        comms.control,
        folder / CHECKPOINTS if resume == "auto" else Path(resume),
        like_at=lambda step: kept_like(made(step)),
        dealt_at=lambda step: made(step).update.held.row_specs(),
        row_start=first,
        n_owned_rows=n_owned,
        fingerprint=config.fingerprint(),
        config=config_text(config),
    )
    require_finite(loaded)
    _log.info("resumed from %s at step %d", loaded.path, loaded.step)
    experiment = made(loaded.step)
    stepper = make(experiment)
    stepper.restore(loaded.replicated, split_samples(comms.time, loaded.rows))
    state = experiment.update.held.restored(loaded.replicated, loaded.dealt)
    return Resumed(experiment, state, loaded.step, stepper, resumed_watch(config, loaded.meta))
