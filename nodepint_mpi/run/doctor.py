"""Is this machine ready? Each finding with how to mend it.

Outside a job the stack is asked in a process of its own and two ranks are started for the real
check; inside one (mpirun, srun) the ranks of that job are checked as they are. Importing this
module loads neither MPI nor JAX.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nodepint_mpi.run.child import child_env, run_for_json

PACKAGES = ("jax", "jaxlib", "equinox", "diffrax", "optax", "numpy", "datasets")
RANKS_TIMEOUT_S = 60.0
FACTS_TIMEOUT_S = 120.0
LEAST_FREE_BYTES = 2**30

REBUILD = "run 'tools/setup.sh --again' with the modules loaded that you will run with"

# Set for each rank by mpirun, mpiexec or srun, and by nothing else.
_RANK_VARIABLES = (
    "OMPI_COMM_WORLD_RANK",
    "PMIX_RANK",
    "PMI_RANK",
    "PALS_RANKID",
    "MPI_LOCALRANKID",
)
_LOCAL_SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "PALS_LOCAL_SIZE",
    "SLURM_NTASKS_PER_NODE",
)

# Ranks on a stack where one of these is bad would hang or only say it again.
_NEEDED_FOR_RANKS = ("packages", "MPI", "one MPI for all", "parallel HDF5")


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it is good, what was found, what to do if not."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def in_job() -> bool:
    """Whether this process is a rank that a launcher started. Local."""
    return any(name in os.environ for name in _RANK_VARIABLES)


# ---- Without MPI --------------------------------------------------------------------------


def _check_python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    return Check("python", sys.version_info >= (3, 11), found, "use Python 3.11 or newer")


def _check_packages() -> Check:
    versions, missing = [], []
    for name in (*PACKAGES, "mpi4py", "mpi4jax", "h5py"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check(
            "packages", False, f"not installed: {', '.join(missing)}", "run tools/setup.sh"
        )
    return Check("packages", True, ", ".join(versions))


def _local_size() -> tuple[int, str] | None:
    for name in _LOCAL_SIZE_VARIABLES:
        digits = os.environ.get(name, "").partition("(")[0]
        if digits.isdigit():
            return int(digits), name
    return None


def _check_cores() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = os.cpu_count() or 1
    found = f"this process may use {usable} of {total}"
    local = _local_size()
    if local is None:
        return Check("cores", True, f"{found}; so at most {usable} ranks on this machine")
    size, variable = local
    found += f"; {size} ranks on this machine ({variable})"
    if size > total:
        return Check("cores", False, found, f"start at most {total} ranks on a machine like this")
    if size > 1 and usable == total:
        found += "; not bound, so JAX's threads of the ranks may compete (mpirun --bind-to core)"
    return Check("cores", True, found)


def _check_space() -> Check:
    found, remedies = [], []
    for use, folder in (("here", os.getcwd()), ("temporary", tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        found.append(f"{use} {free / 2**30:.1f} GiB ({folder})")
        if not os.access(folder, os.W_OK):
            remedies.append(f"go to a folder you may write to instead of {folder}")
        elif free < LEAST_FREE_BYTES:
            remedies.append(f"make room in {folder}, or go to or set TMPDIR to another file system")
    return Check("scratch space", not remedies, ", ".join(found), "; ".join(remedies))


def _launcher() -> tuple[str, str] | None:
    """Path and first words of the version of `mpirun` or `mpiexec`."""
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


def _check_launcher() -> Check:
    launcher, srun = _launcher(), shutil.which("srun")
    if launcher is None and srun is None:
        remedy = "load the MPI's module, or on Debian type 'apt-get install openmpi-bin'"
        return Check("mpirun", False, "neither mpirun nor srun is on the PATH", remedy)
    found = [f"{launcher[0]} ({launcher[1]})"] if launcher is not None else []
    found += [srun] if srun is not None else []
    return Check("mpirun", True, ", ".join(found))


# ---- The stack ----------------------------------------------------------------------------


def _facts() -> tuple[dict[str, Any] | None, str]:
    if in_job():
        from nodepint_mpi.run import probe

        return probe.facts(), ""
    return run_for_json([sys.executable, "-m", "nodepint_mpi.run.probe", "facts"], FACTS_TIMEOUT_S)


def _check_mpi(facts: dict[str, Any]) -> Check:
    mpi = facts["mpi4py"]
    if "error" in mpi:
        remedy = "load the module of the MPI that .venv was made with, or " + REBUILD
        return Check("MPI", False, mpi["error"].replace("\n", " "), remedy)
    return Check("MPI", True, f"{mpi['library']}, standard {mpi['standard']}, as mpi4py sees it")


def _check_one_mpi(facts: dict[str, Any]) -> Check:
    """That mpi4py, mpi4jax and h5py all use one and the same MPI library."""
    name = "one MPI for all"
    before: list[str] = []
    for part in ("mpi4py", "mpi4jax", "h5py"):
        libraries = facts[part]["libmpi"]
        if "error" in facts[part] and part != "h5py":
            return Check(name, False, f"{part}: {facts[part]['error']}".replace("\n", " "), REBUILD)
        if before and len(libraries) > len(before):
            other = ", ".join(sorted(set(libraries) - set(before)))
            found = f"mpi4py uses {', '.join(before)}, {part} was built against {other}"
            return Check(name, False, found, REBUILD)
        before = libraries
    if not before:
        found = "the loaded libraries cannot be listed on this system"
        return Check(name, sys.platform != "linux", found, REBUILD)
    found = f"mpi4py, mpi4jax and h5py share {before[0]}"
    return Check(name, len(before) == 1, found if len(before) == 1 else ", ".join(before), REBUILD)


def _check_hdf5(facts: dict[str, Any]) -> Check:
    h5py = facts["h5py"]
    if "error" in h5py:
        return Check("parallel HDF5", False, h5py["error"].replace("\n", " "), REBUILD)
    kind = "with MPI" if h5py["mpi"] else "without MPI (a ready-made wheel, not our build)"
    return Check("parallel HDF5", h5py["mpi"], f"HDF5 {h5py['hdf5']}, h5py built {kind}", REBUILD)


def _check_jax(facts: dict[str, Any]) -> Check:
    jax = facts["jax"]
    if "error" in jax:
        remedy = "run tools/setup.sh; is JAX_PLATFORMS set to something that is not here?"
        return Check("JAX", False, jax["error"].replace("\n", " "), remedy)
    found = f"backend {jax['backend']} ({', '.join(jax['devices'])}), float64 "
    if not jax["float64"]:
        remedy = "set JAX_PLATFORMS=cpu: this device has no double precision"
        return Check("JAX", False, found + "does not work", remedy)
    found += "works"
    if jax["backend"] == "cpu" and os.path.exists("/dev/nvidia0"):
        found += "; there is an NVIDIA GPU, but this JAX has no CUDA"
    if jax["backend"] in ("gpu", "cuda") and not facts["mpi4jax"].get("cuda", False):
        remedy = f"set JAX_PLATFORMS=cpu, or with nvcc on the PATH {REBUILD}"
        return Check("JAX", False, f"{found}; mpi4jax was built without CUDA", remedy)
    return Check("JAX", True, found)


def _stack_checks() -> list[Check]:
    facts, why = _facts()
    if facts is None:
        found = f"loading MPI, JAX and HDF5 ended the process: {why}"
        remedy = f"put the mpirun of your MPI on the PATH if it is missing above; else {REBUILD}"
        return [Check("MPI", False, found, remedy)]
    checks = (_check_mpi, _check_one_mpi, _check_hdf5, _check_jax)
    return [_guarded(check.__name__, partial(check, facts)) for check in checks]


# ---- Ranks --------------------------------------------------------------------------------


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


def _check_job_ranks() -> Check:
    """The ranks of the job this process is in. Collective over all ranks."""
    from nodepint_mpi.parallel.comms import world
    from nodepint_mpi.run import probe

    return _judge_ranks("ranks", probe.check_ranks(world(), os.getcwd(), RANKS_TIMEOUT_S))


def _check_two_ranks() -> Check:
    """Two ranks that are started for this check alone."""
    name = "two ranks"
    launcher = _launcher()
    if launcher is None:
        if shutil.which("srun") is None:
            return Check(name, False, "not checked: there is no mpirun", "see mpirun above")
        found = "not checked: only srun is here; do it with 'srun -n 2 nodepint doctor'"
        return Check(name, True, found)
    path, version = launcher
    # Two ranks must do even where only one core is given, and timing does not matter.
    unbound = ["--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    with tempfile.TemporaryDirectory(prefix="nodepint-doctor-") as folder:
        probe = [sys.executable, "-m", "mpi4py", "-m", "nodepint_mpi.run.probe", "ranks", folder]
        command = [path, "-n", "2", *unbound, *probe, str(RANKS_TIMEOUT_S)]
        result, why = run_for_json(command, RANKS_TIMEOUT_S + 10)
    if result is None:
        remedy = f"try 'mpirun -n 2 hostname'; if that works, {REBUILD}"
        return Check(name, False, why, remedy)
    if result["size"] != 2:
        found = f"{path} ({version}) started two jobs of one rank: it belongs to another MPI"
        return Check(name, False, found, "put the mpirun of the MPI named above first on the PATH")
    return _judge_ranks(name, result)


# ---- All of it ----------------------------------------------------------------------------


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that itself breaks is a finding, too."""
    try:
        return check()
    except Exception as error:  # a doctor that crashes helps nobody
        label = name.removeprefix("_check_").replace("_", " ")
        found = f"the check itself failed: {type(error).__name__}: {error}"
        return Check(label, False, found, "please report this with the output above")


