"""Samples as the training loop wants them: what is encoded, what is observed and when, and what
else each sample brings."""

from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from nodepint_mpi.config.data import DataSection
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.batch import (
    ReadSizes,
    SampleBatch,
    observe_at_edges,
    place_reads,
)
from nodepint_mpi.core.exogenous import cut_signal
from nodepint_mpi.core.partition import snap_times
from nodepint_mpi.data.datasets import (
    Split,
    batch_indices,
    held_out_rows,
    open_split_together,
)
from nodepint_mpi.data.same_data import require_same_data
from nodepint_mpi.data.sample_checks import (
    SeriesTimes,
    check_counted,
    check_rows,
    columns_of,
    entry_shape,
    known_inputs,
    observed,
    series_of,
)
from nodepint_mpi.errors import ConfigError, DataError
from nodepint_mpi.ranks.agreement import together


class Block(NamedTuple):
    """What one rank cuts out of the samples of a split, always in arrays of the same sizes.

    `sizes` is None where all samples are read at the same times, `relaxed` says that observations
    are interpolated to the slice edges here, and `n_knots` is zero without inputs.
    """

    edges: np.ndarray
    owned: range
    sizes: ReadSizes | None
    n_knots: int
    relaxed: bool
    dtype: Any

    @property
    def own_edges(self) -> np.ndarray:
        """Boundaries of the rank's slices."""
        return self.edges[self.owned.start : self.owned.stop + 1]


class Samples(NamedTuple):
    """One split of the data. `times` are the observation times of its targets.

    A labeled sample is observed once, at the end of the horizon. Where trajectories have times of
    their own these are in `series`, and `times` holds all that occur. `block` is what a rank cuts
    out of them.
    """

    split: Split
    section: DataSection
    times: np.ndarray
    series: SeriesTimes | None = None
    block: Block | None = None

    @property
    def n_rows(self) -> int:
        return self.split.n_rows

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch: its whole batches. Local."""
        return self.n_rows // (self.section.batch_size or self.n_rows)

    @property
    def n_left_out(self) -> int:
        """Rows that an epoch leaves out, others in each: those that fill no batch. Local."""
        return self.n_rows % (self.section.batch_size or self.n_rows)

    @property
    def differ(self) -> bool:
        """Whether samples have inputs, features or times of their own. Local."""
        section = self.section
        return not (self.series is None and section.inputs is None and section.static is None)

    @property
    def has_gaps(self) -> bool:
        """Whether a target may be an observation that was not made. Local."""
        section = self.section
        return not (self.series is None and section.mask is None and section.missing is None)

    def take(self, indices: np.ndarray, step: int | None = None) -> SampleBatch:
        """Samples by global row index, for optimizer step `step` if there is one. Local."""
        rows = np.asarray(indices)
        batch = self._take(rows)
        if step is not None:
            batch = batch._replace(step=np.asarray(step))
        return batch if self.block is None else self._cut(batch, rows, self.block)

    def _take(self, indices: np.ndarray) -> SampleBatch:
        """What does not depend on the rank."""
        section, split, rows = self.section, self.split, np.asarray(indices)
        targets, initial = split.take(section.target, rows), split.take(section.encoded, rows)
        numbers = rows.astype(np.int32)
        if section.times is None:
            batch = SampleBatch(initial, targets[:, None], rows=numbers)
        else:
            if section.initial is None:
                initial = initial[:, 0]
            if section.missing is not None:
                initial = np.nan_to_num(initial, nan=0.0)  # `check_first` refuses to encode these
            there = observed(split, section, rows)
            if there is not None:
                targets = np.where(there, targets, np.zeros((), targets.dtype))
            common = np.broadcast_to(self.times, (len(rows), len(self.times)))
            times = common if self.series is None else self.series.times[rows]
            batch = SampleBatch(initial, targets, there, times=times, rows=numbers)
        if section.weights is not None:
            weights = split.take(section.weights, rows).astype(float)
            shape = batch.targets.shape[:2]
            weights = np.broadcast_to(weights.reshape(len(rows), -1), shape)
            batch = batch._replace(weights=weights)
        if section.static is not None:
            static = split.take(section.static, rows).reshape(len(rows), -1).astype(float)
            batch = batch._replace(static=static)
        return batch

    def _cut(self, batch: SampleBatch, rows: np.ndarray, block: Block) -> SampleBatch:
        """With what a rank needs besides."""
        if self.series is not None and block.sizes is not None:
            lengths = self.series.lengths[rows]
            reads = place_reads(
                self.series.times[rows], lengths, block.edges, block.owned, block.sizes
            )
            batch = batch._replace(reads=reads._replace(times=reads.times.astype(block.dtype)))
        if block.n_knots:
            knots, values, lengths = known_inputs(self.split, self.section, rows)
            signal = cut_signal(
                snap_times(knots, block.edges), values, lengths, block.own_edges,
                self.section.interpolation, block.n_knots, block.dtype,
            )  # fmt: skip
            batch = batch._replace(signal=signal)
        if block.relaxed:
            seen = observe_at_edges(batch.times, batch.targets, batch.mask, block.edges)
            batch = batch._replace(at_edges=seen[0], known=seen[1])
        return batch

    def batch_rows(self, seed: int, step: int) -> np.ndarray:
        """Rows of the mini-batch of one optimizer step; all if no batch size is set. Local."""
        return batch_indices(seed, step, self.section.batch_size or self.n_rows, self.n_rows)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what the encoder gets of a sample."""
        section = self.section
        if section.times is None or section.initial is not None:
            return tuple(self.split.column(section.encoded).shape)
        return entry_shape(self.split, section.encoded)

    @property
    def n_inputs(self) -> int:
        """Channels of the inputs over time."""
        if self.section.inputs is None:
            return 0
        return int(np.prod(entry_shape(self.split, self.section.inputs)))

    @property
    def n_static(self) -> int:
        """Numbers a sample brings for the field."""
        if self.section.static is None:
            return 0
        return int(np.prod(self.split.column(self.section.static).shape))


