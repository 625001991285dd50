"""What a launcher tells each rank in environment variables: its number, its place on its machine.

Read before MPI starts, so that a machine can be looked at, and a start without MPI noticed. All
functions are local and pure. Importing this module loads neither MPI nor JAX.
"""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple


class Launcher(NamedTuple):
    """The variables of one way of starting ranks; empty where it has none."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str


LAUNCHERS = (
    Launcher(
        "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("PALS", "PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    Launcher("Hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher(
        "MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("PMIx", "PMIX_RANK", "", "", ""),
    Launcher("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    Launcher(
        "SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
    ),
)  # fmt: skip
"""MPI's own launchers before SLURM: under mpirun in a batch job SLURM's variables are those of the
batch shell, the same for all ranks."""

_SAYS_LITTLE = ("SLURM_PROCID", "FLUX_TASK_RANK")  # set where there is no MPI, too


def in_job(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank that a launcher of MPI has started."""
    return any(one.rank in env for one in LAUNCHERS if one.rank not in _SAYS_LITTLE)


def local_rank(env: Mapping[str, str]) -> int | None:
    """The number of this rank among those of its machine, if the launcher says it."""
    return _first_number(env, [one.local_rank for one in LAUNCHERS])


def local_size(env: Mapping[str, str]) -> tuple[int, str] | None:
    """The number of ranks on this machine and the variable that says so."""
    names = [*(one.local_size for one in LAUNCHERS), "SLURM_NTASKS_PER_NODE"]
    return next(((n, name) for name in names if (n := _number(env, name)) is not None), None)


def launched_size(env: Mapping[str, str]) -> int | None:
    """How many ranks the launcher has started, if it says so."""
    return _first_number(env, [one.size for one in LAUNCHERS])


def _first_number(env: Mapping[str, str], names: list[str]) -> int | None:
    return next((n for name in names if (n := _number(env, name)) is not None), None)


def _number(env: Mapping[str, str], name: str) -> int | None:
    """A count; SLURM writes `2(x3)` for 2 on each of 3 machines, and `2,1` where they differ."""
    match = re.fullmatch(r"(\d+)(\(x\d+\))?", env.get(name, "")) if name else None
    return int(match[1]) if match else None
