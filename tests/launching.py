"""Jobs of several ranks that a test starts."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
from mpi4py import MPI


def run_job(n_ranks: int, *command, timeout_s: float = 60.0, env=None, cwd=None):
    """What the fixture `mpirun` does. Local."""
    open_mpi = "Open MPI" in MPI.Get_library_version()
    own = ("OMPI_", "PMIX_", "PMI_")
    kept = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    clean = {k: v for k, v in os.environ.items() if k in kept or not k.startswith(own)}
    if os.geteuid() == 0:
        clean |= dict.fromkeys(kept, "1")
    repository = str(Path(__file__).parent.parent)
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, [repository, clean.get("PYTHONPATH")]))
    launcher = ["mpirun", "-n", str(n_ranks)]
    if open_mpi:
        launcher += ["--oversubscribe", "--bind-to", "none"]
    process = subprocess.Popen(
        [*launcher, *map(str, command)],
        env=clean | (env or {}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # mpirun then ends its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {timeout_s:g} s\n--- stdout\n{out}\n--- stderr\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
