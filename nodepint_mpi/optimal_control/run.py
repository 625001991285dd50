"""`nodepint control`: a control problem of a config, with its records and checkpoints."""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import math
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.build.user_code import load_code
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.controls import PiecewiseConstant
from nodepint_mpi.core.propagators import FixedSteps
from nodepint_mpi.errors import CheckpointError, NonFiniteError, OutputError
from nodepint_mpi.io.checkpoint import load_checkpoint, save_checkpoint
from nodepint_mpi.io.directory import (
    CHECKPOINTS,
    DONE,
    check_directory,
    config_text,
    log_to_file,
    start_directory,
    versions,
    write_text,
    writing_in,
)
from nodepint_mpi.io.errno_text import error_text
from nodepint_mpi.io.leaves import list_nonfinite, take_leaves
from nodepint_mpi.io.records import Records
from nodepint_mpi.optimal_control.control import Controlled, Task
from nodepint_mpi.optimal_control.from_config import build_task
from nodepint_mpi.optimal_control.optimize import NOT_FINITE
from nodepint_mpi.optimal_control.progress import Progress
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.profiling.timers import Seconds
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.ranks.devices import own_cores
from nodepint_mpi.ranks.machine import peak_bytes
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.ranks.watchdog import Watchdog
from nodepint_mpi.training.cadence import is_due
from nodepint_mpi.training.callbacks import Callback, Listeners, make_callbacks
from nodepint_mpi.training.runtime_errors import explained
from nodepint_mpi.training.sameness import require_same_code, require_same_values
from nodepint_mpi.training.scalars import require_tensorboard
from nodepint_mpi.training.setup import slice_rows
from nodepint_mpi.training.train import IMPORT_PATIENCE, open_records

TRAJECTORY = "trajectory.npz"
"""Times, states, controls and multipliers of the best control, in the run directory."""
MANY_TIMES = 1025
CHECKPOINT_EVERY = 10
"""Iterations between checkpoints where the config does not say; they are fewer and longer than
training steps."""

_log = logging.getLogger(__name__)


def steer_run(
    config: Config,
    folder: Path,
    comms: Comms,
    flag: StopFlag,
    *,
    resume: str | None = None,
    trust: bool = False,
    callbacks: tuple[Callback, ...] = (),
) -> dict[str, Any]:
    """Find the control, checkpoint, and write the trajectory. Collective over `comms`.

    Args:
        config: The experiment, equal on all ranks, with a section `[control]`.
        folder: The run directory.
        comms: The run's communicators, one line of ranks.
        flag: Asked to stop by a signal on any rank, the run checkpoints and returns early.
        resume: "auto" for the newest good checkpoint of `folder`, or the path of one.
        trust: Import the code that the config of a learned field's run names.
        callbacks: Told of the run on rank 0, besides those that the config names.

    Returns:
        What `--json` writes: status, cost, iterations, times. Equal on all ranks.

    Raises:
        NodepintError: on all ranks, for anything the user can fix.
    """
    control = comms.control
    with (
        explained(),
        Watchdog(control, limit_s=config.run.hang_timeout_s) as watchdog,
        contextlib.ExitStack() as opened,
    ):
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
            task = build_task(config, comms, trust=trust)
            blank = task.blank()
            progress = None if resume is None else _resume(config, folder, comms, blank, resume)
            places = control.allgather((socket.gethostname(), own_cores()))
            with together(control):
                if control.rank == 0:
                    if resume is None:  # nothing is made before all is set up
                        opened.enter_context(writing_in(folder, resume=False))
                    start_directory(folder, config, data_ranks=1, basis_ranks=1, places=places)
                    log_to_file(folder)
        done = 0 if progress is None else progress.n_total
        records, _ = open_records(
            comms, folder, None if progress is None else done, opened, config, listeners
        )
        run = Run(config, folder, comms, flag, blank, records, n_total=done)
        with watchdog.phase("finding the control", collective=True):
            found = task.take(run.after, progress)
            trajectory = None if run.is_stopped else sample_trajectory(task, found)
        with watchdog.phase("saving a checkpoint", collective=True, limit_s=600.0):
            run.save_last()
        result = run.result(found)
        if NOT_FINITE in found.status:
            raise NonFiniteError(
                f"Iteration {run.n_total + 1}: {found.status}. The control before it is in the "
                "newest checkpoint; lower `control.optim.learning_rate`, or take shorter steps."
            )
        with watchdog.phase("writing results", limit_s=120.0), together(control):
            if records is not None and trajectory is not None:
                _write_trajectory(folder / TRAJECTORY, trajectory)
                records.write_table(fingerprint=config.fingerprint(), config=config_text(config))
                write_text(folder / DONE, json.dumps(result, indent=1) + "\n")
        _log.info("%s", _last_words(result))
        if listeners is not None:
            listeners.finish(result)
        return result


