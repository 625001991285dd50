"""The harness itself: what it does when ranks fail, wait for each other or disagree."""

import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(120)]

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def pytest_on(mpirun, tmp_path):
    """Run pytest with this harness on n ranks, on a file with the given tests."""

    def run(n_ranks, tests, *, timeout_s=90, **env):
        shutil.copy(REPOSITORY / "tests" / "conftest.py", tmp_path)
        (tmp_path / "test_it.py").write_text(textwrap.dedent(tests))
        options = ["-c", REPOSITORY / "pyproject.toml", "--rootdir", tmp_path, tmp_path]
        command = [sys.executable, "-m", "mpi4py", "-m", "pytest", *options]
        return mpirun(n_ranks, *command, timeout_s=timeout_s, env=env)

    return run


def test_passing_tests_end_with_one_normal_summary_line(pytest_on):
    done = pytest_on(
        3,
        """
        import pytest

        def test_sum(comm):
            assert comm.allreduce(1) == comm.size == 3

        def test_folder_is_shared(shared_tmp_path, comm):
            assert len(set(comm.allgather(shared_tmp_path))) == 1

        @pytest.mark.mpi(min_size=4)
        def test_four():
            assert False
        """,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^=+ 2 passed, 1 skipped in .*=+$", done.stdout, re.MULTILINE)
    assert done.stdout.count("passed") == 1
    assert "needs at least 4 ranks, has 3" in done.stdout
    assert re.search(r"^MPI: .*3 rank", done.stdout, re.MULTILINE)


def test_a_failure_on_one_rank_fails_everywhere_and_the_run_goes_on(pytest_on):
    done = pytest_on(
        2,
        """
        def test_before(comm):
            assert comm.rank != 1, "only rank 1 says so"

        def test_after(comm):
            assert comm.allreduce(1) == comm.size
        """,
    )
    assert done.returncode == 1
    assert (
        "[rank 1] FAILED test_it.py::test_before (call): AssertionError: only rank 1" in done.stderr
    )
    assert "failed on rank(s) 1 of 2" in done.stdout
    assert "only rank 1 says so" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


def test_a_skip_on_one_rank_only_is_a_failure(pytest_on):
    done = pytest_on(
        2,
        """
        import pytest

        def test_skips(comm):
            if comm.rank == 1:
                pytest.skip("a reason of its own")
        """,
    )
    assert done.returncode == 1
    assert "skipped on some ranks only" in done.stdout


@pytest.mark.parametrize("stuck", ["comm.Barrier()", "allreduced()", "time.sleep(100)"])
def test_a_deadlock_ends_in_time_with_the_stacks(pytest_on, stuck):
    done = pytest_on(
        2,
        f"""
        import time
        import jax, jax.numpy as jnp, mpi4jax
        from mpi4py import MPI

        def test_waits(comm):
            def allreduced():
                add = jax.jit(lambda x: mpi4jax.allreduce(x, op=MPI.SUM, comm=comm))
                add(jnp.ones(3)).block_until_ready()

            if comm.rank == 0:
                {stuck}
        """,
        timeout_s=60,
        TEST_TIMEOUT="6",
    )
    assert done.returncode != 0
    assert "[rank 0] TIMEOUT after 6 s in test_it.py::test_waits: in the test" in done.stderr
    assert "[rank 1] TIMEOUT after 6 s in test_it.py::test_waits: call done here" in done.stderr
    assert re.search(r'File ".*test_it.py", line \d+ in test_waits', done.stderr)


def test_a_failure_that_leaves_the_others_waiting_is_reported_before_the_timeout(pytest_on):
    done = pytest_on(
        2,
        """
        def test_waits(comm):
            assert comm.rank != 1, "this is why"
            comm.Barrier()
        """,
        timeout_s=60,
        TEST_TIMEOUT="6",
    )
    assert done.returncode != 0
    assert "this is why" in done.stderr.split("TIMEOUT")[0]
    assert "[rank 0] TIMEOUT" in done.stderr


def test_different_collections_abort(pytest_on):
    done = pytest_on(
        2,
        """
        import pytest
        from mpi4py import MPI

        @pytest.mark.parametrize("n", [1, 2 + MPI.COMM_WORLD.Get_rank()])
        def test_n(n):
            pass
        """,
    )
    assert done.returncode != 0
    assert "rank 1 collected other tests than rank 0: " in done.stderr
    assert "test_it.py::test_n[3]" in done.stderr


def test_shapes_types_and_promotions_are_strict(pytest_on):
    done = pytest_on(
        1,
        """
        import jax.numpy as jnp, pytest, warnings

        def test_x64():
            assert jnp.ones(2).dtype == jnp.float64

        def test_ranks():
            with pytest.raises(ValueError, match="rank_promotion"):
                jnp.ones((2, 2)) + jnp.ones(2)

        def test_types():
            with pytest.raises(Exception, match="promotion"):
                jnp.ones(2, jnp.float32) + jnp.ones(2)

        @pytest.mark.standard_promotion
        def test_standard():
            jnp.ones(2, jnp.float32) + jnp.ones(2)

        def test_warning():
            with pytest.raises(UserWarning):
                warnings.warn("a warning")

        def test_hook():
            from nodepint_mpi.parallel.comms import make_comms
            with pytest.raises(Exception, match="make_comms"):
                make_comms("not a communicator")
        """,
    )
    assert "6 passed" in done.stdout, done.stdout
