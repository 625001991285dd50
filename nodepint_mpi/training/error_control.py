"""Optimizer steps: solved anew each, or tracked with their gradient error under control.

A tracked step does one sweep each way and looks at the misfits. Where these promise a gradient
error above the bound it sweeps again at the same parameters, and at last takes the serial gradient.
What a misfit means for the gradient is learned from serial gradients taken on a schedule: the
error is taken to be proportional to the misfit times the norm of the cotangents, and to be no less
than the misfit relative to them.
"""

import logging
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.config.time import RelaxationSection, TrackingSection
from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.parallel.methods.base import no_carry
from nodepint_mpi.parallel.methods.serial import Serial
from nodepint_mpi.training.setup import Batch, Experiment
from nodepint_mpi.training.step import (
    Stepped,
    StepReport,
    make_tracked_step,
    make_train_step,
)
from nodepint_mpi.training.train_state import TrainState
from nodepint_mpi.training.warm_starts import WarmStarts

SAFETY = 1.5
"""The estimate is so much larger than what the last checks found."""
N_REMEMBERED = 5
"""Checks whose worst ratio of error to magnified misfit is taken."""
MISSED = 10
"""Steps in a row whose bound was missed after which serial steps follow."""
SERIAL_STEPS = 100
"""How many of these, before tracking is tried again."""

_log = logging.getLogger(__name__)


class Taken(NamedTuple):
    """A step done: the new state, and numbers on the host; all but `tally` equal on all ranks.

    `gradient` is what the update was made with, `estimate` its expected relative error, `error` the
    one found where the serial gradient was taken, None where there is none. `serial` says whether
    the update was made with the serial gradient. `tally` is what this rank did.
    """

    state: TrainState
    report: StepReport
    gradient: PyTree[Array]
    tally: Tally
    estimate: float | None = None
    error: float | None = None
    serial: bool = False

    def numbers(self) -> dict[str, Any]:
        """What is recorded. Local."""
        found = {"gradient_error_estimate": self.estimate, "gradient_error": self.error}
        own = {"fine_solves": self.tally.fine, "tangents": self.tally.tangents}
        known = {k: v for k, v in found.items() if v is not None and np.isfinite(v)}
        return self.report._asdict() | own | known


class _Control(NamedTuple):
    """What steers tracking: ratios of error to magnified misfit in the last checks, steps missed in
    a row, and the step until which steps are serial."""

    ratios: np.ndarray
    missed: np.ndarray
    serial_until: np.ndarray

    @staticmethod
    def first() -> "_Control":
        return _Control(np.zeros(N_REMEMBERED), np.array(0), np.array(0))


