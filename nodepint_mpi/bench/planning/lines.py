"""What all ranks of a line do: a function, traced on ranks that are imagined.

Nothing is computed and nothing is sent. Local.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from mpi4py import MPI

from nodepint_mpi.core.partition import check_layout, owned_range
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.operations import Operation, recording

Operations = tuple[Operation, ...]


class Layout(NamedTuple):
    """Ranks of a line, groups that share the samples, and ranks that share a slice's tangents."""

    n_time: int
    n_data: int = 1
    n_basis: int = 1

    @property
    def n_ranks(self) -> int:
        """All ranks."""
        return self.n_time * self.n_data * self.n_basis


class Run(NamedTuple):
    """Ranks from `start` to before `stop` that do the same."""

    start: int
    stop: int
    operations: Operations


class RecordedLine(NamedTuple):
    """What all ranks of a line do in one step, in runs of ranks that are alike."""

    n_slices: int
    layout: Layout
    runs: tuple[Run, ...]


class _Imagined(MPI.Intracomm):
    """A communicator that knows its rank and size, for code that is traced and never run."""

    def __new__(cls, rank: int, size: int):
        del rank, size
        return super().__new__(cls)

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:  # it wraps MPI's null communicator
        return self is other

    def __hash__(self) -> int:
        return id(self)


def imagined_line(layout: Layout, rank: int) -> TimeComm:
    """A rank of the first line of a layout, to trace with. Local.

    Of ranks that share tangents it is the first, which has no fewer of them than the others.
    """
    n_time, n_data, n_basis = layout
    line = _Imagined(rank, n_time)
    grid = line if n_data * n_basis == 1 else _Imagined(rank * n_basis, layout.n_ranks)
    basis = None if n_basis == 1 else _Imagined(0, n_basis)
    return TimeComm(line, rank, n_time, grid, line, 0, n_data, basis=basis, n_basis=n_basis)


def traced(function: Callable, *args: Any) -> Operations:
    """What a function does that would be jitted, on arrays or their shapes. Local."""
    with recording() as operations:
        jax.eval_shape(lambda *args: function(*args), *args)  # new each time: JAX remembers others
    return tuple(operations)


def record_line(
    n_slices: int, layout: Layout, operations: Callable[[int], Operations]
) -> RecordedLine:
    """The operations of all ranks of a line from those of as few as are needed. Local.

    Where the first and the last of ranks with equally many slices do the same, those between them
    do. What depends on a rank's place changes at powers of two from either end.

    Args:
        n_slices: How many slices the line deals out.
        layout: The line, and how many there are.
        operations: What one rank does.

    Raises:
        LayoutError: for more ranks along time than slices.
    """
    n_time = layout.n_time
    check_layout(n_slices, n_time)
    powers = [2**k for k in range(n_time.bit_length())]
    cuts = {*powers, *(n_time - power for power in powers), n_slices % n_time}
    known: dict[int, Operations] = {}

    def of(rank: int) -> Operations:
        if rank not in known:
            known[rank] = operations(rank)
        return known[rank]

    def runs(first: int, last: int) -> Iterator[Run]:
        widths = {len(owned_range(n_slices, n_time, rank)) for rank in (first, last)}
        if len(widths) == 1 and of(first) == of(last):
            yield Run(first, last + 1, of(first))
            return
        middle = (first + last + 1) // 2
        inside = [cut for cut in cuts if first < cut <= last]
        if len(widths) > 1:
            inside = [n_slices % n_time]
        cut = min(inside, key=lambda cut: abs(cut - middle), default=middle)
        yield from runs(first, cut - 1)
        yield from runs(cut, last)

    found = [Run(0, 1, of(0))]  # the ends of a line are mostly unlike all others
    if n_time > 2:
        found += runs(1, n_time - 2)
    if n_time > 1:
        found.append(Run(n_time - 1, n_time, of(n_time - 1)))
    return RecordedLine(n_slices, layout, tuple(_merged(found)))


def _merged(runs: Iterable[Run]) -> Iterator[Run]:
    """Neighbors that do the same as one run."""
    before: Run | None = None
    for run in runs:
        if before is not None and before.operations == run.operations:
            before = before._replace(stop=run.stop)
            continue
        if before is not None:
            yield before
        before = run
    if before is not None:
        yield before
