"""The throwaway cluster leaves nothing behind, however it ends, and says why it cannot begin."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.small_case import wait_for
from tests.jobs.real_slurm import TOOL

# `slurm`: where no cluster can be, nothing is tried, or CI says so.
pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.usefixtures("slurm")]

# A job that does not want to go, with a process that leaves its session and its parent.
JOB = """
echo "$SLURM_CONF"
job=$(sbatch --parsable --output=job.log --wrap '(setsid sleep 1000 &); trap : TERM; touch runs;
    while :; do sleep 1000; done')
while [ ! -e runs ]; do sleep 0.1; done
"""


def processes(conf: str) -> list[str]:
    """What still runs with this cluster in its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_CONF={conf}".encode() in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_bytes().decode())
        except OSError:  # gone
            continue
    return found


def start(folder: Path, script: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, TOOL, "--nodes=1", "sh", "-c", script],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_command_ends_and_all_else_with_it(tmp_path):
    said, errors = start(tmp_path, JOB + "exit 7").communicate(timeout=50)
    conf = said.strip()
    assert conf.endswith("slurm.conf"), errors
    assert not Path(conf).parent.exists()
    assert processes(conf) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_told_to_stop_or_killed_it_takes_all_daemons_with_it(tmp_path, number):
    with start(tmp_path, 'echo "$SLURM_CONF"; exec cat') as tool:
        assert tool.stdout is not None
        conf = tool.stdout.readline().strip()
        assert len(processes(conf)) >= 4  # munged, slurmctld, slurmd, cat
        tool.send_signal(number)
        assert tool.wait(50) == (143 if number == signal.SIGTERM else -number)
    wait_for(lambda: processes(conf) == [], limit_s=20)  # `cat` has seen the end of its input
    assert number == signal.SIGKILL or not Path(conf).parent.exists()
    shutil.rmtree(Path(conf).parent, ignore_errors=True)


def test_the_exit_status_is_the_commands(tmp_path):
    tool = start(tmp_path, "sinfo; exit 7")
    said, _ = tool.communicate(timeout=50)
    assert tool.returncode == 7
    assert "idle" in said


def test_a_daemon_that_does_not_start_is_named_with_its_last_words(tmp_path):
    munged = tmp_path / "munged"
    munged.write_text("#!/bin/sh\necho no luck\nexit 3\n")
    munged.chmod(0o755)
    tool = start(tmp_path, "true", env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    _, errors = tool.communicate(timeout=50)
    assert tool.returncode == 1
    assert "munged has ended by itself\n--- munged.log\nno luck" in errors


def test_a_machine_without_slurm_is_told_what_is_missing(tmp_path):
    tool = start(tmp_path, "true", env=os.environ | {"PATH": str(tmp_path)})
    _, errors = tool.communicate(timeout=50)
    assert tool.returncode == 2
    assert "this machine lacks munged, slurmctld, slurmd" in errors
