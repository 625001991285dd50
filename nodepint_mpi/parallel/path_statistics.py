"""Mean, variance and quantiles of paths that are dealt to lines of ranks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from nodepint_mpi.errors import ProblemError


class PathStatistics(NamedTuple):
    """Of all paths, equal on all ranks; arrays of float64.

    `mean` and `variance`, the unbiased one, are (times, *state), `quantiles` is
    (quantiles, times, *state). The variance of a single path is NaN.
    """

    n_paths: int
    mean: np.ndarray
    variance: np.ndarray
    quantiles: np.ndarray


def path_statistics(
    values: Any, quantiles: Sequence[float] = (), *, comm: MPI.Intracomm | None = None
) -> PathStatistics:
    """Mean, variance and quantiles over the paths of all ranks. Collective over `comm`.

    The variance is put together from those of the parts, so that it is right where the mean is
    large. For the quantiles all paths are gathered, one time after the other.

    Args:
        values: (times, paths, *state) of this rank, such as `Solution.ys` or its interface.
        quantiles: Between zero and one.
        comm: The ranks that hold other paths, one of each line; None where all paths are here.

    Raises:
        ProblemError: if there is no axis of paths, or a quantile is not between zero and one.

    Reference:
        Chan, Golub, LeVeque (1983), Am. Stat. 37, 242-247, eq. (2.1).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 2:
        raise ProblemError(
            f"`values` has shape {values.shape} and so no axis of paths; expected "
            "(times, paths, *state), as `Solution.ys` of a batch."
        )
    levels = np.asarray(quantiles, dtype=np.float64)
    if levels.ndim != 1 or not np.all((levels >= 0) & (levels <= 1)):
        raise ProblemError(f"`quantiles` is {quantiles!r}; expected numbers from zero to one.")
    here = values.shape[1]
    own_mean = values.mean(axis=1) if here else np.zeros_like(values, shape=_without_paths(values))
    own_squares = np.sum(np.square(values - own_mean[:, None]), axis=1)
    parts = (
        [(here, own_mean, own_squares)]
        if comm is None
        else comm.allgather((here, own_mean, own_squares))
    )
    n, mean, squares = 0, np.zeros_like(own_mean), np.zeros_like(own_mean)
    for more, its_mean, its_squares in parts:
        if more:
            apart = its_mean - mean
            mean = mean + apart * (more / (n + more))
            squares = squares + its_squares + np.square(apart) * (n * more / (n + more))
            n += more
    if n == 0:
        raise ProblemError("`values` holds no path on any rank; expected at least one.")
    variance = squares / (n - 1) if n > 1 else np.full_like(squares, np.nan)
    return PathStatistics(n, mean, variance, _quantiles(values, levels, comm))


def _quantiles(values: np.ndarray, levels: np.ndarray, comm: MPI.Intracomm | None) -> np.ndarray:
    """Of every time, (quantiles, times, *state)."""
    found = np.empty((len(levels), *_without_paths(values)))
    for i, row in enumerate(values) if len(levels) else ():
        whole = row if comm is None else np.concatenate(comm.allgather(row))
        found[:, i] = np.quantile(whole, levels, axis=0)
    return found


def _without_paths(values: np.ndarray) -> tuple[int, ...]:
    return values.shape[0], *values.shape[2:]
