"""The communicators of a run. The only file that names `COMM_WORLD`.

Ranks form a grid, (groups of samples) x (blocks of slices) x (parts of the tangents): of G x T x B
ranks, (g * T + r) * B + b has the block r of the slices, of every batch the g-th part, and of the
tangents of these slices the b-th part. The B ranks of a cell exchange whole tangents, so they are
neighbors. With one group and one part it is a single line.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from mpi4py import MPI

from nodepint_mpi.core.partition import line_length
from nodepint_mpi.errors import LayoutError, NodepintError, ProblemError
from nodepint_mpi.parallel.programs import Programs


@dataclass(frozen=True, eq=False)
class TimeComm:
    """A line of ranks along time, in the order of the slices. Compared by identity.

    Every group of samples has a line. `mpi` joins the ranks of this one, for states, cotangents
    and the coarse problem; `grid` those of all lines, for sums and maxima: what is decided from
    them, such as to stop, is decided for all samples, however they are dealt.

    `basis` joins the ranks that have the same slices and samples, and share their tangents; None
    where nobody shares. Each of these `n_basis` ranks has a line of its own and does all else that
    the others do. In sums the line with `basis_rank` 0 counts.

    All three are used by mpi4jax alone, inside jitted code. Mixing it with mpi4py calls gives wrong
    numbers without an error while a jitted call is in flight. `control` joins the ranks of this
    group of samples for mpi4py, outside of jitted code.

    A line that you made is yours to give back: `free` it, or make it in a `with` statement. MPI
    has room for some ten thousand communicators.
    """

    mpi: MPI.Intracomm
    rank: int
    size: int
    grid: MPI.Intracomm
    control: MPI.Intracomm
    group: int = 0
    n_groups: int = 1
    programs: Programs = field(default_factory=Programs, repr=False)
    """What `solve` has compiled for this line: it goes when the line goes."""
    basis: MPI.Intracomm | None = None
    basis_rank: int = 0
    n_basis: int = 1

    @property
    def n_grid(self) -> int:
        """All ranks of the grid. Local."""
        return self.size * self.n_groups * self.n_basis

    @property
    def grid_rank(self) -> int:
        """This rank among all ranks of the grid. Local."""
        return (self.group * self.size + self.rank) * self.n_basis + self.basis_rank

    @property
    def is_free(self) -> bool:
        """Whether the line has been given back. Local."""
        return self.control == MPI.COMM_NULL

    def free(self) -> None:
        """Give the line back to MPI, with all that `solve` has compiled for it. Collective.

        Waits for what is in flight. Functions of your own that were jitted around `solve` hold the
        communicator in their compiled code: do not call them any more. Freeing twice does nothing.

        Raises:
            ProblemError: if this is the line of the whole world, which everybody shares.
        """
        if self.is_free:
            return
        if world_time_comm.cache_info().currsize and self is world_time_comm():
            raise ProblemError(
                "`world_time_comm()` is shared by all solves without `comm`; it cannot be freed."
            )
        _free_line(self)

    def __enter__(self) -> "TimeComm":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        # Freeing is collective, and an exception may have been raised on this rank alone.
        if kind is None or issubclass(kind, NodepintError):
            self.free()


class Comms(NamedTuple):
    """The communicators of a run, by role.

    `time` carries arrays inside jitted code. `data` joins the ranks that own the same slices and
    share of the tangents, one of each group in their order, and `control` all; both are used
    outside of jitted code, by mpi4py only: for samples that change groups, and for agreement on
    stop, failure and files.
    """

    time: TimeComm
    data: MPI.Intracomm
    control: MPI.Intracomm


def make_time_comm(mpi: MPI.Intracomm, *, n_basis: int = 1) -> TimeComm:
    """Wrap a communicator as a line along time. Collective over `mpi`: it is duplicated.

    Give it back when it is done with: `with make_time_comm(mpi) as comm:`, or `comm.free()`.

    Args:
        mpi: The ranks.
        n_basis: How many of them have the same slices and share the tangents of these, which only
            `method="tangent"` has. They are neighbors in `mpi`.

    Raises:
        LayoutError: on all ranks, if they cannot be dealt so, or if MPI has no communicator left.
    """
    n_ranks = mpi.Get_size()
    if n_basis < 1 or n_ranks % n_basis:
        raise LayoutError(
            f"{n_ranks} ranks cannot share tangents by {n_basis}: `n_basis` must divide the "
            "number of ranks."
        )
    return _make_line(mpi, n_groups=1, n_basis=n_basis)


def make_comms(mpi: MPI.Intracomm, *, n_groups: int = 1, n_basis: int = 1) -> Comms:
    """Make the communicators of a run from one, with lines of equal length. Collective over `mpi`.

    Raises:
        LayoutError: on all ranks, if they cannot be dealt to so many lines.
    """
    time = _make_line(mpi, n_groups=n_groups, n_basis=n_basis)
    cell = time.rank * n_basis + time.basis_rank
    return Comms(time=time, data=_split(mpi, cell, time.group), control=mpi.Dup())


def _make_line(mpi: MPI.Intracomm, *, n_groups: int, n_basis: int) -> TimeComm:
    """The line of this rank in a grid. Collective over `mpi`; raises LayoutError on all ranks."""
    size = line_length(mpi.Get_size(), n_groups, n_basis)
    place, basis_rank = divmod(mpi.Get_rank(), n_basis)
    group, rank = divmod(place, size)
    try:
        if n_groups * n_basis == 1:
            line = grid = mpi.Dup()
            control = mpi.Dup()
        else:
            line, grid = _split(mpi, group * n_basis + basis_rank, rank), mpi.Dup()
            control = _split(mpi, group, mpi.Get_rank())
        basis = None if n_basis == 1 else _split(mpi, place, basis_rank)
    except MPI.Exception as error:
        raise LayoutError(
            f"MPI cannot duplicate the communicator ({error}). It has room for a limited number "
            "of them: free lines that are done with, `with make_time_comm(mpi) as comm:`."
        ) from error
    return TimeComm(
        line, rank, size, grid, control, group, n_groups,
        basis=basis, basis_rank=basis_rank, n_basis=n_basis,
    )  # fmt: skip


def _split(mpi: MPI.Intracomm, color: int, key: int) -> MPI.Intracomm:
    """The ranks of one color, in the order of their keys."""
    return MPI.Intracomm(mpi.Split(color, key))


def free_comms(comms: Comms) -> None:
    """Give communicators back once nothing uses them any more. Collective over `control`."""
    _free_line(comms.time)
    for mpi in (comms.data, comms.control):
        mpi.Free()


def _free_line(line: TimeComm) -> None:
    """Free the communicators of a line. Collective over its grid."""
    jax.effects_barrier()
    line.programs.clear()
    if line.grid is not line.mpi:
        line.grid.Free()
    if line.basis is not None:
        line.basis.Free()
    line.mpi.Free()
    line.control.Free()


def world() -> MPI.Intracomm:
    """All ranks of the job. Local."""
    return MPI.COMM_WORLD


def alone() -> MPI.Intracomm:
    """This rank alone. Local."""
    return MPI.COMM_SELF


@functools.cache
def world_time_comm() -> TimeComm:
    """All ranks of the job as one line along time. Collective over the world the first time."""
    return make_time_comm(world())