@dataclasses.dataclass
class Run:
    """A control problem under way; told after each iteration, on every rank.

    `records` are kept by rank 0. `latest` gives what the next iteration begins with, None before
    the first and for ParaOpt.
    """

    config: Config
    folder: Path
    comms: Comms
    flag: StopFlag
    blank: Progress
    records: Records | None
    n_total: int = 0
    latest: Callable[[], Progress] | None = None
    is_stopped: bool = False
    saved: int | None = None
    first_cost: float | None = None
    seconds: Seconds = dataclasses.field(default_factory=lambda: Seconds([], []))
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def after(self, told: dict[str, Any], progress: Callable[[], Progress]) -> bool:
        """Record an iteration, save if that is due, and say whether to stop. Collective."""
        control, every = self.comms.control, self.config.output.checkpoint_every
        now = time.perf_counter()
        self.seconds.steps.append(now - self.began)
        of_paraopt = told["stage"] == "paraopt"
        self.latest = None if of_paraopt else progress
        self.n_total = self.n_total + 1 if of_paraopt else progress().n_total
        numbers = {name: value for name, value in told.items() if name != "stage"}
        cost = told.get("cost")
        self.first_cost = cost if self.first_cost is None else self.first_cost
        if self.n_total % self.config.output.log_every == 0:
            _log.info("%s", _describe(told))
        if self.records is not None:
            self.records.append(self.n_total, **numbers, step_s=self.seconds.steps[-1])
        self.is_stopped = self.flag.requested_anywhere(control) and not of_paraopt
        compare = self.config.run.compare_every
        due = is_due(control, every, self.n_total, self.seconds, usual=CHECKPOINT_EVERY)
        if due or self.is_stopped:
            self.save()
        elif compare and self.n_total % compare == 0:
            self._compare()
        self.began = time.perf_counter()
        return self.is_stopped

    def save_last(self) -> None:
        """Save what the last iteration ended with. Collective."""
        if not self.is_stopped:
            self.save()

    def save(self) -> None:
        """Save a checkpoint. Collective. ParaOpt has none: it takes tens of sweeps."""
        if self.latest is None:
            return
        began = time.perf_counter()
        self._compare()
        now, config = self.latest(), self.config
        replicated, rows = now.arrays(self.blank)
        first, _ = slice_rows(config, self.comms.time)
        save_checkpoint(
            self.comms.control, self.folder / CHECKPOINTS, step=now.n_total,
            replicated=replicated, rows=rows, row_start=first, n_rows=config.time.n_slices,
            meta={
                "fingerprint": config.fingerprint(), "config": config_text(config),
                "versions": versions(), "seed": config.run.seed, "progress": now.meta(),
            },
            keep=config.output.keep,
        )  # fmt: skip
        self.seconds.saving.append(time.perf_counter() - began)

    def _compare(self) -> None:
        """Make sure that all ranks hold the same control and model."""
        if self.latest is None:
            return
        now = self.latest()
        held = {"control": now.control, "args": now.args, "state": now.state}
        require_same_values(self.comms.control, held, self.n_total, self.saved)
        self.saved = self.n_total

    def result(self, found: Controlled) -> dict[str, Any]:
        """What `--json` writes. Collective."""
        control, gap = self.comms.control, np.asarray(found.gap)
        return {
            "status": "stopped" if self.is_stopped else "finished",
            "meaning": found.status,
            "step": self.n_total,
            "first_cost": self.first_cost,
            "cost": found.cost,
            "gap": float(np.max(np.abs(gap))) if gap.size else None,
            "loss": found.losses[-1] if found.losses else None,
            "n_evaluations": found.n_evaluations,
            "n_ranks": control.size,
            "n_parameters": sum(
                leaf.size
                for leaf in jax.tree.leaves(eqx.filter(found.control, eqx.is_inexact_array))
            ),
            "step_s": statistics.median(self.seconds.steps) if self.seconds.steps else None,
            "control_s": sum(self.seconds.steps),
            "saving_s": sum(self.seconds.saving),
            "peak_bytes": control.allgather(peak_bytes()),
            "run_directory": str(self.folder),
        }


