"""Whether the rows of a split can be trained on: all that is wrong with them, at once."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nodepint_mpi.build.model import build_edges
from nodepint_mpi.config.data import DataSection
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.exogenous import check_jumps
from nodepint_mpi.core.partition import snap_times
from nodepint_mpi.data.columns import RaggedColumn
from nodepint_mpi.data.datasets import Split
from nodepint_mpi.errors import DataError

MOST = 8
"""Maximum number of problems that are listed; the others are counted."""


class SeriesTimes(NamedTuple):
    """Times of all rows (rows, longest), snapped to slice edges, and how many each row has."""

    times: np.ndarray
    lengths: np.ndarray

    @property
    def are_common(self) -> bool:
        """Whether all rows have the same. Local."""
        same = bool((self.lengths == self.times.shape[1]).all())
        return same and bool((self.times == self.times[:1]).all())


def columns_of(section: DataSection) -> list[str]:
    """All columns that a config names. Local."""
    names = [section.encoded, section.target, section.times, section.mask, section.weights]
    names += [section.static, section.inputs, section.input_times]
    return list(dict.fromkeys(name for name in names if name is not None))


def series_of(section: DataSection) -> list[str]:
    """Those of them whose rows may differ in length. Local."""
    names = [section.inputs, section.input_times]
    if section.times is not None:
        names += [section.input, section.target, section.times, section.mask, section.weights]
    return list(dict.fromkeys(name for name in names if name is not None))


def check_rows(split: Split, config: Config) -> SeriesTimes | None:
    """The observation times of a split's rows, whose data were looked at. Local.

    None for labeled samples.

    Raises:
        DataError: with everything that is wrong, each with row, column, time and remedy.
    """
    section = config.data
    assert section is not None  # the split is of it
    edges = build_edges(config.time)
    _refuse(list(_wrong_shapes(split, section)))
    problems = list(_not_finite(split, section))
    times = None
    if section.times is not None:
        times = series_times(split, section.times)
        problems += _wrong_times(split, section.times, times, edges)
        times = times._replace(times=snap_times(times.times, edges))
        problems += _unobserved(split, section, times, edges[0])
    if section.weights is not None:
        problems += _wrong_weights(split, section.weights)
    if section.inputs is not None:
        problems += _wrong_inputs(split, section, edges, config.time.fine.n_steps)
    _refuse(problems)
    return times


def check_counted(split: Split, section: DataSection, what: str) -> None:
    """Refuse a part of a split, whose whole was checked, in which no row counts. Local."""
    if section.weights is None or split.take(section.weights, np.arange(split.n_rows)).any():
        return
    raise DataError(
        f"The weights {section.weights!r} are zero in all {split.n_rows} rows that are {what}: "
        "change `run.seed` or `data.valid_fraction`, or name a split by `data.valid_split`."
    )


def series_times(split: Split, name: str) -> SeriesTimes:
    """Times of all rows as they are stored. Local."""
    times = split.take(name, np.arange(split.n_rows)).astype(float)
    return SeriesTimes(times, lengths_of(split, name))


def lengths_of(split: Split, name: str) -> np.ndarray:
    """How many entries each row of a column of series has. Local."""
    column = split.column(name)
    if isinstance(column, RaggedColumn):
        lengths = np.asarray(column.lengths)
        return lengths if split.rows is None else lengths[split.rows]
    return np.full(split.n_rows, column.shape[0] if column.shape else 1)


def is_series(split: Split, name: str) -> bool:
    """Whether the rows of a column are lists. Local."""
    column = split.column(name)
    return isinstance(column, RaggedColumn) or column.shape != ()


def entry_shape(split: Split, name: str) -> tuple[int, ...]:
    """Shape of one entry of a column of series. Local."""
    column = split.column(name)
    return tuple(column.shape if isinstance(column, RaggedColumn) else column.shape[1:])


def observed(split: Split, section: DataSection, rows: np.ndarray) -> np.ndarray | None:
    """Where there is an observation, of the shape of targets; None if everywhere. Local."""
    ragged = section.times is not None and isinstance(split.column(section.times), RaggedColumn)
    if not ragged and section.mask is None and section.missing is None:
        return None
    targets = split.take(section.target, rows)
    there = np.ones(targets.shape, bool)
    if section.missing is not None:
        there &= ~np.isnan(targets)
    if section.mask is not None:
        mask = split.take(section.mask, rows).astype(bool)
        there &= mask.reshape(*mask.shape, *[1] * (targets.ndim - mask.ndim))
    if ragged:
        lengths = lengths_of(split, section.target)[rows]
        within = np.arange(targets.shape[1]) < lengths[:, None]
        there &= within.reshape(*within.shape, *[1] * (targets.ndim - 2))
    return there


def known_inputs(
    split: Split, section: DataSection, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Knots (rows, longest), values there (rows, longest, channels), and lengths of inputs. Local.

    Where `missing` allows NaN, a channel is interpolated through what is known of it.
    """
    assert section.inputs is not None  # the caller asks only then
    name = section.input_times or section.times
    assert name is not None  # checked by the config
    times = split.take(name, rows).astype(float)
    values = split.take(section.inputs, rows).astype(float)
    values = values.reshape(*values.shape[:2], -1)
    lengths = lengths_of(split, section.inputs)[rows]
    if section.missing is not None and np.isnan(values).any():
        for b, length in enumerate(lengths):
            for channel in values[b, :length].T:
                _fill(channel, times[b, :length], held=section.interpolation == "constant")
    return times, values, lengths


