"""Where a step that gave NaN or infinity first did so, and what led to it.

Looked for once, after it has happened: the step's batch and parameters are still there, and are
walked through serially, slice after slice and back.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from nodepint_mpi.build.model import build_edges
from nodepint_mpi.errors import NonFiniteError, OutputError
from nodepint_mpi.io.checkpoint_folder import checkpoint_path
from nodepint_mpi.io.directory import CHECKPOINTS
from nodepint_mpi.io.leaves import take_leaves
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.training.error_control import Stepper
from nodepint_mpi.training.forward import make_walk
from nodepint_mpi.training.saving import save_run
from nodepint_mpi.training.setup import Batch, Experiment, slice_rows
from nodepint_mpi.training.step import StepReport
from nodepint_mpi.training.train_state import TrainState
from nodepint_mpi.training.watch import Watch

REMEDY = (
    "Start a new run with a smaller `optim.learning_rate`, with `optim.warmup_steps` or "
    "`optim.clip_norm`, or with more steps in `time.fine`."
)
N_REMEMBERED = 4
"""Steps whose loss is in the message."""
RISE = 2.0
"""A training whose loss has risen by this factor over the remembered steps has diverged."""


class LastGood:
    """The state that the last finite step began with, and the losses that led to it. Local.

    The state *after* that step is not known to be good: the next one is taken with it.
    """

    def __init__(self) -> None:
        self._began: tuple[Experiment, TrainState, int, Watch | None] | None = None
        self._losses: list[tuple[int, float, float]] = []

    def note(
        self,
        experiment: Experiment,
        state: TrainState,
        step: int,
        report: StepReport,
        watch: Watch | None = None,
    ) -> None:
        """Remember the finite step taken with `state`, after which `step` steps are done.

        `watch` is what the validations had come to before it.
        """
        self._began = experiment, state, step - 1, watch
        self._losses.append((step, float(report.loss), float(report.grad_norm)))
        del self._losses[:-N_REMEMBERED]

    def describe(self, state: TrainState) -> str:
        """What the last finite steps were like, and how far the last of them went to `state`."""
        if self._began is None:
            return "It is the first step of this start."
        before = jax.device_get(jax.tree.leaves(self._began[1].params))
        after = jax.device_get(jax.tree.leaves(state.params))
        if [leaf.shape for leaf in before] == [leaf.shape for leaf in after]:
            old = np.concatenate([np.ravel(leaf).astype(float) for leaf in before])
            new = np.concatenate([np.ravel(leaf).astype(float) for leaf in after])
            moved = f" Step {self._losses[-1][0]} changed the parameters by "
            moved += f"{_norm(new - old):.3g}; their norm was {_norm(old):.3g}."
        else:
            moved = ""
        losses = [loss for _, loss, _ in self._losses]
        what = "The training diverged" if losses[-1] > RISE * min(losses) else "Before it"
        each = ", ".join(
            f"step {step} had loss {loss:.4g} and gradient norm {norm:.3g}"
            for step, loss, norm in self._losses
        )
        return f"{what}: {each}.{moved}"

    def save(self, folder: Path, make: Callable[[Experiment], Stepper]) -> str:
        """Save the state, unless it has been saved. Collective over the run's ranks.

        Returns:
            A sentence that says where it is.
        """
        if self._began is None:
            return "No step of this start was finite: it saved no checkpoint."
        experiment, state, step, watch = self._began
        path = checkpoint_path(folder / CHECKPOINTS, step)
        control = experiment.comms.control
        if not control.bcast(path.exists() if control.rank == 0 else None):
            try:
                save_run(experiment, folder, state, make(experiment), step, watch=watch)
            except OutputError as error:
                return f"The last good parameters could not be saved: {error}"
        return f"{path} has the parameters with which the last finite step began."


class _Look(NamedTuple):
    """What one rank has found: its host, its slices, and what is not finite there."""

    host: str
    slices: range
    bad_params: list[str]
    initial: bool
    ends: list[bool]
    loss: bool
    cotangent: bool


def raise_nonfinite(
    comms: Comms,
    experiment: Experiment,
    state: TrainState,
    batch: Batch,
    step: int,
    report: StepReport,
    history: str = "",
) -> None:
    """Say where a step became non-finite. Collective over `comms`; compiles one program.

    Args:
        comms: The run's communicators.
        experiment: As the step was taken with.
        state: As it was before the step.
        batch: Of the step.
        step: Optimizer steps done before it; the message counts from 1, as the log does.
        report: Its numbers.
        history: Sentences on the steps before it and on what has been saved.

    Raises:
        NonFiniteError: on all ranks, with slice, rank and host.
    """
    looks = comms.control.allgather(_look(comms, experiment, state, batch, step))
    raise NonFiniteError(
        f"Step {step + 1}: the loss is {float(report.loss):g}, the gradient's norm "
        f"{float(report.grad_norm):g}, the largest jump {float(report.jump):g}. "
        f"{_explain(looks, build_edges(experiment.config.time))}"
        f"{f' {history}' if history else ''} {REMEDY}"
    )


def _norm(values: np.ndarray) -> float:
    """The Euclidean norm, which does not overflow before the values do."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest == 0 or not np.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(values / largest))


def _look(
    comms: Comms,
    experiment: Experiment,
    state: TrainState,
    batch: Batch,
    step: int,
) -> _Look:
    config = experiment.config
    relaxation = config.time.relaxation
    weight = None if relaxation is None else np.asarray(relaxation.weight_at(step))
    found = make_walk(experiment.train_problem)(state.params, batch.data, weight)
    params = take_leaves(state.params).items()
    first, n_owned = slice_rows(config, comms.time)
    return _Look(
        socket.gethostname(),
        range(first, first + n_owned),
        [name for name, values in params if not np.all(np.isfinite(values))],
        bool(found.initial),
        np.asarray(found.ends).tolist(),
        bool(found.loss),
        bool(found.cotangent),
    )


def _explain(looks: list[_Look], edges: np.ndarray) -> str:
    """In the order in which a step computes: parameters, encoder, slices, loss, adjoint. Local."""

    def held(rank: int) -> str:
        slices = looks[rank].slices
        which = f"slice {slices[0]}" if len(slices) == 1 else f"slices {slices[0]} to {slices[-1]}"
        return f"{which} (of 0 to {len(edges) - 2}) on rank {rank} on {looks[rank].host}"

    if looks[0].bad_params:
        return f"The parameters were not finite before it, first {looks[0].bad_params[0]}."
    for rank, look in enumerate(looks):
        if look.slices[0] == 0 and not look.initial:
            return f"The encoder gave a state that is not finite, on rank {rank} on {look.host}."
    for rank, look in enumerate(looks):
        for n, finite in zip(look.slices, look.ends, strict=True):
            if not finite:
                return (
                    f"The state first became non-finite in slice {n} (of 0 to {len(edges) - 2}; t "
                    f"from {edges[n]:g} to {edges[n + 1]:g}) on rank {rank} on {look.host}."
                )
    bad = next((rank for rank, look in enumerate(looks) if not look.loss), None)
    if bad is not None:
        return f"All states are finite, but not the loss of what is observed in {held(bad)}."
    bad = next((r for r in reversed(range(len(looks))) if not looks[r].cotangent), None)
    if bad is not None:
        return f"All states are finite; going back, cotangents first were not in {held(bad)}."
    return (
        "The serial solution of this batch and its gradient are finite: the sweeps "
        'diverged. Use more steps in `time.coarse` or more slices, or `time.method = "serial"`.'
    )
