"""Crafted files with a valid seal are refused in a sentence, or read rightly: `fuzz_files.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(200)]
TOOL = Path(__file__).parents[2] / "tools" / "fuzz_files.py"


def test_crafted_files_run_no_code_and_bring_no_foreign_values():
    command = [sys.executable, str(TOOL), "--number", "60", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert kinds == ["checkpoint", "rom", "metrics", "lines", "table"]
