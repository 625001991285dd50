"""One writer for a folder, and nobody locked out by one that is gone."""

import os
import signal
import subprocess
import sys

import pytest

from nodepint_mpi.errors import OutputError
from nodepint_mpi.io import lock
from nodepint_mpi.io.lock import LOCK, locking

pytestmark = pytest.mark.mpi(max_size=1)
HOLD = """
import sys
from pathlib import Path
from nodepint_mpi.io.lock import locking
with locking(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_ends(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"SLURM_JOB_ID": "4711"},
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            OutputError, match=f"process {holder.pid}, job 4711, since 20"
        ) as caught:
            with locking(tmp_path):
                pass
        assert "\n" not in str(caught.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert f"process {holder.pid}" in (tmp_path / LOCK).read_text()  # its text is still there
    for _ in range(2):
        with locking(tmp_path):
            assert f"process {os.getpid()}," in (tmp_path / LOCK).read_text()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="cannot write .*lock"), locking(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_where_there_are_no_locks_a_warning_is_logged(tmp_path, monkeypatch, caplog):
    def refuse(handle, operation):
        raise OSError(lock.errno.ENOLCK, os.strerror(lock.errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with caplog.at_level("WARNING", "nodepint_mpi"), locking(tmp_path):
        pass
    assert "start only one job" in caplog.text
