"""A failure on any rank is everybody's, in one step and with one reason."""

import os
import signal
import subprocess
import sys

import pytest

from nodepint_mpi.errors import DataError
from nodepint_mpi.ranks.guard import run_guarded
from nodepint_mpi.ranks.signals import StopFlag


def test_an_explained_error_is_printed_once_and_gives_2(comm, capsys):
    def main():
        raise DataError("no such file")

    assert run_guarded(main) == 2
    assert capsys.readouterr().err == ("nodepint: no such file\n" if comm.rank == 0 else "")


def test_the_exit_code_is_that_of_the_program():
    assert run_guarded(lambda: 0) == 0
    assert run_guarded(lambda: 3) == 3


@pytest.mark.mpi(max_size=1)
def test_an_unexplained_error_on_the_only_rank_gives_1_and_a_traceback(capsys):
    assert run_guarded(lambda: 1 // 0) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "nodepint: rank 0 on " in printed
    assert printed.rstrip().endswith("ZeroDivisionError: integer division or modulo by zero")


@pytest.mark.mpi(max_size=1)
def test_an_interrupt_gives_130():
    def main():
        raise KeyboardInterrupt

    assert run_guarded(main) == 130


@pytest.mark.mpi(max_size=1)
def test_guard_and_signals_start_neither_mpi_nor_jax():
    code = """if True:
        import sys
        from nodepint_mpi.errors import ConfigError
        from nodepint_mpi.ranks import guard, signals
        signals.StopFlag().install()
        def main():
            raise ConfigError("unknown key")
        assert guard.run_guarded(main) == 2
        assert not {"mpi4py.MPI", "jax", "numpy"} & set(sys.modules), sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "nodepint: unknown key\n")


@pytest.fixture
def stop():
    """A stop flag whose handlers are taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield StopFlag().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_is_seen_by_all(comm, stop, number):
    assert not stop.requested_anywhere(comm)
    if comm.rank == comm.size - 1:
        os.kill(os.getpid(), number)
    assert stop.requested_anywhere(comm)
    assert stop.received == (number if comm.rank == comm.size - 1 else None)


def test_signals_are_ignored_once_the_work_is_done(comm, stop):
    stop.ignore()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not stop.requested_anywhere(comm)