def _fill(channel: np.ndarray, times: np.ndarray, *, held: bool) -> None:
    """Replace NaN in place: by the last known number, or by what lies between two."""
    known = ~np.isnan(channel)
    if known.all() or not known.any():
        return
    if held:
        last = np.maximum.accumulate(np.where(known, np.arange(len(channel)), 0))
        channel[:] = channel[last]
        channel[: np.argmax(known)] = channel[np.argmax(known)]
    else:
        channel[~known] = np.interp(times[~known], times[known], channel[known])


def _refuse(problems: list[str]) -> None:
    if not problems:
        return
    if len(problems) == 1:
        raise DataError(problems[0])
    more = [f"and {len(problems) - MOST} more"] if len(problems) > MOST else []
    lines = "".join(f"\n- {one}" for one in [*problems[:MOST], *more])
    raise DataError(f"{len(problems)} things are wrong with the data:{lines}")


def _wrong_shapes(split: Split, section: DataSection) -> Iterator[str]:
    """Columns that cannot be what the config says they are."""
    if section.times is not None:
        shape = split.column(section.times).shape
        ragged = isinstance(split.column(section.times), RaggedColumn)
        if len(shape) != (0 if ragged else 1):
            yield f"The column {section.times!r} must hold a list of times in every row."
            return
        n_times = lengths_of(split, section.times)
        for name in (section.input, section.target, section.mask):
            if name is None:
                continue
            column, listed = split.column(name), is_series(split, name)
            differing = np.flatnonzero(lengths_of(split, name) != n_times) if listed else [0]
            n_axes = len(entry_shape(split, name)) if listed else 0
            if len(differing) or (n_axes != 1 and name != section.mask):
                row = int(differing[0]) if len(differing) else 0
                has = f"{lengths_of(split, name)[row]} entries" if listed else "one number"
                yield (
                    f"The column {name!r} has rows of shape {tuple(column.shape)}; it must hold a "
                    f"vector for each of the {n_times[row]} times in {section.times!r} (row {row} "
                    f"has {has})."
                )
        yield from _wrong_shape_beside(split, section)
    elif section.weights is not None and is_series(split, section.weights):
        yield f"The weights {section.weights!r} must hold one number a row: there are no times."
    if section.inputs is not None:
        name = section.input_times or section.times
        assert name is not None  # checked by the config
        yield from _wrong_series_of_inputs(split, section.inputs, name)
        differing = np.flatnonzero(lengths_of(split, section.inputs) != lengths_of(split, name))
        if len(differing):
            row = int(differing[0])
            yield (
                f"Row {row} of the inputs {section.inputs!r} has "
                f"{lengths_of(split, section.inputs)[row]} entries for "
                f"{lengths_of(split, name)[row]} times in {name!r}: they must be equally many."
            )


