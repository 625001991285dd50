"""The part of `nodepint doctor` that looks at ranks: those of this job, or two started for it.

Importing this module loads neither MPI nor JAX.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

from nodepint_mpi.doctor.check import REBUILD, Check
from nodepint_mpi.doctor.table import RankFacts, find_findings
from nodepint_mpi.errors import NodepintError
from nodepint_mpi.ranks.child import child_env, run_for_json
from nodepint_mpi.ranks.placement import Placement

RANKS_TIMEOUT_S = 60.0


# ---- Ranks of this job --------------------------------------------------------------------


def settle_ranks() -> tuple[Placement | None, list[Check]]:
    """Give each rank its GPU and cores, as a run does. Collective over all ranks, if MPI loads.

    Returns:
        What this rank takes, and a finding, equal on all ranks.
    """
    try:
        from nodepint_mpi.parallel.comms import world
    except (ImportError, RuntimeError):  # said where the stack is looked at
        return None, []
    from nodepint_mpi.ranks.devices import settle

    comm, placements, failure = world(), None, ""
    for share in (False, True):  # shared, so that the other checks fit on too few GPUs
        try:
            placements = settle(comm, share_gpus=share)
            break
        except NodepintError as error:  # raised by all ranks
            failure = failure or str(error)
    own = None if placements is None else placements[comm.Get_rank()]
    if placements is None or own is None or failure:
        return own, [Check("placement", False, failure)]
    return own, [Check("placement", True, describe_placements(placements))]


def describe_placements(placements: list[Placement]) -> str:
    """On what the ranks run. Local."""
    n_hosts = len({one.host for one in placements})
    here = [set(one.cores) for one in placements if one.host == placements[0].host]
    if placements[0].gpu is not None:
        what = "a GPU each"
    elif len(set().union(*here)) == sum(map(len, here)):
        what = "cores of their own, no GPU"
    else:
        what = "cores shared with other ranks, no GPU"
    return f"{len(placements)} ranks on {n_hosts} machine(s): {what}"


def gather_ranks(own: RankFacts) -> list[RankFacts]:
    """What every rank has, in order. Collective over all ranks."""
    from nodepint_mpi.parallel.comms import world

    return world().allgather(own)


def compare_ranks(ranks: list[RankFacts]) -> list[Check]:
    """What differs between the ranks; what only may matter is told and passes. Local."""
    findings = find_findings(ranks)
    remedy = "load the same modules on all machines, and use one .venv that all see"
    checks = [
        Check(f"same {one.name}", not one.matters, one.found, remedy if one.matters else "")
        for one in findings
    ]
    if not any(one.matters for one in findings):
        checks.append(Check("same everywhere", True, "MPI, HDF5, packages and settings agree"))
    return checks


def _judge_ranks(name: str, result: dict[str, Any]) -> Check:
    size, hosts = result["size"], result["hosts"]
    if len(result["libraries"]) > 1:
        found = f"the ranks use different MPI libraries: {', '.join(result['libraries'])}"
        return Check(name, False, found, "load the same modules on all machines")
    if result["problems"]:
        return Check(name, False, "; ".join(result["problems"][:2]), REBUILD)
    where = "on 1 machine" if hosts == 1 else f"on {hosts} machines"
    found = f"{size} ranks {where}: allreduce inside jit, collective write and read"
    return Check(name, True, found)


def check_job_ranks() -> Check:
    """The ranks of the job this process is in. Collective over all ranks."""
    from nodepint_mpi.doctor import probe
    from nodepint_mpi.parallel.comms import world

    return _judge_ranks("ranks", probe.check_ranks(world(), os.getcwd(), RANKS_TIMEOUT_S))


def check_two_ranks() -> Check:
    """Two ranks that are started for this check alone. Local."""
    name = "two ranks"
    launcher = find_launcher()
    if launcher is None:
        if shutil.which("srun") is None:
            return Check(name, False, "not checked: there is no mpirun", "see mpirun above")
        found = "not checked: only srun is here; do it with 'srun -n 2 nodepint doctor'"
        return Check(name, True, found)
    path, version = launcher
    # Two ranks must do even where only one core is given, and timing does not matter.
    unbound = ["--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    with tempfile.TemporaryDirectory(prefix="nodepint-doctor-") as folder:
        probe = [sys.executable, "-m", "mpi4py", "-m", "nodepint_mpi.doctor.probe", "ranks", folder]
        command = [path, "-n", "2", *unbound, *probe, str(RANKS_TIMEOUT_S)]
        result, why = run_for_json(command, RANKS_TIMEOUT_S + 10)
    if result is None:
        remedy = f"try 'mpirun -n 2 hostname'; if that works, {REBUILD}"
        return Check(name, False, why, remedy)
    if result["size"] != 2:
        found = f"{path} ({version}) started two jobs of one rank: it belongs to another MPI"
        return Check(name, False, found, "put the mpirun of the MPI named above first on the PATH")
    return _judge_ranks(name, result)


def find_launcher() -> tuple[str, str] | None:
    """Path and first words of the version of `mpirun` or `mpiexec`. Local."""
    for name in ("mpirun", "mpiexec"):
        path = shutil.which(name)
        if path is not None:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=30, env=child_env()
            )
            text = " ".join((done.stdout + done.stderr).split()[:8])
            version = text.partition(" Report ")[0].partition(" Release ")[0]
            return path, version or "says no version"
    return None


def agree(checks: list[Check]) -> list[Check]:
    """Rank 0's findings and what is bad on other ranks. Collective over all ranks."""
    from nodepint_mpi.parallel.comms import world

    agreed: list[Check] = []
    seen: set[tuple[str, str]] = set()
    for rank, theirs in enumerate(world().allgather((platform.node(), checks))):
        host, found = theirs
        for check in found:
            if rank == 0:
                agreed.append(check)
            elif not check.ok and (check.name, check.found) not in seen:
                agreed.append(replace(check, found=f"rank {rank} on {host}: {check.found}"))
            seen.add((check.name, check.found))
    return agreed
