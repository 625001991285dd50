"""The communicators of a run. The only file that names `COMM_WORLD`."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from mpi4py import MPI


@dataclass(frozen=True, eq=False)
class TimeComm:
    """A line of ranks along time, in the order of the slices. Compared by identity.

    `mpi` is used by mpi4jax alone, inside jitted code. Mixing it with mpi4py calls gives wrong
    numbers without an error while a jitted call is in flight.
    """

    mpi: MPI.Intracomm
    rank: int
    size: int


class Comms(NamedTuple):
    """The communicators of a run, by role.

    `time` carries arrays inside jitted code; `control` carries agreement on stop, failure and
    files, by mpi4py only.
    """

    time: TimeComm
    control: MPI.Intracomm


def make_time_comm(mpi: MPI.Intracomm) -> TimeComm:
    """Wrap a communicator as a line along time. Collective over `mpi`: it is duplicated."""
    duplicate = mpi.Dup()
    return TimeComm(duplicate, duplicate.Get_rank(), duplicate.Get_size())


def make_comms(mpi: MPI.Intracomm) -> Comms:
    """Make the communicators of a run from one. Collective over `mpi`."""
    return Comms(time=make_time_comm(mpi), control=mpi.Dup())


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
