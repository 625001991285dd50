"""A rank that raises, is killed, stopped, gone or hangs ends the whole job, and is named."""

import re
import socket
import sys
import time

import pytest

from tests.cli.failing import failing_program

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(120)]

HANGS_S = 80.0  # the promise of 20 s is for an idle machine: tests/ranks/test_watchdog.py


@pytest.fixture
def job(mpirun, tmp_path):
    """Run a program whose rank `guilty` fails after 5 steps; return what it wrote to stderr."""

    def run(body, *, n_ranks, guilty, because, code=None, **limits):
        program = tmp_path / "program.py"
        program.write_text(failing_program(body, **limits))
        done = mpirun(n_ranks, sys.executable, program, guilty, timeout_s=90)
        ended = time.time()
        failed = re.search(r"FAILS ([\d.]+)", done.stdout)
        assert failed, done.stdout + done.stderr
        print(f"{ended - float(failed[1]):.1f} s from the failure to the end of the job")
        print(done.stderr)
        assert done.returncode == code if code is not None else done.returncode != 0
        assert ended - float(failed[1]) < HANGS_S
        messages = re.findall(r"^nodepint: rank .*$", done.stderr, re.MULTILINE)
        if because is not None:
            assert len(messages) == 1, messages
            assert re.match(rf"nodepint: rank {guilty} on \S+: .*{because}", messages[0])
        return done.stderr

    return run


@pytest.mark.parametrize(("n_ranks", "guilty"), [(2, 1), (3, 0)])
def test_a_rank_that_raises(job, n_ranks, guilty):
    errors = job(
        """
        if rank == guilty:
            failing()
            raise ValueError("the reason")
        step(watchdog, 5)
        """,
        n_ranks=n_ranks,
        guilty=guilty,
        because="ValueError: the reason",
        code=1,
    )
    assert errors.count("Traceback") == 1


def test_a_rank_that_is_out_of_memory(job):
    """Refused by the system; where it kills instead, that is the test of a rank that is killed."""
    job(
        """
        if rank == guilty:
            import resource
            held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, resource.RLIM_INFINITY))
            failing()
            bytearray(2**32)
        step(watchdog, 5)
        """,
        n_ranks=2,
        guilty=1,
        because="MemoryError",
        code=1,
    )


def test_an_explained_error_on_one_rank_only(job):
    job(
        """
        if rank == guilty:
            failing()
            raise DataError("no such file")
        step(watchdog, 5)
        """,
        n_ranks=2,
        guilty=1,
        because="no such file",
        code=2,
    )


def test_an_explained_error_of_all_ranks_is_printed_once(job):
    errors = job(
        """
        with together(comms.control):
            if rank == guilty:
                failing()
                raise DataError("no such file")
        """,
        n_ranks=3,
        guilty=1,
        because=None,
        code=2,
    )
    assert re.findall("^nodepint: .*", errors, re.MULTILINE) == [
        f"nodepint: rank 1 on {socket.gethostname()}: no such file"
    ]


@pytest.mark.parametrize(("n_ranks", "guilty"), [(2, 1), (3, 0)])
def test_a_rank_that_is_killed(job, n_ranks, guilty):
    errors = job(
        """
        if rank == guilty:
            failing()
            os.kill(os.getpid(), signal.SIGKILL)
        step(watchdog, 5)
        """,
        n_ranks=n_ranks,
        guilty=guilty,
        because=None,
    )
    # mpirun is told first and usually says so before a watchdog can
    assert re.search(rf"rank {guilty} .*(is gone|signal 9)", errors)


@pytest.mark.parametrize(("n_ranks", "guilty"), [(2, 1), (3, 0)])
def test_a_rank_that_is_stopped(job, n_ranks, guilty):
    errors = job(
        """
        if rank == guilty:
            failing()
            os.kill(os.getpid(), signal.SIGSTOP)
        step(watchdog, 5)
        """,
        n_ranks=n_ranks,
        guilty=guilty,
        because="not responded",
    )
    assert f"stacks of rank {1 - guilty} " in errors


@pytest.mark.parametrize(("n_ranks", "guilty"), [(2, 0), (3, 1)])
def test_a_rank_that_sleeps_while_the_others_wait(job, n_ranks, guilty):
    errors = job(
        """
        if rank == guilty:
            failing()
            with watchdog.phase("reading batch", step=5):
                time.sleep(1000)
        step(watchdog, 5)
        """,
        n_ranks=n_ranks,
        guilty=guilty,
        because=r"in 'reading batch' \(step 5\) for .* wait .* in 'training step' \(step 5\)",
    )
    for rank in range(n_ranks):
        assert f"stacks of rank {rank} " in errors
    assert "in step" in errors


