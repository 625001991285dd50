"""Is this machine ready? Each finding with how to fix it.

Outside a job the stack is asked in a process of its own and two ranks are started for the real
check; inside one (mpirun, srun) the ranks of that job are checked as they are. Importing this
module loads neither MPI nor JAX.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from functools import partial
from typing import Any, NamedTuple

from nodepint_mpi.doctor.check import REBUILD, Check, guarded
from nodepint_mpi.doctor.ranks import (
    agree,
    check_job_ranks,
    check_two_ranks,
    compare_ranks,
    find_launcher,
    gather_ranks,
    settle_ranks,
)
from nodepint_mpi.doctor.table import RankFacts, describe_rank
from nodepint_mpi.ranks.child import run_for_json
from nodepint_mpi.ranks.launcher import in_job, launched_size, local_size

PACKAGES = ("jax", "jaxlib", "equinox", "diffrax", "optax", "numpy", "datasets")
FACTS_TIMEOUT_S = 120.0
LEAST_FREE_BYTES = 2**30

# Ranks on a stack where one of these is bad would hang or only say it again.
_NEEDED_FOR_RANKS = ("packages", "MPI", "one MPI for all", "parallel HDF5")


class Diagnosis(NamedTuple):
    """All findings; in a job also what each rank has."""

    checks: list[Check]
    ranks: list[RankFacts]

    @property
    def healthy(self) -> bool:
        return all(check.ok for check in self.checks)


# ---- Without MPI --------------------------------------------------------------------------


def _check_python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    return Check("python", sys.version_info >= (3, 11), found, "use Python 3.11 or newer")


def _package_versions() -> dict[str, str]:
    """Versions by name; empty where a package is missing."""
    versions = {}
    for name in (*PACKAGES, "mpi4py", "mpi4jax", "h5py"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def _check_packages() -> Check:
    versions = _package_versions()
    missing = [name for name, version in versions.items() if not version]
    if missing:
        return Check(
            "packages", False, f"not installed: {', '.join(missing)}", "run tools/setup.sh"
        )
    return Check("packages", True, ", ".join(map(" ".join, versions.items())))


def _check_cores() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = os.cpu_count() or 1
    found = f"this process may use {usable} of {total}"
    local = local_size(os.environ)
    if local is None:
        return Check("cores", True, f"{found}; so at most {usable} ranks on this machine")
    size, variable = local
    found += f"; {size} ranks on this machine ({variable})"
    if size > total:
        return Check("cores", False, found, f"start at most {total} ranks on a machine like this")
    if size > 1 and usable == total:
        found += "; not bound, so a run divides them among its ranks"
    return Check("cores", True, found)


def _check_space() -> Check:
    found, remedies = [], []
    for use, folder in (("here", os.getcwd()), ("temporary", tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        found.append(f"{use} {free / 2**30:.1f} GiB ({folder})")
        if not os.access(folder, os.W_OK):
            remedies.append(f"go to a folder you may write to instead of {folder}")
        elif free < LEAST_FREE_BYTES:
            remedies.append(
                f"free some space in {folder}, or go to or set TMPDIR to another file system"
            )
    return Check("scratch space", not remedies, ", ".join(found), "; ".join(remedies))


def _check_launcher() -> Check:
    launcher, srun = find_launcher(), shutil.which("srun")
    if launcher is None and srun is None:
        remedy = "load the MPI's module, or on Debian run 'apt-get install openmpi-bin'"
        return Check("mpirun", False, "neither mpirun nor srun is on the PATH", remedy)
    found = [f"{launcher[0]} ({launcher[1]})"] if launcher is not None else []
    found += [srun] if srun is not None else []
    return Check("mpirun", True, ", ".join(found))


# ---- The stack ----------------------------------------------------------------------------


def _facts() -> tuple[dict[str, Any] | None, str]:
    if in_job():
        from nodepint_mpi.doctor import probe

        return probe.facts(), ""
    return run_for_json(
        [sys.executable, "-m", "nodepint_mpi.doctor.probe", "facts"], FACTS_TIMEOUT_S
    )


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


def _stack_checks(facts: dict[str, Any] | None, why: str) -> list[Check]:
    if facts is None:
        found = f"loading MPI, JAX and HDF5 ended the process: {why}"
        remedy = f"put the mpirun of your MPI on the PATH if it is missing above; else {REBUILD}"
        return [Check("MPI", False, found, remedy)]
    checks = (_check_mpi, _check_one_mpi, _check_hdf5, _check_jax)
    return [guarded(check.__name__, partial(check, facts)) for check in checks]


# ---- All of it ----------------------------------------------------------------------------


def diagnose() -> Diagnosis:
    """Look at everything that a run needs.

    Outside a job: Local. Under mpirun or srun: Collective over all ranks, with one answer, and with
    a line for each rank.
    """
    local = (_check_python, _check_packages, _check_cores, _check_space, _check_launcher)
    checks = [guarded(check.__name__, check) for check in local]
    placement = None
    if in_job():  # before JAX starts: each rank would start on the first GPU
        placement, placed = settle_ranks()
        checks += placed
    facts, why = _facts()
    checks += _stack_checks(facts, why)
    ranks: list[RankFacts] = []
    if in_job() and facts is not None and "error" not in facts["mpi4py"]:
        checks = agree(checks)
        ranks = gather_ranks(describe_rank(placement, facts, _package_versions()))
        checks += compare_ranks(ranks)
    if all(check.ok for check in checks if check.name in _NEEDED_FOR_RANKS):
        check_ranks = check_job_ranks if in_job() else check_two_ranks
        checks.append(guarded(check_ranks.__name__, check_ranks))
    return Diagnosis(checks, ranks)


def how_to_start() -> str:
    """What to type where `--mpi` was asked for outside a job of MPI. Local."""
    said = launched_size(os.environ)
    if said is not None and said > 1:
        return (
            f"`nodepint doctor --mpi`: {said} processes were started, but none as a rank of MPI: "
            "give srun `--mpi=pmix` (or pmi2; `srun --mpi=list` shows what there is)."
        )
    return (
        "`nodepint doctor --mpi` looks at the ranks of a job, and this is none: run `mpirun -n 2 "
        "nodepint doctor --mpi`, or in a SLURM job `srun --mpi=pmix nodepint doctor --mpi`."
    )