class Splits(NamedTuple):
    """What is trained on, what is looked at meanwhile, if anything, and what is scored at the
    end."""

    train: Samples
    valid: Samples | None
    test: Samples


def open_splits(control: MPI.Intracomm, config: Config) -> Splits:
    """Open the splits of a config on all ranks and check them. Collective over `control`.

    Raises:
        DataError: on all ranks, if the data are missing, damaged or not what the config says.
        AgreementError: on all ranks, if they have opened different data.
    """
    section = config.data
    if section is None:
        raise ConfigError("Training needs a section `[data]`.")
    train, test = (
        _open(control, config, section, s) for s in (section.train_split, section.test_split)
    )
    valid = None
    if section.valid_split is not None:
        valid = _open(control, config, section, section.valid_split)
    with together(control):
        return hold_out(config, train, valid, test)


def hold_out(config: Config, train: Samples, valid: Samples | None, test: Samples) -> Splits:
    """The splits, with the rows that are held out for validation. Local.

    Raises:
        DataError: if there are too few rows to train on, or to hold out.
    """
    section = train.section
    if section.valid_fraction is not None:
        kept, held = held_out_rows(config.run.seed, section.valid_fraction, train.n_rows)
        train, valid = part_of_samples(train, kept), part_of_samples(train, held)
        for part, what in ((train, "trained on"), (valid, "held out for validation")):
            check_counted(part.split, section, what)
    check_batch(section, train.n_rows)
    return Splits(train, valid, test)


def part_of_samples(samples: Samples, rows: np.ndarray) -> Samples:
    """Some rows of a whole split that was checked, numbered anew. Local."""
    split, series = samples.split.part(rows), samples.series
    if series is None:
        return samples._replace(split=split)
    series = SeriesTimes(series.times[rows], series.lengths[rows])
    return samples._replace(split=split, series=series, times=_all_times(series))


