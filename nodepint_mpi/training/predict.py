"""Predictions of a trained model for samples that are in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nodepint_mpi.build.noise import build_noise
from nodepint_mpi.build.trained import load_model
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.by_name import asked_for
from nodepint_mpi.core.partition import check_layout
from nodepint_mpi.data.made import columns_as_split
from nodepint_mpi.data.same_data import require_same_data
from nodepint_mpi.data.sample_checks import columns_of, series_of
from nodepint_mpi.data.samples import Samples, checked_samples
from nodepint_mpi.errors import ConfigError, DataError
from nodepint_mpi.io.directory import Which
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.names import hint
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.training.batch_model import ENCODER_TAKES, decode, encode, split_model
from nodepint_mpi.training.check_model import check_model
from nodepint_mpi.training.evaluate import BATCH, place_predictions
from nodepint_mpi.training.forward import make_prediction
from nodepint_mpi.training.line_problem import LineProblem
from nodepint_mpi.training.rank_samples import for_rank
from nodepint_mpi.training.setup import check_encoded, make_problem


class Predictions(NamedTuple):
    """What a model predicts, (samples, times, ...), and when.

    `times` are (times,), or (samples, times) where samples have their own. Rows with fewer times
    than others are filled up, with NaN in `values`.
    """

    times: np.ndarray
    values: np.ndarray


def predict(
    folder: Path,
    config: Config,
    columns: Mapping[str, Any],
    comms: Comms,
    *,
    checkpoint: Which = None,
    trust: bool = False,
    model: Any = None,
) -> Predictions:
    """See `nodepint_mpi.predict`. Collective over `comms`."""
    control = comms.control
    with together(control):
        check_layout(config.time.n_slices, comms.time.size)
        module = load_model(folder, checkpoint=checkpoint, trust=trust, model=model)
        samples = samples_of(config, columns, module)
    require_same_data(control, "`columns`", "given", samples.split, list(samples.split.columns))
    with together(control):
        samples = for_rank(samples, config, comms.time.size, comms.time.rank)
        check_model(module, samples, build_noise(config))
        check_encoded(config, module, samples)
        problem = make_problem(config, comms.time, module, samples, relaxed=False, scored=False)
    run, parts = make_prediction(problem), []
    times = samples.times if samples.series is None else samples.series.times
    params, _ = split_model(module)
    for start in range(0, samples.n_rows, BATCH):
        batch = samples.take(np.arange(start, min(start + BATCH, samples.n_rows)))
        seen = np.asarray(run(params, batch))
        own = place_predictions(samples, batch, problem.observations.indices, seen)
        values = own.predictions
        for part in control.allgather(values):  # each rank has some of the times
            values = np.where(np.isnan(values), part, values)
        parts.append(_with_first(values, own.times, problem, module, batch))
    return Predictions(np.asarray(times), np.concatenate(parts))


def _with_first(
    values: np.ndarray,
    times: np.ndarray,
    problem: LineProblem,
    model: EncodeProcessDecode,
    batch: SampleBatch,
) -> np.ndarray:
    """With what is decoded of the initial states, where samples are asked for at the beginning."""
    at_first = np.broadcast_to(times == problem.observations.owned.all_edges[0], values.shape[:2])
    if not at_first.any():
        return values
    initial = encode(model, batch, problem.seed)[None]
    first = np.asarray(decode(model, initial, batch, problem.seed))[0]
    if problem.noise is not None:
        first = np.asarray(problem.noise.spread(first))
    return np.where(
        at_first.reshape(*at_first.shape, *[1] * (values.ndim - 2)), first[:, None], values
    )


def samples_of(config: Config, columns: Mapping[str, Any], model: EncodeProcessDecode) -> Samples:
    """Samples of columns in memory, without what only a loss reads. Local.

    Raises:
        NodepintError: for columns that are missing, unknown or do not fit.
    """
    if config.data is None:
        raise ConfigError("The run's config has no section `[data]`.")
    reads_series = bool({"times", "mask"} & set(asked_for(model.encoder, 1, ENCODER_TAKES)))
    unused = {"weights": None}
    if not reads_series:
        unused |= {"mask": None}
    section = config.data.model_copy(update=unused)
    wanted = columns_of(section)
    for name in columns:
        if name not in columns_of(config.data):
            raise DataError(f"`columns` hold an unknown column {name!r}{hint(name, wanted)}")
    missing = [name for name in wanted if name not in columns]
    unread = not reads_series and section.target != section.encoded
    needed = [name for name in wanted if not (unread and name == section.target)]
    lacking = [name for name in missing if name in needed]
    if lacking:
        raise DataError(
            f"`columns` lack {', '.join(map(repr, lacking))}: the model needs "
            f"{', '.join(map(repr, needed))}."
        )
    given = {name: columns[name] for name in wanted if name in columns}
    if not reads_series and section.times is None:
        given.setdefault(section.target, np.zeros(len(given[section.encoded]), np.int32))
    elif not reads_series and section.times is not None:
        times = given[section.times]
        if section.input is not None:
            given[section.input] = _lengthened(given[section.input], times, section.input)
        if section.target != section.input:
            given[section.target] = [np.zeros((len(row), 1)) for row in times]
    split = columns_as_split(given, "`columns`", series_of(section))
    return checked_samples(split, config.model_copy(update={"data": section}))


def _lengthened(column: Any, times: Any, name: str) -> list[np.ndarray]:
    """The first entry of each row, and zeros for what nobody reads, as long as the times."""
    if len(column) != len(times):
        raise DataError(
            f"`columns` have {len(column)} rows of {name!r} and {len(times)} rows of times."
        )
    rows = []
    for row, own in zip(column, times, strict=True):
        row = np.asarray(row, float)
        filled = np.zeros((len(own), *row.shape[1:]))
        filled[:1] = row[:1]
        rows.append(filled)
    return rows
