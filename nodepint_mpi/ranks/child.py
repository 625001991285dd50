"""Processes and jobs started from here, and ended with all their ranks.

Importing this module loads neither MPI nor JAX.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from nodepint_mpi.errors import ConfigError


def child_env() -> dict[str, str]:
    """The environment to start a job of one's own with. Local."""
    env = dict(os.environ)  # as it was at the start: without what MPI_Init adds to it
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


def _end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """End it; what it had printed by then."""
    process.terminate()  # mpirun then ends its ranks, which a kill would leave behind
    try:
        return process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def find_mpirun() -> str:
    """The path of what starts several ranks here. Local.

    Raises:
        ConfigError: if there is none.
    """
    path = shutil.which("mpirun") or shutil.which("mpiexec")
    if path is None:
        raise ConfigError("There is no mpirun on the PATH to start several ranks with.")
    return path


def cores_for(n_ranks: int) -> list[int]:
    """The cores of this process, enough for so many ranks. Local.

    Raises:
        ConfigError: if there are more ranks than cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if n_ranks > len(cores):
        raise ConfigError(
            f"`--ranks {n_ranks}`: this machine has {len(cores)} cores for this process, and "
            "timings on shared cores are meaningless."
        )
    return cores


class Ended(NamedTuple):
    """What a command that was started here came to; `why` it failed, empty if it did not."""

    out: str
    err: str
    why: str


def run_child(
    command: Sequence[str],
    timeout_s: float,
    *,
    settings: Mapping[str, str] | None = None,
    cores: Collection[int] | None = None,
    held: Sequence[int] = (),
) -> Ended:
    """Run a command to its end, or end it with all it has started. Local.

    Args:
        command: Its words.
        timeout_s: How long it may take.
        settings: Environment variables besides `child_env`.
        cores: All that it may use; those of this process if None.
        held: File descriptors that stay open in it.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_env() | dict(settings or {}),
        start_new_session=True,
        pass_fds=held,
        preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        out, err = _end(process)
        return Ended(out, err, f"no answer within {timeout_s:g} s")
    finally:
        if process.poll() is None:
            _end(process)
    return Ended(out, err, "" if process.returncode == 0 else _why(process.returncode, err))


def run_for_json(command: list[str], timeout_s: float) -> tuple[dict[str, Any] | None, str]:
    """The JSON that a command prints as its last line, or nothing and why. Local."""
    out, err, why = run_child(command, timeout_s)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if not why and lines:
        return json.loads(lines[-1]), ""
    return None, why or _why(0, err)


def _why(code: int, err: str) -> str:
    """What a command has said on its way out: its own message, if there is one."""
    said = [line.strip() for line in err.splitlines() if line.strip(" -")]
    own = [line.removeprefix("nodepint: ") for line in said if line.startswith("nodepint: ")]
    words = " ".join(own[:1] or said)
    return f"exit status {code}: {words[:400] or 'no message'}"
