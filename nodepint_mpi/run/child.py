"""Processes and jobs started from here, and ended with all their ranks.

Importing this module loads neither MPI nor JAX.
"""

import json
import os
import signal
import subprocess
from typing import Any


def child_env() -> dict[str, str]:
    """The environment to start a job of one's own with. Local."""
    env = dict(os.environ)  # as it was at the start: without what MPI_Init adds to it
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()  # mpirun then ends its ranks, which a kill would leave behind
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_for_json(command: list[str], timeout_s: float) -> tuple[dict[str, Any] | None, str]:
    """The JSON that a command prints as its last line, or nothing and why. Local."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_env(),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {timeout_s:g} s"
    finally:
        if process.poll() is None:
            _end(process)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode == 0 and lines:
        return json.loads(lines[-1]), ""
    words = " ".join(line.strip() for line in err.splitlines() if line.strip(" -"))
    return None, f"exit status {process.returncode}: {words[:400] or 'no message'}"
