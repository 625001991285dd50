"""The training loop."""

import contextlib
import dataclasses
import functools
import json
import logging
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.profiling.record import record_times, write_times
from nodepint_mpi.profiling.timers import CompileClock, Timers
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.ranks.devices import own_cores
from nodepint_mpi.ranks.machine import peak_bytes, started_at
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.ranks.watchdog import Watchdog
from nodepint_mpi.training.cadence import is_due
from nodepint_mpi.training.callbacks import Callback, Listeners, make_callbacks
from nodepint_mpi.training.enlarge import grow
from nodepint_mpi.training.error_control import Stepper, Taken, make_stepper
from nodepint_mpi.training.evaluate import evaluate_and_draw
from nodepint_mpi.training.length import describe_end, describe_layout, describe_start
from nodepint_mpi.training.nonfinite import LastGood, raise_nonfinite
from nodepint_mpi.training.plain import make_plain_stepper
from nodepint_mpi.training.progress import Progress
from nodepint_mpi.training.runtime_errors import explained
from nodepint_mpi.training.sameness import require_same_code, require_same_values
from nodepint_mpi.training.saving import resume_run, save_run
from nodepint_mpi.training.scalars import Scalars, require_tensorboard
from nodepint_mpi.training.setup import (
    Batch,
    Experiment,
    evaluated_params,
    fresh_state,
    set_up,
)
from nodepint_mpi.training.step import StepReport
from nodepint_mpi.training.train_state import TrainState
from nodepint_mpi.training.validation import Validation
from nodepint_mpi.training.watch import new_watch

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
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train, checkpoint, evaluate and draw. Collective over `comms`.

    Args:
        config: The experiment, equal on all ranks.
        folder: The run directory.
        comms: The run's communicators.
        flag: Asked to stop by a signal on any rank, the run checkpoints and returns early.
        resume: "auto" for the newest good checkpoint of `folder`, or the path of one.
        plain: Take the steps by plain diffrax and optax; on one rank, with a `plain_config`.
        callbacks: Told of the run on rank 0, besides those that the config names.

    Returns:
        What `--json` writes: status, step, losses, test metrics, times, memory. Equal on all ranks.

    Raises:
        NodepintError: on all ranks, for anything the user can fix.
    """
    control = comms.control
    grid = {"data_ranks": comms.time.n_groups, "basis_ranks": comms.time.n_basis}
    make = make_plain_stepper if plain else make_stepper
    began = time.perf_counter()
    if control.rank == 0:
        _log.info("%s", describe_layout(config, comms, folder, plain=plain))
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
            listeners = None
            with together(control):
                if control.rank == 0:
                    check_directory(folder, resume=resume is not None)
                    if resume is not None:  # before checkpoints are read
                        opened.enter_context(writing_in(folder, resume=True))
                    if config.output.tensorboard:
                        require_tensorboard()
                    listeners = Listeners(make_callbacks(config, callbacks), flag)
            config = share_own_data(control, config)
            experiment = set_up(config, comms)
            state, start, stepper = fresh_state(experiment), 0, None
            watch = new_watch(config)
            if resume is not None:
                experiment, state, start, stepper, watch = resume_run(
                    experiment, folder, resume, make
                )
            stepper = stepper or make(experiment)
            places = control.allgather((socket.gethostname(), own_cores()))
            with together(control):
                if control.rank == 0:
                    if resume is None:  # nothing is made before all is set up
                        opened.enter_context(writing_in(folder, resume=False))
                    start_directory(folder, config, places=places, **grid)
                    log_to_file(folder)
        records, scalars = open_records(
            comms,
            folder,
            start if resume is not None else None,
            opened,
            experiment.config,
            listeners,
        )
        validation = Validation(folder, watch)
        validation.begin(experiment, start)
        _log.info("%s", describe_start(experiment))
        run = Run(
            experiment, state, start, stepper, make, folder, flag, watchdog, timers, records,
            validation,
        )  # fmt: skip
        run.to_the_end()
        experiment, state, step, report = run.experiment, run.state, run.step, run.report
        with watchdog.phase("comparing times", collective=True, step=step):
            times = record_times(comms, timers, watchdog.spent(), experiment.train_problem.solver)
        with watchdog.phase("writing times", limit_s=120.0), together(control):
            if times is not None:  # rank 0 has them
                write_times(folder, times)
        result = {
            "status": "finished" if run.is_finished else "stopped",
            "step": step,
            "n_ranks": control.size,
            **grid,
            "train_loss": None if report is None else float(report.loss),
            "started_at": started_at(),
            "first_step_s": timers.first_step_s,
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
        result |= validation.numbers(experiment)
        if result["status"] == "stopped":
            _log.info("asked to stop: resume with `--resume auto`")
            if listeners is not None:
                listeners.finish(result)
            return result
        if validation.is_over(experiment):
            result["reason"] = validation.describe()
            _log.info("stopped early at step %d: %s", step, result["reason"])
            _log.info("to go on, resume with a larger `run.patience`")
        with watchdog.phase("evaluating", limit_s=600.0):
            scored, best = experiment, validation.load_best(experiment)
            params = evaluated_params(experiment, state)
            if best is not None:
                scored, params, result["test_of_step"] = best.experiment, best.params, best.step
                _log.info("test scores are of the best checkpoint, of step %d", best.step)
            scores = evaluate_and_draw(comms, scored, params, folder)
            result |= {f"test_{name}": value for name, value in scores.items()}
        with watchdog.phase("writing results", limit_s=120.0), together(control):
            if control.rank == 0:
                assert records is not None  # rank 0 keeps them
                records.write_table(fingerprint=config.fingerprint(), config=config_text(config))
                # Here, so that ranks that draw nothing do not load matplotlib: 0.7 s.
                from nodepint_mpi.pages.figures import plot_losses

                plot_losses(folder)
                if scalars is not None:
                    scalars.append({"step": step} | {f"test_{k}": v for k, v in scores.items()})
                write_text(folder / DONE, json.dumps(result, indent=1) + "\n")
        if listeners is not None:
            listeners.finish(result)
        _log.info("%s", describe_end(config, folder, scores, time.perf_counter() - began))
        return result


@dataclasses.dataclass
class Run:
    """A training under way: where it is, and what it works with.

    `step` optimizer steps are done, with `report` of the last; `equal_since` is the step after
    which all ranks were last seen to hold the same parameters. `make` makes a stepper for a network
    that has grown. `records` are kept by rank 0. `validation` may find that the run is over early.
    """

    experiment: Experiment
    state: TrainState
    step: int
    stepper: Stepper
    make: Callable[[Experiment], Stepper]
    folder: Path
    flag: StopFlag
    watchdog: Watchdog
    timers: Timers
    records: Records | None
    validation: Validation
    report: StepReport | None = None
    equal_since: int | None = None
    good: LastGood = dataclasses.field(default_factory=LastGood)

    @property
    def is_finished(self) -> bool:
        """Whether there is no step left to take. Local; equal on all ranks."""
        return self.step >= self.experiment.n_steps or self.validation.is_over(self.experiment)

    def to_the_end(self) -> None:
        """Take the steps that are left, or stop when asked to. Collective over the grid."""
        control, n_steps = self.experiment.comms.control, self.experiment.n_steps
        spent = 0.0 if self.records is None else self.records.last.get("training_s", 0.0)
        self._compare()
        clock = self.timers.compiling
        with Progress(self.step, n_steps, clock, shown=control.rank == 0) as progress:
            stopping = False
            while not self.is_finished and not stopping:
                taken = self._take_step()
                spent += self.timers.seconds.steps[-1]
                scores = self._validate()
                with self._phase("agreeing on the next step"):
                    every = self.experiment.config.output.checkpoint_every
                    stopping = self.flag.requested_anywhere(control)
                    due = is_due(control, every, self.step, self.timers.seconds)
                last = stopping or self.is_finished
                self._after_step(taken, scores, progress, spent, due=due, last=last)

    def _take_step(self) -> Taken:
        """One step, on a network that may have to grow first; it ends the run if it explodes."""
        number = self.step + 1  # as the log and the metrics count
        with self.watchdog.phase("reading a batch", step=number):
            batch = self.experiment.batch(self.step)
        growth = self.experiment.config.growth
        if growth is not None and self.step in growth.steps:
            self._grow(batch, number)
        work = functools.partial(self.stepper.take, self.state, batch, self.step)
        with self.watchdog.phase("training step", collective=True, step=number):
            taken = self.timers.take(work, self.step)
        self.report = taken.report
        if not taken.report.finite:  # equal on all ranks
            self._give_up(batch, taken.report)
        watch = self.validation.watch
        self.good.note(self.experiment, self.state, number, taken.report, watch)
        self.state, self.step = taken.state, number
        return taken

    def _grow(self, batch: Batch, number: int) -> None:
        with self.watchdog.phase("enlarging the network", step=number, limit_s=600.0):
            self.experiment, self.state = grow(
                self.experiment.comms, self.experiment, self.state, batch.rows, self.step
            )
        self.stepper = self.make(self.experiment)

    def _give_up(self, batch: Batch, report: StepReport) -> None:
        """End the run before what is not finite can be saved; keep the last good state."""
        number = self.step + 1
        with self._phase("saving a checkpoint", number, limit_s=600.0):
            history = f"{self.good.describe(self.state)} {self.good.save(self.folder, self.make)}"
        with self._phase("looking for NaN", number):
            raise_nonfinite(
                self.experiment.comms, self.experiment, self.state, batch, self.step, report,
                history,
            )  # fmt: skip

    def _validate(self) -> dict[str, float]:
        """Scores on the validation set, if they are due, and the best checkpoint."""
        if not self.validation.is_due(self.experiment, self.step):
            return {}
        with self._phase("validating", limit_s=600.0):
            scores = self.validation.score(self.experiment, self.state, self.step)
        if self.validation.is_best(self.experiment, self.step):
            self._compare()
            with self._phase("saving the best checkpoint", limit_s=600.0):
                self.validation.save_best(self.experiment, self.state, self.stepper, self.step)
        return scores

    def _after_step(
        self,
        taken: Taken,
        scores: Mapping[str, float],
        progress: Progress,
        spent: float,
        *,
        due: bool,
        last: bool,
    ) -> None:
        """Compare, report, record and save what is due after a step with these `scores`."""
        step, config, seconds = self.step, self.experiment.config, self.timers.seconds
        saved, every = due or last, config.run.compare_every
        if saved or (every and step % every == 0):
            self._compare()
        reported = step % config.output.log_every == 0 or last
        progress.advance(step)
        if reported or scores:
            progress.report(step, taken.report, seconds.steps[-1], scores)
        if self.records is not None:
            report = taken.report
            self.records.history.append(
                step,
                loss=float(report.loss),
                grad_norm=float(report.grad_norm),
                step_s=seconds.steps[-1],
                sweeps=(int(report.sweeps), int(report.adjoint_sweeps)),
            )
        # A gradient error that was found would else be lost: checks have a rhythm of their own.
        if self.records is not None and (reported or scores or taken.error is not None):
            times = {"step_s": seconds.steps[-1], "training_s": spent}
            self.records.append(step, **taken.numbers(), **scores, **times)
        if saved:
            began = time.perf_counter()
            if self.records is not None:
                self.records.history.write()  # first: a run that is resumed has all steps there
            with self._phase("saving a checkpoint", limit_s=600.0):
                watch = self.validation.watch
                save_run(self.experiment, self.folder, self.state, self.stepper, step, watch=watch)
                self.validation.note_saved(self.experiment)
            if self.records is not None:
                self.records.write_table(fingerprint=config.fingerprint())
            seconds.saving.append(time.perf_counter() - began)

    def _compare(self) -> None:
        """Make sure that all ranks hold the same parameters."""
        control = self.experiment.comms.control
        with self._phase("comparing parameters"):
            held = self.experiment.update.held_alike(self.state)
            require_same_values(control, held, self.step, self.equal_since)
        self.equal_since = self.step

    def _phase(self, name: str, step: int | None = None, **limit: float):
        """A phase of the watchdog's that all ranks are in, at this step unless given."""
        step = self.step if step is None else step
        return self.watchdog.phase(name, collective=True, step=step, **limit)


def open_records(
    comms: Comms,
    folder: Path,
    resume_step: int | None,
    opened: contextlib.ExitStack,
    config: Config,
    listeners: Listeners | None,
) -> tuple[Records | None, Scalars | None]:
    """Metrics, kept by rank 0, and their copy for TensorBoard; closed with `opened`.

    Callbacks, which rank 0 has, begin to listen to the metrics.
    """
    records = scalars = None
    with together(comms.control):
        if listeners is not None:
            opened.enter_context(listeners)
            listeners.start(config, folder, resumed=resume_step is not None)
            copies = [listeners.append]
            if config.output.tensorboard:
                scalars = opened.enter_context(Scalars(folder, resume_step=resume_step))
                copies.insert(0, scalars.append)

            def tell(record: Mapping[str, Any]) -> None:
                for copy in copies:
                    copy(record)

            records = opened.enter_context(Records(folder, resume_step=resume_step, copy_to=tell))
    return records, scalars
