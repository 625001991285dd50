"""The communicators of a run. The only file that names `COMM_WORLD`.

Ranks form a grid, (groups of samples) x (blocks of slices), dealt line by line: rank g * T + r has
the block r of the slices and, of every batch, the g-th part. With one group it is a single line.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from mpi4py import MPI

from nodepint_mpi.errors import LayoutError, NodepintError, ProblemError
from nodepint_mpi.parallel.programs import Programs


@dataclass(frozen=True, eq=False)
class TimeComm:
    """A line of ranks along time, in the order of the slices. Compared by identity.

    Every group of samples has a line. `mpi` joins the ranks of this one, for states, cotangents
    and the coarse problem; `grid` those of all lines, for sums and maxima: what is decided from
    them, such as to stop, is decided for all samples, however they are dealt.

    Both are used by mpi4jax alone, inside jitted code. Mixing it with mpi4py calls gives wrong
    numbers without an error while a jitted call is in flight. `control` joins the ranks of this
    line for mpi4py, outside of jitted code.

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

    @property
    def n_grid(self) -> int:
        """Ranks of all lines. Local."""
        return self.size * self.n_groups

    @property
    def grid_rank(self) -> int:
        """This rank among those of all lines. Local."""
        return self.group * self.size + self.rank

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

    `time` carries arrays inside jitted code. `data` joins the ranks that own the same slices, one
    of each group in their order, and `control` all; both are used outside of jitted code, by
    mpi4py only: for samples that change groups, and for agreement on stop, failure and files.
    """

    time: TimeComm
    data: MPI.Intracomm
    control: MPI.Intracomm


def make_time_comm(mpi: MPI.Intracomm) -> TimeComm:
    """Wrap a communicator as a line along time. Collective over `mpi`: it is duplicated.

    Give it back when it is done with: `with make_time_comm(mpi) as comm:`, or `comm.free()`.

    Raises:
        LayoutError: on all ranks, if MPI has no communicator left.
    """
    try:
        line, control = mpi.Dup(), mpi.Dup()
    except MPI.Exception as error:
        raise LayoutError(
            f"MPI cannot duplicate the communicator ({error}). It has room for a limited number "
            "of them: free lines that are done with, `with make_time_comm(mpi) as comm:`."
        ) from error
    return TimeComm(line, line.Get_rank(), line.Get_size(), line, control)


def make_comms(mpi: MPI.Intracomm, *, n_groups: int = 1) -> Comms:
    """Make the communicators of a run from one, with lines of equal length. Collective over `mpi`.

    Raises:
        LayoutError: on all ranks, if they cannot be dealt to so many lines.
    """
    n_ranks, rank = mpi.Get_size(), mpi.Get_rank()
    if n_ranks % n_groups:
        raise LayoutError(
            f"{n_ranks} ranks cannot form {n_groups} lines of equal length: start a multiple of "
            f"`run.data_ranks` = {n_groups}, or change it."
        )
    size = n_ranks // n_groups
    group, place = divmod(rank, size)
    if n_groups == 1:
        time = make_time_comm(mpi)
    else:
        line = _split(mpi, group, place)
        time = TimeComm(line, place, size, mpi.Dup(), line.Dup(), group, n_groups)
    return Comms(time=time, data=_split(mpi, place, group), control=mpi.Dup())


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
