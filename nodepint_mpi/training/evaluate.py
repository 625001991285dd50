"""Scores on a split, and predictions to look at."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from nodepint_mpi.build.imports import named_code, require_trust
from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.relaxation import with_propagators
from nodepint_mpi.core.sample_params import SamplePropagator
from nodepint_mpi.data.samples import Samples
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.io.checkpoint import load_checkpoint, require_fingerprint, require_finite
from nodepint_mpi.io.directory import Which, find_place, read_run
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.parallel.comms import Comms, TimeComm
from nodepint_mpi.parallel.dealing import own_part
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.training.error_control import kept_like
from nodepint_mpi.training.forward import make_evaluation, make_prediction
from nodepint_mpi.training.line_problem import LineProblem
from nodepint_mpi.training.setup import (
    Experiment,
    at_step,
    evaluated_params,
    make_problem,
    set_up,
    slice_rows,
)

BATCH = 500
N_SHOWN = {"labels": 24, "trajectories": 4}
PATHS_SHOWN = 64
"""Of each of these trajectories, if the model is stochastic."""


Split = Literal["test", "train", "valid"]
"""What a model is scored on."""
Scorer = Callable[[EncodeProcessDecode], dict[str, float]]


def evaluate(
    comms: Comms, experiment: Experiment, params: EncodeProcessDecode, *, split: Split = "test"
) -> dict[str, float]:
    """Loss and metrics over a whole split. Collective over `comms`; equal on all ranks.

    Raises:
        ConfigError: on all ranks, if there is no such split.
    """
    return make_scorer(comms, experiment, split)(params)


def make_scorer(comms: Comms, experiment: Experiment, split: Split) -> Scorer:
    """Make the function from parameters to loss and metrics over a whole split. Local.

    To call it is collective over `comms`; it compiles when it is first called.

    Raises:
        ConfigError: if there is no such split.
    """
    samples, problem = experiment.test, experiment.test_problem
    if split == "train":
        samples = experiment.train
        problem = make_problem(
            experiment.config, comms.time, experiment.model, samples, relaxed=False
        )
    elif split == "valid":
        if experiment.valid is None or experiment.valid_problem is None:
            raise ConfigError(
                "There is no validation set to evaluate on: the config of the run gives neither "
                "`data.valid_split` nor `data.valid_fraction`."
            )
        samples, problem = experiment.valid, experiment.valid_problem
    run = make_evaluation(problem)
    return lambda params: _score(run, params, samples, comms.time)[0]


def _score(
    run: Callable, params: EncodeProcessDecode, samples: Samples, comm: TimeComm
) -> tuple[dict[str, float], Any]:
    """Scores over all rows, and what was predicted of the first of them. Collective."""
    totals, first = {}, None
    for start, (own, counted) in enumerate(deal_rows(comm, samples.n_rows, BATCH)):
        means, seen = run(params, samples.take(own), counted)
        first = seen if start == 0 else first
        for name, mean in means.items():
            part, before = jax.tree.map(float, mean), totals.get(name)
            totals[name] = part if before is None else jax.tree.map(operator.add, before, part)
    return {name: total.value() for name, total in totals.items()}, first


def evaluate_and_draw(
    comms: Comms, experiment: Experiment, params: EncodeProcessDecode, folder: Path
) -> dict[str, float]:
    """Scores on the test split, as of `evaluate`, and predictions drawn by rank 0. Collective.

    One program gives both where the predictions are of the same paths as the scores.
    """
    samples, problem = experiment.test, experiment.test_problem
    same = experiment.predicts and problem.noise is None and not samples.differ
    if not same or comms.time.n_groups > 1:
        scores = evaluate(comms, experiment, params)
        save_predictions(comms, experiment, params, folder)
        return scores
    scores, seen = _score(make_evaluation(problem, predicts=True), params, samples, comms.time)
    save_predictions(comms, experiment, params, folder, seen)
    return scores


def deal_rows(comm: TimeComm, n_rows: int, size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Batches of rows for this group, and whether they count. Local; as many for every group.

    Groups have equal parts of every batch. What is left at the end all compute, to stay in step,
    but only the first one counts.
    """
    n_dealt = n_rows - n_rows % comm.n_groups
    size = max(size - size % comm.n_groups, comm.n_groups)
    for start in range(0, n_dealt, size):
        rows = np.arange(start, min(start + size, n_dealt))
        yield rows[own_part(comm, len(rows))], True
    if n_dealt < n_rows:
        yield np.arange(n_dealt, n_rows), comm.group == 0


def evaluate_run(
    folder: Path,
    comms: Comms,
    *,
    split: Split = "test",
    checkpoint: Which = None,
    trust: bool = False,
) -> dict[str, int | float]:
    """Scores of a checkpoint of a run, as of `open_run`. Collective over `comms`.

    Raises:
        NodepintError: on all ranks, if the run or its data cannot be read.
    """
    trained = open_run(folder, comms, checkpoint=checkpoint, trust=trust)
    scores = evaluate(comms, trained.experiment, trained.params, split=split)
    return {"step": trained.step, **scores}


class TrainedRun(NamedTuple):
    """A good checkpoint of a run, with the experiment it belongs to.

    `params` are averaged if the run averages them. `basis` is the one that the slices share, if the
    method keeps one from step to step.
    """

    experiment: Experiment
    step: int
    params: EncodeProcessDecode
    basis: np.ndarray | None