def _describe(told: dict[str, Any]) -> str:
    shown = {name: told[name] for name in ("cost", "loss", "gap", "update") if name in told}
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in shown.items())
    return f"{told['stage']}, iteration {told['iteration']}: {numbers}"


def _last_words(result: dict[str, Any]) -> str:
    if result["status"] == "stopped":
        return "asked to stop: resume with `--resume auto`"
    return (
        f"cost {result['cost']:.9g} after {result['step']} iterations, {result['meaning']}; see "
        f"`nodepint report {result['run_directory']}`"
    )


# ---- Resuming ------------------------------------------------------------------------------------


def _resume(config: Config, folder: Path, comms: Comms, blank: Progress, resume: str) -> Progress:
    """Where a checkpoint has left off, on this number of ranks. Collective."""
    first, n_owned = slice_rows(config, comms.time)
    like, rows = blank.arrays(blank)
    loaded = load_checkpoint(
        comms.control, folder / CHECKPOINTS if resume == "auto" else Path(resume),
        like_at=lambda step: like, row_start=first, n_owned_rows=n_owned if rows else 0,
        fingerprint=config.fingerprint(), config=config_text(config),
    )  # fmt: skip
    wrong = list_nonfinite(take_leaves({"control": loaded.replicated["control"]}))
    if wrong:
        raise CheckpointError(f"{loaded.path}: {wrong} hold NaN or infinity; name an older one")
    _log.info("resumed from %s at iteration %d", loaded.path, loaded.step)
    try:
        return blank.resumed(loaded.replicated, loaded.rows, loaded.meta["progress"], loaded.step)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{loaded.path} does not say where the iterations were: {error!r}"
        ) from error


# ---- The trajectory ------------------------------------------------------------------------------


def sample_trajectory(task: Task, found: Controlled) -> dict[str, np.ndarray]:
    """States and controls at the ends of steps, no more than about a thousand. Collective.

    Of ParaOpt, which has steps of its own, states are those at the slice edges.

    Returns:
        `times` (times,), `states` (times, *samples, numbers), `control_times`, `controls` (times,
        *samples, n_controls); `edges`, and `multipliers` (edges, numbers) where there are any.
    """
    problem, edges = task.problem, task.problem.edges
    each = 8
    if isinstance(fine := problem.options["fine"], FixedSteps):
        each = math.gcd(fine.n_steps, max(1, (MANY_TIMES - 1) // (len(edges) - 1)))
        each = max(each, min(fine.n_steps, 8))
    times = np.concatenate(
        [np.linspace(a, b, each, endpoint=False) for a, b in itertools.pairwise(edges)]
        + [edges[-1:]]
    )
    by_paraopt = task.paraopt is not None and found.sweeps and len(found.sweeps) == 1
    if by_paraopt:
        states = found.states
    else:
        solution = problem.solve(
            found.control, found.model, ts=times, throw=False, check_ranks=False
        )
        assert solution.ys is not None  # times were given
        states = problem.states(solution.ys)
    of_one = jax.vmap(found.control)
    if problem.is_batch:
        of_one = jax.vmap(jax.vmap(found.control, in_axes=(None, 0)))
    at = times.copy()
    at[-1] = np.nextafter(at[-1], at[0])  # a jump at the end is not felt
    seen = found.states if by_paraopt else states
    sampled = {
        "times": edges if by_paraopt else times, "states": np.asarray(states),
        "control_times": edges if by_paraopt else times,
        "controls": np.asarray(found.controls if by_paraopt else of_one(jnp.asarray(at), seen)),
        "edges": np.asarray(edges),
    }  # fmt: skip
    if by_paraopt and isinstance(found.control, PiecewiseConstant):
        knots = np.asarray(found.control.times)
        sampled |= {"control_times": knots, "controls": np.asarray(found.control.values)}
    if found.multipliers is not None:
        sampled["multipliers"] = np.asarray(found.multipliers)
    return sampled


def _write_trajectory(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all. Local; rank 0 only."""
    content, partial = io.BytesIO(), path.with_name(path.name + ".partial")
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    try:
        partial.write_bytes(content.getvalue())
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error_text(error)}.") from error
