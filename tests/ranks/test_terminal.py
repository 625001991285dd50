"""The terminal of a launcher: found through processes as the system describes them."""

import os
import pty
import termios
from pathlib import Path

import pytest

from nodepint_mpi.ranks.terminal import terminal_width

pytestmark = pytest.mark.mpi(max_size=1)


@pytest.fixture
def terminal():
    """A terminal of 97 columns: its file."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 97))
    yield slave
    os.close(slave)
    os.close(master)


def make_process(proc: Path, pid: int, parent: int, name: str, stderr: str) -> None:
    """What /proc says of a process."""
    (proc / str(pid) / "fd").mkdir(parents=True)
    (proc / str(pid) / "comm").write_text(f"{name}\n")
    (proc / str(pid) / "stat").write_text(f"{pid} ({name} (x)) S {parent} 1 1\n")
    (proc / str(pid) / "fd" / "2").symlink_to(stderr)


def test_the_terminal_of_the_launcher_is_that_of_its_ranks(tmp_path, terminal):
    make_process(tmp_path, 30, 20, "python", "/dev/null")
    make_process(tmp_path, 20, 10, "hydra_pmi_proxy", "/dev/null")
    make_process(tmp_path, 10, 1, "mpiexec.hydra", os.ttyname(terminal))
    with open(os.devnull, "w") as stream:
        assert terminal_width(stream, pid=30, proc=tmp_path) == 97


@pytest.mark.parametrize("name", ["mpirun", "bash"])
def test_a_file_is_no_terminal_and_a_shell_no_launcher(tmp_path, terminal, name):
    make_process(tmp_path, 30, 20, "python", "/dev/null")
    stderr = "/dev/null" if name == "mpirun" else os.ttyname(terminal)
    make_process(tmp_path, 20, 1, name, stderr)
    with open(os.devnull, "w") as stream:
        assert terminal_width(stream, pid=30, proc=tmp_path) is None
        assert terminal_width(stream, pid=30, proc=tmp_path / "none") is None


def test_a_terminal_of_its_own_comes_first(tmp_path, terminal):
    with open(terminal, "w", closefd=False) as stream:
        assert terminal_width(stream, pid=30, proc=tmp_path) == 97