def _wrong_shape_beside(split: Split, section: DataSection) -> Iterator[str]:
    """Masks and weights that do not lie beside the observations."""
    assert section.times is not None  # the caller asks only then
    if section.mask is not None:
        wanted, found = entry_shape(split, section.target), entry_shape(split, section.mask)
        if found not in ((), wanted):
            yield (
                f"The mask {section.mask!r} has entries of shape {found}; it must hold one for "
                f"each time, or one for each of the {wanted} components of an observation."
            )
    if section.weights is not None and is_series(split, section.weights):
        differing = lengths_of(split, section.weights) != lengths_of(split, section.times)
        if entry_shape(split, section.weights) != () or differing.any():
            yield (
                f"The weights {section.weights!r} must hold one number a row, or one for each of "
                f"the times in {section.times!r}."
            )


def _wrong_series_of_inputs(split: Split, inputs: str, times: str) -> Iterator[str]:
    """Inputs that are no lists, or whose times are no numbers."""
    for name in (inputs, times):
        if not is_series(split, name):
            yield f"The column {name!r} must hold a list in every row."
    if entry_shape(split, times) != ():
        yield f"The column {times!r} must hold a list of times in every row."


def _not_finite(split: Split, section: DataSection) -> Iterator[str]:
    """The first NaN or infinity of each column, with how many rows have any."""
    may_miss = {section.target, section.input, section.inputs} if section.missing else set()
    for name in columns_of(section):
        column = split.column(name)
        if not np.issubdtype(column.dtype, np.floating):
            continue
        n_rows, first = 0, None
        size = max(1, 2**24 // max(1, math.prod(column.shape)))
        for start in range(0, split.n_rows, size):
            rows = np.arange(start, min(start + size, split.n_rows))
            values = split.take(name, rows)
            bad = np.isinf(values) if name in may_miss else ~np.isfinite(values)
            found = np.flatnonzero(bad.reshape(len(rows), -1).any(axis=1))
            if len(found) and first is None:
                row = int(found[0])
                place = tuple(int(i) for i in np.argwhere(bad[row])[0])
                first = (start + row, place, values[row][place])
            n_rows += len(found)
        if first is None:
            continue
        row, place, value = first
        at = f" at {list(place)}" if place else ""
        when = ""
        if section.times is not None and name in (section.target, section.input) and place:
            when = f", time {split.take(section.times, np.array([row]))[0, place[0]]:g}"
        others = f" (and {n_rows - 1} more rows like it)" if n_rows > 1 else ""
        remedy = "fix the data and prepare them again"
        if when and np.isnan(value):
            remedy += ', or say `data.missing = "nan"` if it stands for an observation not made'
        yield (
            f"row {row} of column {name!r} holds {value}{at}{when}{others}, but all numbers must "
            f"be finite: {remedy}"
        )


def _wrong_times(split: Split, name: str, found: SeriesTimes, edges: np.ndarray) -> Iterator[str]:
    """Times that do not increase, or lie outside the horizon; rows without any."""
    times, lengths = found
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        yield (
            f"Row {empty[0]} of {name!r} has no time at all{_more(len(empty))}: leave such rows "
            "out."
        )
    real = np.arange(times.shape[1]) < lengths[:, None]
    if not np.isfinite(times[real]).all():
        return  # said already
    falling = np.argwhere(real[:, 1:] & ~(np.diff(times, axis=1) > 0))
    if len(falling):
        row, place = falling[0]
        where = "every row" if found.are_common else f"row {row}"
        yield (
            f"The times of {name!r} must increase, but observation {place + 1} (from 0) of "
            f"{where} is at {times[row, place + 1]:g}, after {times[row, place]:g}: sort the "
            "observations, and remove those that only fill rows to one length."
        )
    snapped = snap_times(times, edges)
    outside = np.argwhere(real & ((snapped < edges[0]) | (snapped > edges[-1])))
    if len(outside) and not len(falling):
        row, place = outside[0]
        own = times[row, : lengths[row]]
        n_rows = len(np.unique(outside[:, 0]))
        which = "" if found.are_common else f" in row {row}{_more(n_rows)}"
        yield (
            f"Observation times run from {own[0]:g} to {own[-1]:g}{which}, outside the horizon "
            f"[{edges[0]:g}, {edges[-1]:g}]: change `time.horizon`."
        )


def _unobserved(
    split: Split, section: DataSection, found: SeriesTimes, begin: float
) -> Iterator[str]:
    """Rows without an observation that counts, and masks that are not masks."""
    rows = np.arange(split.n_rows)
    later = (np.arange(found.times.shape[1]) < found.lengths[:, None]) & (found.times > begin)
    if section.mask is not None:
        mask = split.take(section.mask, rows)
        wrong = np.argwhere((mask != 0) & (mask != 1))
        if len(wrong):
            row = int(wrong[0][0])
            yield (
                f"Row {row} of the mask {section.mask!r} holds {mask[tuple(wrong[0])]}; a mask is "
                "true or 1 where there is an observation, and false or 0 where there is none."
            )
    there = observed(split, section, rows)
    if there is not None:
        later &= there.reshape(*later.shape, -1).any(axis=2)
    none = np.flatnonzero(~later.any(axis=1))
    if len(none):
        yield (
            f"Row {none[0]} of column {section.target!r} has no observation after the beginning of "
            f"the horizon, {begin:g}, where the state is the encoder's{_more(len(none))}: leave "
            "such rows out."
        )


def _wrong_weights(split: Split, name: str) -> Iterator[str]:
    weights = split.take(name, np.arange(split.n_rows))
    negative = np.argwhere(weights < 0)
    if len(negative):
        yield (
            f"Row {negative[0][0]} of the weights {name!r} holds {weights[tuple(negative[0])]:g}; "
            "weights must not be negative."
        )
    elif not weights.any():
        yield f"The weights {name!r} are all zero: nothing would be learned."


def _wrong_inputs(
    split: Split, section: DataSection, edges: np.ndarray, n_steps: int | None
) -> Iterator[str]:
    """Inputs whose knots do not increase, begin too late, or jump where no step can end."""
    assert section.inputs is not None  # the caller asks only then
    rows = np.arange(split.n_rows)
    times, values, lengths = known_inputs(split, section, rows)
    name = section.input_times or section.times
    real = np.arange(times.shape[1]) < lengths[:, None]
    if section.input_times is not None:
        falling = np.argwhere(real[:, 1:] & ~(np.diff(times, axis=1) > 0))
        if len(falling):
            row, place = falling[0]
            yield (
                f"The times of {name!r} must increase, but knot {place + 1} (from 0) of row {row} "
                f"is at {times[row, place + 1]:g}, after {times[row, place]:g}."
            )
            return
    snapped = snap_times(times, edges)
    late = np.flatnonzero((lengths == 0) | (snapped[:, 0] > edges[0]))
    if len(late):
        row = int(late[0])
        begins = f"begin at t = {times[row, 0]:g}" if lengths[row] else "are empty"
        yield (
            f"The inputs {section.inputs!r} of row {row}{_more(len(late))} {begins}; the field "
            f"needs them from the beginning of the horizon, {edges[0]:g}: begin them there, or "
            "change `time.horizon`."
        )
        return
    nothing = np.flatnonzero(np.isnan(np.where(real[..., None], values, 0.0)).any(axis=(1, 2)))
    if len(nothing):
        yield (
            f"A channel of the inputs {section.inputs!r} of row {nothing[0]} is NaN throughout: "
            "leave the row out, or the channel."
        )
    if section.interpolation == "constant":
        try:
            check_jumps(section.inputs, snapped, lengths, edges, n_steps)
        except DataError as error:
            yield str(error)


def _more(n_rows: int) -> str:
    return f" (and {n_rows - 1} more)" if n_rows > 1 else ""
