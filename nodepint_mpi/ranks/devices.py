"""Giving each rank its GPU, or its cores, before JAX starts. The decision is in `placement`.

Importing this module loads neither MPI nor JAX.
"""

import importlib.util
import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nodepint_mpi.errors import PlacementError
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.ranks.launcher import launched_size, local_rank
from nodepint_mpi.ranks.libmpi import is_cuda_aware
from nodepint_mpi.ranks.placement import (
    Placement,
    Seen,
    gpu_environment,
    plan_placement,
    visible_gpus,
)

if TYPE_CHECKING:
    from mpi4py import MPI

NVIDIA_SMI_S = 30.0  # the driver of an idle GPU may have to be loaded

_log = logging.getLogger(__name__)


def look() -> Seen:
    """What this rank sees of its machine, without starting JAX. Local.

    Raises:
        PlacementError: if `CUDA_VISIBLE_DEVICES` names what is no GPU.
    """
    gpus = visible_gpus(os.environ, _list_gpus()) if _jax_wants_gpus(os.environ) else ()
    return Seen(socket.gethostname(), local_rank(os.environ), gpus, own_cores())


def own_cores() -> tuple[int, ...]:
    """The cores this process may run on, those of one physical core side by side. Local.

    Empty where the system does not bind processes to cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    return in_hardware_order(os.sched_getaffinity(0), Path("/sys/devices/system/cpu"))


def in_hardware_order(cores: Iterable[int], folder: Path) -> tuple[int, ...]:
    """Cores in an order that can be cut without parting hardware threads of one core. Local."""

    def place(core: int) -> tuple[int, int]:
        try:
            siblings = (folder / f"cpu{core}/topology/thread_siblings_list").read_text()
        except OSError:  # not Linux, or hidden in a container
            return core, core
        first = re.match(r"\d+", siblings)
        return int(first[0]) if first else core, core

    return tuple(sorted(cores, key=place))


def settle(
    control: "MPI.Intracomm", *, share_gpus: bool = False, cuda_mpi: bool = False
) -> list[Placement]:
    """Give every rank its GPU and its cores. Before JAX starts; once JAX runs, in vain.

    Collective over `control`. Ranks that MPI's launcher has left unbound on the same cores divide
    them: each of them would else start as many threads as there are cores.

    Args:
        control: The ranks.
        share_gpus: Whether ranks may share a GPU; its memory is then divided as well.
        cuda_mpi: Whether messages go from GPU to GPU, if MPI can.

    Returns:
        What every rank takes, in the order of ranks.

    Raises:
        PlacementError: on all ranks, if there are fewer GPUs than ranks and `share_gpus` is not
            set, or what the launcher has set makes no sense.
    """
    check_launch(control.size, os.environ)
    mine: Seen | None = None
    with together(control):
        mine = look()
    assert mine is not None  # else `together` has raised
    placements = plan_placement(control.allgather(mine), share_gpus=share_gpus)
    own = placements[control.rank]
    if own.cores and set(own.cores) != set(mine.cores):
        os.sched_setaffinity(0, own.cores)
    if own.gpu is not None:
        _take_gpu(own, cuda_mpi=cuda_mpi)
    if control.rank == 0:
        for line in describe_plan(placements, n_visible=len(mine.gpus)):
            _log.info("%s", line)
    _log.debug("local rank %d: GPU %s, cores %s", own.local_rank, own.gpu, own.cores)
    return placements


def check_launch(size: int, env: Mapping[str, str]) -> None:
    """Notice ranks that were started as strangers, each of which would do the whole run. Local.

    Raises:
        PlacementError: if the launcher has started several and MPI knows one.
    """
    launched = launched_size(env)
    if size == 1 and launched is not None and launched > 1:
        raise PlacementError(
            f"The launcher has started {launched} ranks, but MPI knows only this one: start with "
            "the mpirun of the MPI that `nodepint doctor` names, or with `srun --mpi=pmix` (or "
            "pmi2; see `srun --mpi=list`)."
        )


def describe_plan(placements: list[Placement], *, n_visible: int) -> list[str]:
    """What a user should know of the GPUs in use, as seen from rank 0. Local; none without GPUs."""
    first = placements[0]
    if first.gpu is None:
        return []
    if first.n_sharing > 1:
        return [f"GPUs are shared: up to {max(p.n_sharing for p in placements)} ranks on one"]
    idle = n_visible - first.local_size
    lines = ["every rank has a GPU of its own"]
    if n_visible > 1 and idle > 0:
        lines.append(
            f"{n_visible} GPUs and {first.local_size} rank(s) on a machine: {idle} stay idle; "
            "start more ranks to use them"
        )
    return lines


def _take_gpu(own: Placement, *, cuda_mpi: bool) -> None:
    """Let JAX see this rank's GPU alone. MPI may have started CUDA: its variable is too late."""
    aware = is_cuda_aware()
    if cuda_mpi and aware is False:
        _log.warning(
            "`run.cuda_mpi` is set, but this MPI says that it cannot send GPU memory: messages "
            "go through the host's"
        )
    os.environ |= gpu_environment(os.environ, own, cuda_mpi=cuda_mpi, is_cuda_aware=aware)
    import jax

    assert own.gpu is not None  # the caller's condition
    jax.config.update("jax_cuda_visible_devices", str(own.gpu.ordinal))


def _jax_wants_gpus(env: Mapping[str, str]) -> bool:
    """Whether this JAX would use an NVIDIA GPU."""
    platforms = env.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    # JAX's plugins are found by these names (jax/_src/xla_bridge.py, jax_plugins).
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return any(importlib.util.find_spec(name) is not None for name in plugins)


def _list_gpus() -> list[str] | None:
    """Unique names of the GPUs that the driver shows, or None if it cannot be asked."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpu_list(done.stdout)


def parse_gpu_list(text: str) -> list[str]:
    """The unique names in what `nvidia-smi -L` prints: `GPU 0: NVIDIA H100 (UUID: GPU-...)`."""
    return re.findall(r"^GPU \d+: .*\(UUID: (GPU-[0-9a-fA-F-]+)\)", text, re.MULTILINE)
