"""A line of ranks with what is the same in every sweep of a solve."""

from typing import NamedTuple

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.types import Params
from nodepint_mpi.parallel.comms import TimeComm


class Line(NamedTuple):
    """Ranks along time, the slices this one owns, and the parameters of the vector field.

    Parameters are floating-point arrays, replicated; `core.sample_params.SampleParams` also hold
    what the samples bring to the slices of this rank.
    """

    comm: TimeComm
    owned: OwnedSlices
    params: Params
