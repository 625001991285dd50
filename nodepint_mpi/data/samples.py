"""Samples as the training loop wants them: inputs, targets, and when the targets are observed."""

from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from nodepint_mpi.build.model import build_edges
from nodepint_mpi.config.experiment import Config, DataSection
from nodepint_mpi.core.observations import place_observations
from nodepint_mpi.data.datasets import Split, batch_indices, check_finite, open_split_together
from nodepint_mpi.data.same_data import require_same_data
from nodepint_mpi.errors import ConfigError, DataError
from nodepint_mpi.ranks.agreement import together


class Samples(NamedTuple):
    """One split of the data. `times` are the observation times of its targets.

    A labeled sample is observed once, at the end of the horizon. A trajectory's input is its
    first observation.
    """

    split: Split
    section: DataSection
    times: np.ndarray

    @property
    def n_rows(self) -> int:
        return self.split.n_rows

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (samples, ...) and targets (samples, times, ...) by global row index. Local."""
        targets = self.split.take(self.section.target, indices)
        if self.section.times is None:
            return self.split.take(self.section.input, indices), targets[:, None]
        return self.split.take(self.section.input, indices)[:, 0], targets

    def batch_rows(self, seed: int, step: int) -> np.ndarray:
        """Rows of the mini-batch of one optimizer step; all if no batch size is set. Local."""
        return batch_indices(seed, step, self.section.batch_size or self.n_rows, self.n_rows)

    @property
    def input_shape(self) -> tuple[int, ...]:
        shape = tuple(self.split.column(self.section.input).shape)
        return shape if self.section.times is None else shape[1:]


def open_samples(control: MPI.Intracomm, config: Config, split: str) -> Samples:
    """Open one split on all ranks and check it. Collective over `control`.

    Raises:
        DataError: on all ranks, if the data are missing, damaged or not what the config says.
        AgreementError: on all ranks, if they have opened different data.
    """
    section = config.data
    if section is None:
        raise ConfigError("Training needs a section `[data]`.")
    columns = _columns(section)
    opened = open_split_together(control, section.source, split, list(dict.fromkeys(columns)))
    require_same_data(control, section.source, split, opened, columns)
    with together(control):
        times = check_samples(opened, config)
        if split == section.train_split:
            check_batch(section, opened.n_rows)
    return Samples(opened, section, times)


def count_outputs(samples: Samples) -> int:
    """Classes of the labels, or components of an observation. Local."""
    column = samples.split.column(samples.section.target)
    if samples.section.times is not None:
        return column.shape[-1]
    labels = samples.split.take(samples.section.target, np.arange(samples.n_rows))
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise DataError(
            f"The target column {samples.section.target!r} holds {labels.dtype} of shape "
            f"{labels.shape[1:]}; labels must be integers. For trajectories set `data.times`."
        )
    return int(labels.max()) + 1


def common_times(split: Split, section: DataSection) -> np.ndarray:
    """The observation times, which all trajectories of a split share. Local."""
    assert section.times is not None  # the caller asks only then
    times = split.take(section.times, np.arange(split.n_rows))
    if times.ndim != 2:
        raise DataError(f"The column {section.times!r} must hold a list of times in every row.")
    for name in (section.input, section.target):
        if len(split.column(name).shape) != 2 or split.column(name).shape[0] != times.shape[1]:
            raise DataError(
                f"The column {name!r} has rows of shape {split.column(name).shape}; it must hold "
                f"a vector for each of the {times.shape[1]} times in {section.times!r}."
            )
    differing = np.argwhere(times != times[:1])
    if len(differing):
        row, place = differing[0]
        raise DataError(
            f"The rows of {section.times!r} differ: observation {place} (from 0) is at "
            f"{times[row, place]:g} in row {row} and at {times[0, place]:g} in row 0. All "
            "trajectories of a split must be observed at the same times: interpolate them to "
            "common times, or keep only the times that all of them have."
        )
    falling = np.flatnonzero(~(np.diff(times[0]) > 0))
    if len(falling):
        place = int(falling[0])
        raise DataError(
            f"The times of {section.times!r} must increase, but observation {place + 1} (from 0) "
            f"of every row is at {times[0, place + 1]:g}, after {times[0, place]:g}: sort the "
            "observations, and remove those that only fill rows to one length."
        )
    return times[0]


def check_samples(split: Split, config: Config) -> np.ndarray:
    """The observation times of a split that can be trained on or scored. Local.

    Raises:
        NodepintError: for numbers that are not finite, times that rows do not share, that do not
            increase or lie outside the horizon, and for fewer rows than a batch takes.
    """
    section = config.data
    assert section is not None  # the split is of it
    check_finite(split, _columns(section))
    if section.times is None:
        return np.array([config.time.horizon[1]])
    times = common_times(split, section)
    place_observations(times, build_edges(config.time), 1, 0)  # says if they do not fit
    return times


def check_batch(section: DataSection, n_rows: int) -> None:
    """Check that the training split has enough rows for a batch. Local."""
    if section.batch_size is not None and section.batch_size > n_rows:
        raise DataError(
            f"`data.batch_size` is {section.batch_size}, but the split {section.train_split!r} "
            f"has {n_rows} samples."
        )


def _columns(section: DataSection) -> list[str]:
    return [section.input, section.target, *([section.times] if section.times else [])]
