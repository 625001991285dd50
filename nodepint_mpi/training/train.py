"""The training loop."""

import contextlib
import functools
import json
import logging
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from nodepint_mpi.build.user_code import load_code
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.data.own import share_own_data
from nodepint_mpi.io.directory import (
    DONE,
    check_directory,
    config_text,
    log_to_file,
    start_directory,
    write_text,
    writing_in,
)
from nodepint_mpi.io.records import Records
from nodepint_mpi.pages.figures import plot_losses
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.profiling.record import record_times, write_times
from nodepint_mpi.profiling.timers import CompileClock, Timers
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.ranks.devices import own_cores
from nodepint_mpi.ranks.machine import peak_bytes
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.ranks.watchdog import Watchdog
from nodepint_mpi.training.cadence import is_due
from nodepint_mpi.training.enlarge import grow
from nodepint_mpi.training.evaluate import evaluate, save_predictions
from nodepint_mpi.training.nonfinite import LastGood, raise_nonfinite
from nodepint_mpi.training.plain import make_plain_stepper
from nodepint_mpi.training.progress import Progress
from nodepint_mpi.training.runtime_errors import explained
from nodepint_mpi.training.sameness import require_same_code, require_same_values
from nodepint_mpi.training.saving import resume_run, save_run
from nodepint_mpi.training.scalars import Scalars, require_tensorboard
from nodepint_mpi.training.setup import Experiment, fresh_state, set_up
from nodepint_mpi.training.step import StepReport, TrainState
from nodepint_mpi.training.tracking import Stepper, make_stepper

IMPORT_PATIENCE = 8.0
"""What is imported may take this many times `run.hang_timeout_s`: slow file systems."""

_log = logging.getLogger(__name__)


def train(
    config: Config,
    folder: Path,
    comms: Comms,
    flag: StopFlag,
    *,
    resume: str | None = None,
    plain: bool = False,
) -> dict[str, Any]:
    """Train, checkpoint, evaluate and draw. Collective over `comms`.

    Args:
        config: The experiment, equal on all ranks.
        folder: The run directory.
        comms: The run's communicators.
        flag: Asked to stop by a signal on any rank, the run checkpoints and returns early.
        resume: "auto" for the newest good checkpoint of `folder`, or the path of one.
        plain: Take the steps by plain diffrax and optax; on one rank, with a `plain_config`.

    Returns:
        What `--json` writes: status, step, losses, test metrics, times, memory. Equal on all ranks.

    Raises:
        NodepintError: on all ranks, for anything the user can fix.
    """
    control = comms.control
    make = make_plain_stepper if plain else make_stepper
    with (
        explained(),
        Watchdog(control, limit_s=config.run.hang_timeout_s) as watchdog,
        contextlib.ExitStack() as opened,
        CompileClock() as compiling,
    ):
        timers = Timers(comms, compiling)
        seconds = timers.seconds
        # On its own: an import that hangs on one rank is then that rank's.
        patience_s = IMPORT_PATIENCE * config.run.hang_timeout_s
        with watchdog.phase("importing the code that the config names", limit_s=patience_s):
            code = load_code(config)
        with watchdog.phase("comparing code", collective=True):
            require_same_code(control, code)
        with watchdog.phase("setting up", limit_s=600.0):
            with together(control):
                if control.rank == 0:
                    check_directory(folder, resume=resume is not None)
                    if resume is not None:  # before checkpoints are read
                        opened.enter_context(writing_in(folder, resume=True))
                    if config.output.tensorboard:
                        require_tensorboard()
            config = share_own_data(control, config)
            experiment = set_up(config, comms)
            state, start, stepper = fresh_state(experiment), 0, None
            if resume is not None:
                experiment, state, start, stepper = resume_run(experiment, folder, resume, make)
            stepper = stepper or make(experiment)
            places = control.allgather((socket.gethostname(), own_cores()))
            with together(control):
                if control.rank == 0:
                    if resume is None:  # nothing is made before all is set up
                        opened.enter_context(writing_in(folder, resume=False))
                    start_directory(
                        folder,
                        config,
                        data_ranks=comms.time.n_groups,
                        places=places,
                    )
                    log_to_file(folder)
        records, scalars = _open_records(
            comms, folder, start if resume is not None else None, opened, config.output.tensorboard
        )
        experiment, state, step, report = _optimise(
            comms, experiment, state, start, stepper, make, folder, records, flag, watchdog, timers
        )
        with watchdog.phase("comparing times", collective=True, step=step):
            times = record_times(comms, timers, watchdog.spent(), experiment.train_problem.solver)
        with watchdog.phase("writing times", limit_s=120.0), together(control):
            if times is not None:  # rank 0 has them
                write_times(folder, times)
        result = {
            "status": "finished" if step >= config.run.n_steps else "stopped",
            "step": step,
            "n_ranks": control.size,
            "data_ranks": comms.time.n_groups,
            "train_loss": None if report is None else float(report.loss),
            "step_s": statistics.median(seconds.steps) if seconds.steps else None,
            "training_s": sum(seconds.steps),
            "saving_s": sum(seconds.saving),
            "n_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "peak_bytes": control.allgather(peak_bytes()),
            "run_directory": str(folder),
        }
        _log.info(
            "%d checkpoints took %.3g s beside %.3g s of training: %.2g %%",
            len(seconds.saving), sum(seconds.saving), sum(seconds.steps), 100 * seconds.share(),
        )  # fmt: skip
        if result["status"] == "stopped":
            _log.info("asked to stop: resume with `--resume auto`")
            return result
        with watchdog.phase("evaluating", limit_s=600.0):
            scores = evaluate(comms, experiment, state.params)
            result |= {f"test_{name}": value for name, value in scores.items()}
            save_predictions(comms, experiment, state.params, folder)
        with watchdog.phase("writing results", limit_s=120.0), together(control):
            if control.rank == 0:
                assert records is not None  # rank 0 keeps them
                records.write_table(fingerprint=config.fingerprint(), config=config_text(config))
                plot_losses(folder)
                if scalars is not None:
                    scalars.append({"step": step} | {f"test_{k}": v for k, v in scores.items()})
                write_text(folder / DONE, json.dumps(result, indent=1) + "\n")
        for name, value in scores.items():
            _log.info("test %s: %.6g", name, value)
        return result


