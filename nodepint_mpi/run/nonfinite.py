"""Where a step that gave NaN or infinity first did so.

Looked for once, after it has happened: the step's batch and parameters are still there, and are
walked through serially, slice after slice and back.
"""

import socket
from typing import NamedTuple

import numpy as np

from nodepint_mpi.errors import NonFiniteError
from nodepint_mpi.io.leaves import take_leaves
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.run.build_model import build_edges
from nodepint_mpi.run.setup import Batch, Experiment, slice_rows
from nodepint_mpi.run.step import StepReport, TrainState, make_walk

REMEDY = (
    "Resume from the last checkpoint with a smaller `optim.learning_rate`, set `optim.clip_norm`, "
    "or take more steps in `time.fine`."
)


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
) -> None:
    """Say where a step became non-finite. Collective over `comms`; compiles one program.

    Args:
        comms: The run's communicators.
        experiment: As the step was taken with.
        state: As it was before the step.
        batch: Of the step.
        step: Its number, counted from 0.
        report: Its numbers.

    Raises:
        NonFiniteError: on all ranks, with slice, rank and host.
    """
    looks = comms.control.allgather(_look(comms, experiment, state, batch, step))
    raise NonFiniteError(
        f"Step {step}: the loss is {float(report.loss):g}, the gradient's norm "
        f"{float(report.grad_norm):g}, the largest jump {float(report.jump):g}. "
        f"{_explain(looks, build_edges(experiment.config.time))} {REMEDY}"
    )


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
    found = make_walk(experiment.train_problem)(state.params, batch.inputs, batch.targets, weight)
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
        "The serial solution of this batch and its gradient are finite: it is the sweeps that "
        'diverged. Take more steps in `time.coarse` or more slices, or `time.method = "serial"`.'
    )
