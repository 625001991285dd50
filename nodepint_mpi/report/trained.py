"""What a trained model makes of the test split: what the sections about it are drawn from."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from nodepint_mpi.build.model import build_edges
from nodepint_mpi.core.by_name import asked_for
from nodepint_mpi.io.directory import Which
from nodepint_mpi.models.networks import LinearMap
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.rom.evaluate import full_model, load_rom_of, run_batch
from nodepint_mpi.rom.load import stepper_of
from nodepint_mpi.rom.model import ReducedModel
from nodepint_mpi.training.batch_model import ENCODER_TAKES
from nodepint_mpi.training.evaluate import (
    BATCH,
    N_SHOWN,
    TrainedRun,
    evaluate,
    open_run,
    place_predictions,
    problem_to_show,
)
from nodepint_mpi.training.forward import make_prediction

N_STATES = 1000
"""States of test samples that are looked at, about."""


class Predicted(NamedTuple):
    """The test split and what the model of a checkpoint makes of it.

    `targets` and `predictions` have axes (samples, times, ...); labels have one time. Of labels the
    predictions are logits. What was not observed, or is not predicted, is NaN. `times` are those of
    all samples, (times,), or (samples, times) where they have their own, in the problem's unit;
    `trained_until` is the last time of the training split. `snapshots` are flattened states of some
    test samples over the horizon, (snapshots, entries).
    """

    step: int
    is_labels: bool
    inputs: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    times: np.ndarray
    trained_until: float
    scores: dict[str, float]
    snapshots: np.ndarray
    bases: dict[str, np.ndarray]
    """Bases of these states, by what they are: rows (directions, entries), all in use."""
    paths: np.ndarray | None = None
    """Of a stochastic model: many paths of the first samples, (samples, times, paths, ...); then
    `predictions` are means over the paths that the run has of a sample."""


class Reduced(NamedTuple):
    """A reduced model and its file."""

    rom: ReducedModel
    file: Path


class Model(NamedTuple):
    """All that sections about the model need; `predicted` is None if there are no predictions."""

    trained: TrainedRun
    scores: dict[str, float]
    predicted: Predicted | None
    reduced: Reduced | None


def look_at_model(
    folder: Path,
    comms: Comms,
    rom_file: Path | None,
    *,
    checkpoint: Which = None,
    trust: bool = False,
) -> Model:
    """Load a checkpoint (see `open_run`) and predict the test split. Local: `comms` is of one rank.

    Raises:
        NodepintError: if the run, its data, a checkpoint or the reduced model cannot be read.
    """
    reduced = (
        None if rom_file is None else Reduced(load_rom_of(folder, rom_file, trust=trust), rom_file)
    )
    trained = open_run(folder, comms, checkpoint=checkpoint, trust=trust)
    scores = evaluate(comms, trained.experiment, trained.params)
    predicted = None
    if trained.experiment.predicts:
        predicted = _predict(trained, reduced, scores)
    return Model(trained, scores, predicted, reduced)


def _predict(trained: TrainedRun, reduced: Reduced | None, scores: dict[str, float]) -> Predicted:
    experiment, problem = trained.experiment, trained.experiment.test_problem
    samples = experiment.test
    predict, parts, truths = make_prediction(problem), [], []
    size = min(BATCH, samples.n_rows)
    for start in range(0, samples.n_rows, size):  # the last one filled up: compiled once
        rows = np.minimum(np.arange(start, start + size), samples.n_rows - 1)
        kept = min(size, samples.n_rows - start)
        batch = samples.take(rows)
        seen = np.asarray(predict(trained.params, batch))
        placed = place_predictions(samples, batch, problem.observations.indices, seen)
        parts.append(placed.predictions[:kept])
        truths.append(placed.targets[:kept])
    predictions, targets = np.concatenate(parts), np.concatenate(truths)
    if problem.noise is not None and problem.noise.n_paths is not None:
        predictions = np.mean(predictions, axis=2)
    paths = None
    if problem.noise is not None:
        batch = samples.take(np.arange(min(N_SHOWN["trajectories"], samples.n_rows)))
        seen = np.asarray(make_prediction(problem_to_show(experiment))(trained.params, batch))
        paths = place_predictions(samples, batch, problem.observations.indices, seen).predictions
    times, is_labels = samples.times, samples.section.times is None
    if samples.series is None:  # the first observation may not be predicted
        order = np.asarray(problem.observations.indices)
        predictions, targets, times = predictions[:, order], targets[:, order], times[order]
        paths = None if paths is None else paths[:, order]
    else:
        times = samples.series.times
    snapshots, bases = _look_at_states(trained, reduced)
    return Predicted(
        step=trained.step,
        is_labels=is_labels,
        inputs=np.asarray(samples.take(np.arange(samples.n_rows)).initial),
        targets=targets,
        predictions=predictions,
        times=times,
        trained_until=float(experiment.train.times[-1]),
        scores=scores,
        snapshots=snapshots,
        bases=bases,
        paths=paths,
    )


def _look_at_states(
    trained: TrainedRun, reduced: Reduced | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """States of some test samples over the horizon, and the bases there are for them."""
    samples, config = trained.experiment.test, trained.experiment.config
    times = build_edges(config.time) if samples.section.times is None else samples.times
    n_samples = min(32, samples.n_rows, max(1, N_STATES // len(times)))
    if (
        config.noise is not None
        or samples.differ
        or asked_for(trained.params.encoder, 1, ENCODER_TAKES)
    ):
        return np.zeros((0, 1)), {}  # a state is not a function of an observation and time
    batch = samples.take(np.arange(n_samples))
    inputs, targets = np.asarray(batch.initial), np.asarray(batch.targets)
    encoder = trained.params.encoder
    if isinstance(encoder, LinearMap):  # its rows are a basis of what is observed
        rows = np.asarray(encoder.matrix, np.float64)
        learned = np.linalg.qr(rows.T)[0].T
        return targets.reshape(-1, rows.shape[1]).astype(np.float64), {"learned basis": learned}
    ts = np.asarray(times, dtype=float)
    states = run_batch(full_model(trained, stepper_of(config)).states, inputs, ts)
    snapshots = states.reshape(len(inputs) * len(times), -1).astype(np.float64)
    bases = {}
    section = config.time.basis
    if trained.basis is not None and section is not None:
        rows = trained.basis.reshape(len(trained.basis), -1).astype(np.float64)
        name = f'basis of the slices ("{section.kind}"), newest directions first'
        bases[name] = rows[np.any(rows != 0, axis=1)]
    if reduced is not None:
        rows = np.asarray(reduced.rom.basis, np.float64)
        bases["basis of the reduced model"] = rows.reshape(len(rows), -1)
    return snapshots, {name: rows for name, rows in bases.items() if len(rows)}
