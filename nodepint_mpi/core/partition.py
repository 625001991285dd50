"""Who owns which slice: arithmetic that any rank can do for any rank."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nodepint_mpi.errors import LayoutError, ProblemError

SLICE_RESOLUTION = 1e-3
"""Largest distance of neighboring floating-point times, as a share of a slice."""


class OwnedSlices(NamedTuple):
    """The consecutive slices one rank owns, and where they lie in time.

    `all_edges` are the boundaries of all slices of the horizon, `first` is the global index of the
    first owned one. `ts` holds the observation times strictly inside each owned slice, filled up
    with times that nobody reads to a common length.
    """

    all_edges: np.ndarray
    ts: np.ndarray
    first: int

    @property
    def n_slices(self) -> int:
        """Slices of the whole horizon."""
        return len(self.all_edges) - 1

    @property
    def n_owned(self) -> int:
        """Slices of this rank."""
        return len(self.ts)

    @property
    def edges(self) -> np.ndarray:
        """Boundaries of the owned slices."""
        return self.all_edges[self.first : self.first + self.n_owned + 1]

    @property
    def indices(self) -> np.ndarray:
        """Global indices of the owned slices."""
        return np.arange(self.first, self.first + self.n_owned)


def owned_range(n_slices: int, n_ranks: int, rank: int) -> range:
    """Global indices of the slices of one rank: consecutive, in order, as even as possible.

    Local. The first `n_slices % n_ranks` ranks own one more. With more ranks than slices the
    last ranks own none.

    >>> [list(owned_range(7, 3, rank)) for rank in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    share, extra = divmod(n_slices, n_ranks)
    first = rank * share + min(rank, extra)
    return range(first, first + share + (rank < extra))


def owner_of(n_slices: int, n_ranks: int, index: int) -> int:
    """The rank whose `owned_range` holds a slice. Local.

    >>> [owner_of(7, 3, index) for index in range(7)]
    [0, 0, 0, 1, 1, 2, 2]
    """
    share, extra = divmod(n_slices, n_ranks)
    wider = extra * (share + 1)
    return index // (share + 1) if index < wider else extra + (index - wider) // share


def check_edges(edges: ArrayLike) -> np.ndarray:
    """Return the slice boundaries as a 1-D float array, or say what is wrong with them. Local."""
    try:
        edges = np.asarray(edges, dtype=float)
    except (TypeError, ValueError) as error:
        raise ProblemError(f"`edges` is not a list of times: {error}.") from error
    if edges.ndim != 1 or len(edges) < 2:
        raise ProblemError(
            f"`edges` has shape {edges.shape}; it must list at least two times, the boundaries "
            "of the slices."
        )
    if not np.all(np.isfinite(edges)):
        raise ProblemError("`edges` holds NaN or infinity; times must be finite.")
    widths = np.diff(edges)
    if not np.all(widths > 0):
        n = int(np.argmin(widths > 0))
        raise ProblemError(
            f"`edges` must be strictly increasing: {edges[n]!r} is followed by {edges[n + 1]!r}. "
            "Late times need double precision: pass a NumPy array or a list."
        )
    spacing, shortest = float(np.spacing(np.max(np.abs(edges)))), float(np.min(widths))
    if spacing > SLICE_RESOLUTION * shortest:
        raise ProblemError(
            f"Times near {edges[np.argmax(np.abs(edges))]:g} are {spacing:g} apart in double "
            f"precision, and the shortest slice is {shortest:g} long: count time from a later "
            "origin."
        )
    return edges


def snap_times(times: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Times as near to an edge as what computed them could bring them, on it. Local."""
    span = edges[-1] - edges[0]
    close = max(1e-9 * span, 4 * float(np.spacing(np.max(np.abs(edges)))))
    right = np.clip(np.searchsorted(edges, times), 1, len(edges) - 1)
    nearest = np.where(
        np.abs(times - edges[right - 1]) <= np.abs(times - edges[right]), right - 1, right
    )
    return np.where(np.abs(times - edges[nearest]) <= close, edges[nearest], times)


def check_layout(n_slices: int, n_ranks: int) -> None:
    """Refuse more ranks than slices. Local; every rank reaches the same verdict."""
    if n_ranks > n_slices:
        raise LayoutError(
            f"{n_ranks} ranks cannot share {n_slices} time slices: every rank needs at least one. "
            f"Start at most {n_slices} ranks, raise `time.n_slices` to {n_ranks} or more, or deal "
            "the samples of a step to several lines of ranks: `run.data_ranks`."
        )


def line_length(n_ranks: int, n_groups: int, n_basis: int) -> int:
    """Ranks along time in a grid of so many: lines are equally long. Local.

    Args:
        n_ranks: All ranks.
        n_groups: Groups that share the samples: `run.data_ranks`.
        n_basis: Ranks that share the tangents of a slice: `run.basis_ranks`.

    Raises:
        LayoutError: if they cannot be dealt so.
    """
    n_lines = n_groups * n_basis
    if n_ranks % n_lines:
        counts = {"run.data_ranks": n_groups, "run.basis_ranks": n_basis}
        keys = [f"`{key}`" for key, count in counts.items() if count > 1]
        raise LayoutError(
            f"{n_ranks} ranks cannot form {n_lines} lines of equal length: start a multiple of "
            f"{' x '.join(keys)} = {n_lines}, or change {'it' if len(keys) == 1 else 'them'}."
        )
    return n_ranks // n_lines


def show_grid(n_ranks: int, n_groups: int, n_basis: int) -> str:
    """Such as "8", "8 (2 x 4)" and "8 (2 x 2 x 2)": groups of samples x time (x basis). Local."""
    if n_groups * n_basis == 1:
        return str(n_ranks)
    parts = [n_groups, n_ranks // (n_groups * n_basis), *([n_basis] if n_basis > 1 else [])]
    return f"{n_ranks} ({' x '.join(map(str, parts))})"


def own_slices(
    edges: np.ndarray, n_ranks: int, rank: int, *, inside: list[np.ndarray] | None = None
) -> OwnedSlices:
    """Cut one rank's block out of the horizon. Local.

    Args:
        edges: All slice boundaries, strictly increasing.
        n_ranks: Ranks along time.
        rank: The rank asked for.
        inside: For every slice of the horizon the observation times strictly inside it.

    Raises:
        LayoutError: if there are more ranks than slices.
    """
    n_slices = len(edges) - 1
    check_layout(n_slices, n_ranks)
    owned = owned_range(n_slices, n_ranks, rank)
    inside = [np.zeros(0)] * n_slices if inside is None else inside
    width = max(len(times) for times in inside)
    ts = np.array([_pad_times(inside[n], edges[n], edges[n + 1], width) for n in owned])
    return OwnedSlices(edges, ts, owned.start)


def _pad_times(times: np.ndarray, left: float, right: float, width: int) -> np.ndarray:
    """Fill up with distinct times that nobody reads: a continuous adjoint cannot stop twice."""
    last = times[-1] if len(times) else left
    return np.concatenate([times, np.linspace(last, right, width - len(times) + 2)[1:-1]])
