"""What a process has held, and whether its machine is busy."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nodepint_mpi.ranks import machine

pytestmark = pytest.mark.mpi(max_size=1)

# user nice system idle iowait irq softirq steal, in ticks
BEFORE = """\
cpu  9 9 9 9 9 9 9 9
cpu0 100 0 0 900 0 0 0 0
cpu1 100 0 0 900 50 0 0 0
"""
AFTER = """\
cpu  9 9 9 9 9 9 9 9
cpu0 150 0 30 900 0 0 0 20
cpu1 100 0 0 975 75 0 0 0
"""


def test_the_share_of_the_cores_that_are_busy(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: stat.write_text(AFTER))
    for cores, share in (([0], 1.0), ([1], 0.0), ([0, 1], 0.5)):  # waiting for a disk is idle
        stat.write_text(BEFORE)
        assert machine.busy_share(cores) == pytest.approx(share)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 2.0, 1.0))
    assert machine.busy_share([0, 7]) == 1.5  # there is no core 7 to be watched
    stat.unlink()
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)
    assert machine.busy_share([0, 1]) == 1.5


def test_the_peak_of_memory_is_that_of_the_system():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the system does not say how much memory a process has held")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert found
    assert machine.peak_bytes() == pytest.approx(1024 * int(found[1]), rel=0.2)


def test_a_machine_has_a_name_and_cores():
    n_cores = len(os.sched_getaffinity(0))
    assert re.fullmatch(rf".+, {n_cores} cores?", machine.describe_machine())


def test_a_process_knows_when_it_started():
    """Between what its parent's clock showed before and after; the system counts in 10 ms."""
    before = time.time()
    code = "import time; time.sleep(0.3); from nodepint_mpi.ranks import machine\n"
    code += "print(machine.started_at(), time.time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    started, ended = map(float, done.stdout.split())
    assert before - 0.03 <= started <= ended - 0.3 + 0.03