class Anew:
    """Steps that keep nothing from one to the next; see `training.step.make_train_step`."""

    def __init__(self, step: Any, relaxation: RelaxationSection | None):
        self._step, self._relaxation = step, relaxation

    def take(self, state: TrainState, batch: Batch, step: int) -> Taken:
        """Take optimizer step `step`. Collective over the grid."""
        weight = _weight(self._relaxation, step)
        stepped = self._step(state, batch.data, weight)
        report, tally = _on_host(stepped)
        return Taken(stepped.state, report, stepped.gradient, tally)

    def n_compiled(self) -> int:
        """How often the step has been compiled. Local."""
        return self._step._cache_size()

    def kept(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a checkpoint holds: what is equal on all ranks, and rows by slice. Local."""
        return {}, {}

    def restore(self, replicated: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
        """Go on from `kept`. Local."""
        del replicated, rows


class Tracker:
    """Steps that start from what the last ones left; see `parallel.warm_start`."""

    def __init__(self, experiment: Experiment, section: TrackingSection):
        problem, update = experiment.train_problem, experiment.update
        serial = eqx.tree_at(lambda solver: solver.method, problem.solver, Serial())
        self._section, self._relaxation = section, experiment.config.time.relaxation
        self._sweep: Any = make_tracked_step(problem, update)
        self._serial = make_train_step(problem._replace(solver=serial), update)
        self._store = WarmStarts(experiment, section)
        self._update = update
        self._control = _Control.first()

    def take(self, state: TrainState, batch: Batch, step: int) -> Taken:
        """Take optimizer step `step`. Collective over the grid."""
        weight = _weight(self._relaxation, step)
        rows, data = batch
        if step < self._control.serial_until:
            stepped = self._serial(state, data, weight)
            report, tally = _on_host(stepped)
            return Taken(stepped.state, report, stepped.gradient, tally, serial=True)
        section = self._section
        carry, n_sweeps, tally = self._store.take(rows), 0, Tally()
        while True:
            swept = self._sweep(state, carry, data, weight)
            report, done = _on_host(swept)
            carry, n_sweeps, tally = swept.carry, n_sweeps + 1, tally.plus(done)
            misfit = float(report.jump + report.adjoint_residual)
            magnified = misfit * float(swept.magnification)
            estimate = max(misfit, SAFETY * float(np.max(self._control.ratios)) * magnified)
            finite = bool(report.finite) and np.isfinite(estimate)
            if estimate <= section.bound or n_sweeps == section.max_sweeps or not finite:
                break
        self._store.put(rows, carry if finite else no_carry())
        report = report._replace(sweeps=np.array(n_sweeps), adjoint_sweeps=np.array(n_sweeps))
        within = finite and estimate <= section.bound
        if within and not (section.check_every and step % section.check_every == 0):
            self._control = self._control._replace(missed=np.array(0))
            return Taken(swept.state, report, swept.gradient, tally, estimate)
        exact = self._serial(state, data, weight)
        error = self._error(swept.gradient, exact.gradient)
        if np.isfinite(error) and magnified > 0:
            ratios = np.append(self._control.ratios[1:], error / magnified)
            self._control = self._control._replace(ratios=ratios)
        if not within:
            self._count_missed(step, estimate if finite else None, n_sweeps)
        elif error > section.bound:
            _log.warning(
                "step %d: the gradient's error is %.1e, above the bound %.1e and the estimate "
                "%.1e; estimates are raised", step + 1, error, section.bound, estimate,
            )  # fmt: skip
        whole, done = _on_host(exact)
        if finite:
            exact_numbers = ("loss", "grad_norm", "finite")
            report = report._replace(**{name: getattr(whole, name) for name in exact_numbers})
        else:  # what was swept is of no use: the numbers are those of the serial solve
            swept_counts = {"sweeps": report.sweeps, "adjoint_sweeps": report.adjoint_sweeps}
            report = whole._replace(**swept_counts)
        tally = tally.plus(done)
        return Taken(exact.state, report, exact.gradient, tally, estimate, error, serial=True)

    def _error(self, found: PyTree[Array], wanted: PyTree[Array]) -> float:
        """Of a gradient of which every rank has its pieces. Collective over the grid."""
        return relative_error(*(self._update.whole_params(part) for part in (found, wanted)))

    def n_compiled(self) -> int:
        """How often the sweep has been compiled. Local."""
        return self._sweep._cache_size()

    def kept(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a checkpoint holds: what is equal on all ranks, and rows by slice. Local."""
        replicated, rows = self._store.kept()
        return {"tracking": self._control._asdict() | replicated}, rows

    def restore(self, replicated: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
        """Go on from `kept`. Local."""
        kept = replicated["tracking"]
        self._control = _Control(*(kept[name] for name in _Control._fields))
        self._store.restore({k: v for k, v in kept.items() if k not in _Control._fields}, rows)

    def _count_missed(self, step: int, estimate: float | None, n_sweeps: int) -> None:
        """Say that a step fell back, without an estimate if it is not finite; after many, that
        serial steps follow."""
        missed = self._control.missed + 1
        self._control = self._control._replace(missed=missed)
        if estimate is None:
            _log.info(
                "step %d: sweep %d gave numbers that are not finite: serial gradient",
                step + 1, n_sweeps,
            )  # fmt: skip
        else:
            _log.info(
                "step %d: expected gradient error %.1e above %.1e after %d sweeps: serial gradient",
                step + 1, estimate, self._section.bound, n_sweeps,
            )  # fmt: skip
        if missed >= MISSED:
            until = np.array(step + 1 + SERIAL_STEPS)
            self._control = self._control._replace(missed=np.array(0), serial_until=until)
            _log.warning(
                "tracking missed its bound %d steps in a row: the next %d steps are serial; a "
                "finer `time.coarse`, a smaller learning rate or more `max_sweeps` may help",
                MISSED, SERIAL_STEPS,
            )  # fmt: skip


Stepper = Anew | Tracker
"""What takes optimizer steps."""


def make_stepper(experiment: Experiment) -> Stepper:
    """What takes the steps that the config asks for. Local."""
    section = _section(experiment)
    if section is not None:
        return Tracker(experiment, section)
    step = make_train_step(experiment.train_problem, experiment.update)
    return Anew(step, experiment.config.time.relaxation)


def kept_like(experiment: Experiment) -> dict[str, PyTree]:
    """What a checkpoint holds once, in shapes and types: the frame to load one into. Local."""
    like: dict[str, PyTree] = experiment.update.held.like()
    if _section(experiment) is not None:
        carry = experiment.method.carry_like(1, experiment.state)
        like["tracking"] = _Control.first()._asdict() | carry.replicated
    return like


def _section(experiment: Experiment) -> TrackingSection | None:
    return experiment.config.time.tracking if experiment.method.iterates else None


def _weight(section: RelaxationSection | None, step: int) -> np.ndarray | None:
    """Of continuity in a step; None where it is never relaxed."""
    return None if section is None else np.asarray(section.weight_at(step))


def _on_host(stepped: Stepped) -> tuple[StepReport, Tally]:
    report, tally = jax.device_get((stepped.report, stepped.tally))
    return StepReport(*report), Tally(*tally.tolist())


def relative_error(found: PyTree[Array], wanted: PyTree[Array]) -> float:
    """Of a gradient, in the norm over all parameters; NaN if either is not finite. Local."""
    ours, exact = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])
        for tree in (found, wanted)
    )
    if not (np.all(np.isfinite(ours)) and np.all(np.isfinite(exact))):
        return float("nan")
    largest = np.max(np.abs(exact), initial=0.0)  # by which all is divided: squares overflow
    if largest == 0:
        return 0.0
    norm = np.linalg.norm(exact / largest)
    with np.errstate(over="ignore"):  # ours may be larger by any factor
        return float(np.linalg.norm(ours / largest - exact / largest) / norm)