def _optimise(
    comms: Comms,
    experiment: Experiment,
    state: TrainState,
    start: int,
    stepper: Stepper,
    make: Callable[[Experiment], Stepper],
    folder: Path,
    records: Records | None,
    flag: StopFlag,
    watchdog: Watchdog,
    timers: Timers,
) -> tuple[Experiment, TrainState, int, StepReport | None]:
    """Take the steps that are left.

    Returns the experiment with the network as it is then, and the last report.
    """
    config, seconds, report, step = experiment.config, timers.seconds, None, start
    with watchdog.phase("comparing parameters", collective=True, step=step):
        require_same_values(comms.control, state._asdict(), step, None)
    since = step
    good = LastGood()
    spent = 0.0 if records is None else records.last.get("training_s", 0.0)
    n_steps = config.run.n_steps
    growth = [] if config.growth is None else config.growth.steps
    with Progress(start, n_steps, shown=comms.control.rank == 0) as progress:
        while step < n_steps:
            number = step + 1  # as the log and the metrics count
            with watchdog.phase("reading a batch", step=number):
                batch = experiment.batch(step)
            if step in growth:
                with watchdog.phase("enlarging the network", step=number, limit_s=600.0):
                    experiment, state = grow(comms, experiment, state, batch.rows, step)
                stepper = make(experiment)
            with watchdog.phase("training step", collective=True, step=number):
                taken = timers.take(functools.partial(stepper.take, state, batch, step), step)
            report = taken.report
            spent += seconds.steps[-1]
            if not report.finite:  # equal on all ranks; ends the run before it can be saved
                with watchdog.phase(
                    "saving a checkpoint", collective=True, step=number, limit_s=600.0
                ):
                    history = f"{good.describe(state)} {good.save(folder, make)}"
                with watchdog.phase("looking for NaN", collective=True, step=number):
                    raise_nonfinite(comms, experiment, state, batch, step, report, history)
            good.note(experiment, state, number, report)
            state = taken.state
            step += 1
            with watchdog.phase("agreeing on the next step", collective=True, step=step):
                stop = flag.requested_anywhere(comms.control)
                due = is_due(comms.control, config.output.checkpoint_every, step, seconds)
            last = stop or step == n_steps
            saved = due or last
            every = config.run.compare_every
            if saved or (every and step % every == 0):
                with watchdog.phase("comparing parameters", collective=True, step=step):
                    require_same_values(comms.control, state._asdict(), step, since)
                since = step
            reported = step % config.output.log_every == 0 or last
            if reported:
                progress.report(step, report, seconds.steps[-1])
            # A gradient error that was found would else be lost: checks have a rhythm of their own.
            if records is not None and (reported or taken.error is not None):
                times = {"step_s": seconds.steps[-1], "training_s": spent}
                records.append(step, **taken.numbers(), **times)
            if saved:
                began = time.perf_counter()
                with watchdog.phase(
                    "saving a checkpoint", collective=True, step=step, limit_s=600.0
                ):
                    save_run(experiment, folder, state, stepper, step)
                if records is not None:
                    records.write_table(fingerprint=config.fingerprint())
                seconds.saving.append(time.perf_counter() - began)
            if last:
                break
    return experiment, state, step, report


def _open_records(
    comms: Comms,
    folder: Path,
    resume_step: int | None,
    opened: contextlib.ExitStack,
    tensorboard: bool,
) -> tuple[Records | None, Scalars | None]:
    """Metrics, kept by rank 0, and their copy for TensorBoard; closed with `opened`."""
    records = scalars = None
    with together(comms.control):
        if comms.control.rank == 0:
            if tensorboard:
                scalars = opened.enter_context(Scalars(folder, resume_step=resume_step))
            copy_to = None if scalars is None else scalars.append
            records = Records(folder, resume_step=resume_step, copy_to=copy_to)
            opened.enter_context(records)
    return records, scalars