def _open(control: MPI.Intracomm, config: Config, section: DataSection, split: str) -> Samples:
    """One split on all ranks, checked. Collective over `control`."""
    columns = columns_of(section)
    opened = open_split_together(control, section.source, split, columns, series_of(section))
    require_same_data(control, section.source, split, opened, columns)
    with together(control):
        return checked_samples(opened, config)


def checked_samples(split: Split, config: Config) -> Samples:
    """A split that can be trained on or scored. Local.

    Raises:
        NodepintError: for everything that is wrong with its rows; see `sample_checks`.
    """
    section = config.data
    assert section is not None  # the split is of it
    times = check_rows(split, config)
    if times is None:
        return Samples(split, section, np.array([config.time.horizon[1]]))
    if times.are_common:
        return Samples(split, section, times.times[0])
    return Samples(split, section, _all_times(times), times)


def _all_times(series: SeriesTimes) -> np.ndarray:
    """All times that occur. Local."""
    real = np.arange(series.times.shape[1]) < series.lengths[:, None]
    return np.unique(series.times[real])


def count_outputs(samples: Samples) -> int:
    """Classes of the labels, or components of an observation. Local."""
    section = samples.section
    if section.times is not None:
        return entry_shape(samples.split, section.target)[-1]
    whole = samples.split.whole  # a class may be held out with all its rows
    labels = whole.take(section.target, np.arange(whole.n_rows))
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise DataError(
            f"The target column {section.target!r} holds {labels.dtype} of shape "
            f"{labels.shape[1:]}; labels must be integers. For trajectories set `data.times`."
        )
    return int(labels.max()) + 1


def shapes_of_data(samples: Samples) -> dict[str, Any]:
    """What a network is made for, besides the config: see `build.trained.load_model`. Local."""
    return {
        "input_shape": list(samples.input_shape),
        "output_size": count_outputs(samples),
        "n_inputs": samples.n_inputs,
        "n_static": samples.n_static,
    }


def check_first(samples: Samples, begin: float) -> None:
    """Refuse to encode a first observation that was not made, or not at the beginning. Local.

    Args:
        samples: A split.
        begin: Of the horizon.

    Raises:
        DataError: with row, column, time and remedy.
    """
    section = samples.section
    if not samples.has_gaps or section.input is None:
        return
    starts = None if samples.series is None else samples.series.times[:, 0]
    if starts is not None and (starts > begin).any():
        late = np.flatnonzero(starts > begin)
        raise DataError(
            f"Row {samples.split.number(late[0])} of {section.times!r} begins at t = "
            f"{starts[late[0]]:g} ({len(late)} rows begin late), but the encoder turns the first "
            f"observation into the state at the beginning of the horizon, {begin:g}: count each "
            "row's time from its first observation, give initial states in a column of their own, "
            "`data.initial`, or an encoder that takes `times` and so reads the whole series."
        )
    rows = np.arange(samples.n_rows)
    there = observed(samples.split, section, rows) if section.input == section.target else None
    missing = np.zeros(samples.n_rows, bool)
    if there is not None:
        missing = ~there[:, 0].reshape(samples.n_rows, -1).all(axis=1)
    elif section.missing is not None:
        first = samples.split.take(section.input, rows)[:, 0]
        missing = np.isnan(first).reshape(samples.n_rows, -1).any(axis=1)
    if missing.any():
        raise DataError(
            f"The first observation in row {samples.split.number(np.argmax(missing))} of column "
            f"{section.input!r} is missing, and in {missing.sum()} rows in all, but the encoder "
            "gets the first one: give initial states in a column of their own, `data.initial`, or "
            "an encoder that takes `mask` and so reads the whole series."
        )


def check_batch(section: DataSection, n_rows: int) -> None:
    """Check that there are enough rows to train on for a batch. Local."""
    if section.batch_size is not None and section.batch_size > n_rows:
        left = "" if section.valid_fraction is None else " left by `data.valid_fraction`"
        raise DataError(
            f"`data.batch_size` is {section.batch_size}, but the split {section.train_split!r} "
            f"has {n_rows} samples{left}."
        )