def open_run(
    folder: Path, comms: Comms, *, checkpoint: Which = None, trust: bool = False
) -> TrainedRun:
    """Set up the experiment of a run and load its parameters. Collective over `comms`.

    Args:
        folder: The run directory.
        comms: The run's communicators.
        checkpoint: "best", "last", a step or the path of a file; unless given the best one if the
            run keeps it apart, else the newest good one.
        trust: Import the code that the run's config names. Without, a config that names any is
            refused; with it, only after a checkpoint has shown that the config is the run's own.

    Raises:
        NodepintError: on all ranks, if the run, its data or a checkpoint cannot be read.
    """
    where = None
    with together(comms.control):
        config = read_run(folder)
        require_trust(config, folder, trust=trust)
        if comms.control.rank == 0:
            where = find_place(folder, config, checkpoint)
    where = comms.control.bcast(where)
    assert where is not None  # rank 0 has found it
    if comms.control.bcast(bool(named_code(config))):
        require_fingerprint(comms.control, where, config.fingerprint())
    return load_trained(set_up(config, comms), where)


def load_trained(experiment: Experiment, where: Path) -> TrainedRun:
    """Load parameters: a checkpoint, or the newest good one of a folder. Collective over its ranks.

    Raises:
        CheckpointError: on all ranks, if there is none that can be read and belongs to it.
    """
    comms = experiment.comms
    first, _ = slice_rows(experiment.config, comms.time)
    made = cache(lambda step: at_step(experiment, step - 1))
    loaded = load_checkpoint(
        comms.control,
        where,
        like_at=lambda step: kept_like(made(step)),
        dealt_at=lambda step: made(step).update.held.row_specs(),
        row_start=first,
        n_owned_rows=0,
        fingerprint=experiment.config.fingerprint(),
    )
    require_finite(loaded)
    experiment = made(loaded.step)
    state = experiment.update.held.restored(loaded.replicated, loaded.dealt)
    params = evaluated_params(experiment, state)
    basis = loaded.replicated.get("tracking", {}).get("basis")
    basis = None if basis is None else np.asarray(basis)
    return TrainedRun(experiment, loaded.step, params, basis)


class Paths(NamedTuple):
    """What was observed and what is predicted of some rows, (rows, times, ...), NaN where nothing
    is; `times` (times,), or (rows, times) where rows have their own."""

    times: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray


def place_predictions(
    samples: Samples, batch: SampleBatch, indices: np.ndarray, seen: np.ndarray
) -> Paths:
    """Predictions of one rank, (seen, samples, ...), at their observations. Local.

    Labels stay as they are.
    """
    targets = np.asarray(batch.targets)
    n_rows, n_times = targets.shape[:2]
    made = np.full((n_rows, n_times, *seen.shape[2:]), np.nan, seen.dtype)
    if batch.reads is None:
        made[:, indices] = np.moveaxis(seen, 0, 1)
    else:
        valid, columns = batch.reads.valid, batch.reads.columns
        rows = np.broadcast_to(np.arange(n_rows), valid.shape)
        made[rows[valid], columns[valid]] = seen[valid]
    if batch.mask is not None:
        targets = np.where(batch.mask, targets, np.nan)
    times = samples.times if samples.series is None else samples.series.times[batch.rows]
    return Paths(times, targets, made)


def problem_to_show(experiment: Experiment) -> LineProblem:
    """The problem of the test split, with `PATHS_SHOWN` paths a sample if it has noise. Local."""
    problem = experiment.test_problem
    if problem.noise is None:
        return problem
    noise = replace(problem.noise, n_paths=PATHS_SHOWN)
    solver = with_propagators(problem.solver, partial(SamplePropagator, noise=noise))
    return problem._replace(noise=noise, solver=solver)


def save_predictions(
    comms: Comms,
    experiment: Experiment,
    params: EncodeProcessDecode,
    folder: Path,
    known: Any = None,
) -> None:
    """Draw predictions for the first test samples. Collective over `comms`; rank 0 draws.

    `known` are this rank's predictions of at least these samples, if they are known already.
    """
    if not experiment.predicts:
        return
    samples, observations = experiment.test, experiment.test_problem.observations
    kind = "labels" if samples.section.times is None else "trajectories"
    batch = samples.take(np.arange(min(N_SHOWN[kind], samples.n_rows)))
    if known is None:
        known = make_prediction(problem_to_show(experiment))(params, batch)
    seen = np.asarray(known)[:, : len(batch.rows)]
    own = place_predictions(samples, batch, observations.indices, seen)
    gathered = comms.control.gather(own.predictions)  # of all groups, which agree
    with together(comms.control):
        if gathered is None:
            return
        # Here, so that ranks that draw nothing do not load matplotlib: 0.7 s.
        from nodepint_mpi.pages.figures import draw_labels, draw_trajectories, save_figure

        predictions = gathered[0]
        line = comms.time.size * comms.time.n_basis
        for part in gathered[1:line]:  # each rank has some of the times
            predictions = np.where(np.isnan(predictions), part, predictions)
        if kind == "labels":
            inputs = np.asarray(batch.initial)
            if inputs[0].ndim < 2:
                return  # vectors: nothing to look at
            guesses = np.argmax(predictions[:, 0], axis=-1)
            save_figure(draw_labels(inputs, own.targets[:, 0], guesses), folder / "predictions.png")
        else:
            trained = experiment.train.times[-1]
            figure = draw_trajectories(own.times, own.targets, predictions, trained)
            save_figure(figure, folder / "trajectories.png")