def test_all_ranks_stuck_in_the_jitted_step(job):
    errors = job(
        """
        with watchdog.phase("training step", collective=True, step=5):
            if rank == guilty:  # never matched
                failing()
                unmatched = jax.jit(lambda x: mpi4jax.recv(x, 0, tag=9, comm=comms.time.mpi))
                unmatched(jnp.ones(3)).block_until_ready()
            add(jnp.ones(3)).block_until_ready()
        """,
        n_ranks=2,
        guilty=1,
        because=None,
    )
    messages = re.findall(r"^nodepint: rank .*$", errors, re.MULTILINE)
    assert len(messages) == 1
    assert messages[0].endswith("no rank returned from 'training step' (step 5) within 15 s")
    assert "stacks of rank 0 " in errors
    assert "stacks of rank 1 " in errors


@pytest.mark.parametrize(
    "body",
    [
        """
        if rank == guilty:
            failing()
            time.sleep(1000)
        with watchdog.phase("training step", collective=True, step=5):
            comms.control.allreduce(1)
        """,
        """
        try:
            if rank == guilty:
                failing()
                raise MemoryError
        finally:
            if rank == guilty:
                time.sleep(1000)
        step(watchdog, 5)
        """,
    ],
    ids=["working", "unwinding"],
)
def test_a_rank_that_hangs_outside_any_phase(job, body):
    because = r"outside any named phase after 'training step' \(step 4\) for"
    job(body, n_ranks=2, guilty=1, because=because, limit_s=4.0)


def test_a_rank_that_hangs_after_it_has_left_the_watch_with_an_error(job):
    job(
        """
        if rank == guilty:
            failing()
            watchdog.__exit__(MemoryError, None, None)  # as an exception calls it
            time.sleep(1000)
        step(watchdog, 5)
        """,
        n_ranks=2,
        guilty=1,
        because="has been in 'leaving after MemoryError' for",
        limit_s=4.0,
    )


def test_a_rank_that_does_not_come_to_the_end_of_the_run(job):
    errors = job(
        """
        if rank == guilty:
            failing()
            step(watchdog, 5)
        """,
        n_ranks=2,
        guilty=1,
        because=None,
        limit_s=4.0,
    )
    assert "no rank returned from 'end of the run' or 'training step' (step 5) within" in errors


@pytest.fixture
def quiet_job(mpirun, tmp_path):
    """Run a program in which nothing is wrong."""

    def run(body, **limits):
        program = tmp_path / "program.py"
        program.write_text(failing_program(body, **limits))
        # XLA as users have it: the one of tools/test.sh dies of the deepest program here.
        done = mpirun(2, sys.executable, program, 1, timeout_s=90, env={"XLA_FLAGS": ""})
        assert (done.returncode, done.stderr) == (0, "")

    return run


def test_a_long_phase_with_its_own_limit_is_left_alone(quiet_job):
    quiet_job(
        """
        if rank == guilty:
            with watchdog.phase("evaluation", limit_s=30.0):
                time.sleep(5)
        step(watchdog, 5)
    time.sleep(2 * rank)
""",
        limit_s=1.0,
        quiet_s=2.0,
    )


def test_a_long_compilation_is_left_alone(quiet_job):
    quiet_job(
        """
        @jax.jit
        def slow(x):
            for k in range(5000):
                x = jnp.sin(x + k)
            return x

        if rank == guilty:
            began = time.monotonic()
            slow(jnp.ones(3)).block_until_ready()
            assert time.monotonic() - began > 2.0  # else nothing was tried
        step(watchdog, 5)
""",
        limit_s=1.5,
    )


def test_a_long_computation_is_left_alone(mpirun, tmp_path):
    body = """
        def compute(x, n):
            return jax.lax.fori_loop(0, n, lambda i, y: jnp.sin(y), x)

        @jax.jit
        def slow(x, n):
            return mpi4jax.allreduce(compute(x, n), op=MPI.SUM, comm=comms.time.mpi)

        slow(jnp.ones(3), 1).block_until_ready()
        alone = jax.jit(compute)
        for n in 1, 2_000_000:
            began = time.process_time()  # it takes no less time than that, however busy the machine
            alone(jnp.ones(3), n).block_until_ready()
            seconds = time.process_time() - began
        n = int(10.0 / seconds * n) if rank == guilty else 1
        with watchdog.phase("training step", collective=True, step=5):
            slow(jnp.ones(3), n).block_until_ready()
"""
    program = tmp_path / "program.py"
    # A busy machine may keep the watchdog of a rank that computes from running for many seconds.
    program.write_text(failing_program(body, limit_s=5.0, quiet_s=40.0))
    done = mpirun(2, sys.executable, program, 1, timeout_s=90)
    assert done.returncode == 0, done.stderr
    assert "'training step' (step 5) has taken" in done.stderr
    assert "still computes" in done.stderr and "nodepint:" not in done.stderr


def test_a_process_stopped_and_continued_in_time_is_left_alone(quiet_job):
    quiet_job(
        """
        if rank == guilty:
            subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        step(watchdog, 5)
"""
    )