def _agree(checks: list[Check]) -> list[Check]:
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


def diagnose() -> list[Check]:
    """Look at everything that a run needs.

    Outside a job: Local. Under mpirun or srun: Collective over all ranks, with one answer.
    """
    local = (_check_python, _check_packages, _check_cores, _check_space, _check_launcher)
    checks = [_guarded(check.__name__, check) for check in local] + _stack_checks()
    works = all(check.ok for check in checks if check.name == "MPI")
    if in_job() and works:
        checks = _agree(checks)
    if not all(check.ok for check in checks if check.name in _NEEDED_FOR_RANKS):
        return checks
    check_ranks = _check_job_ranks if in_job() else _check_two_ranks
    return [*checks, _guarded(check_ranks.__name__, check_ranks)]


def run_doctor() -> tuple[list[Check], bool]:
    """The findings, and whether all are good. Local or collective, as `diagnose`."""
    checks = diagnose()
    return checks, all(check.ok for check in checks)


def format_checks(checks: list[Check]) -> str:
    """The findings as lines of text, each bad one with its remedy below it. Local."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.found}")
        if not check.ok and check.remedy:
            lines.append(f"{'':{width + 6}}  to mend it: {check.remedy}")
    bad = sum(not check.ok for check in checks)
    lines.append("all good" if bad == 0 else f"{bad} of {len(checks)} checks failed")
    return "\n".join(lines)
