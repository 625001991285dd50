"""The test harness: the same tests under `pytest` and `mpirun -n N python -m mpi4py -m pytest`.

Every rank collects and runs every test. After each phase of a test the ranks exchange outcomes, so
a failure on one rank fails the test on all of them and the run goes on with the next test. A test
that takes too long has left its ranks waiting for each other: all dump their stacks, the job dies.
"""

import contextlib
import faulthandler
import gc
import getpass
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import jaxtyping
import pytest

# Tracing makes many objects, and looking through them again and again takes a sixth of the time.
gc.set_threshold(200_000, 20, 100)

# Before the package is imported: shapes and types are checked wherever a test calls it. On one rank
# everywhere; on two in the folders that hold code for several ranks, for it makes tracing a fifth
# slower; it finds the same on more.
CHECKED = {
    1: ["nodepint_mpi"],
    2: ["nodepint_mpi.io", "nodepint_mpi.parallel", "nodepint_mpi.ranks", "nodepint_mpi.training"],
}
N_RANKS = int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1")))
if N_RANKS in CHECKED:
    jaxtyping.install_import_hook(CHECKED[N_RANKS], "beartype.beartype")

# No timed assertions: the machine may be busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Strict but for the tests that step an optax optimizer: see `standard_promotion`.
jax.config.update("jax_numpy_dtype_promotion", "strict")

try:  # tests/core is pure and also runs where there is no MPI
    from mpi4py import MPI
except ImportError:
    MPI = None

if MPI is not None and MPI.COMM_WORLD.Get_rank() > 0:
    # pytest numbers its temporary folders and removes old ones: ranks that share a root trip over
    # each other there.
    ROOT = f"pytest-rank-{MPI.COMM_WORLD.Get_rank()}-of-{getpass.getuser()}"
    os.environ["PYTEST_DEBUG_TEMPROOT"] = os.path.join(tempfile.gettempdir(), ROOT)
    os.makedirs(os.environ["PYTEST_DEBUG_TEMPROOT"], mode=0o700, exist_ok=True)

if MPI is not None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    # Programs that send messages are found again, too: most tests make their own communicators.
    from nodepint_mpi.ranks.compile_cache import keep_programs

    keep_programs("off")

LAUNCHED = not {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"}.isdisjoint(os.environ)
DEFAULT_TIMEOUT_S = 120.0
COLLECT_TIMEOUT_S = 300.0
GRACE_S = 4.0  # between the stacks and the kill, for the other ranks to dump theirs


class Ranks:
    """What the ranks tell each other, on a communicator that no test can reach."""

    def __init__(self, stderr_fd: int):
        self.comm = MPI.COMM_WORLD.Dup() if MPI is not None else None
        self.rank = self.comm.Get_rank() if self.comm is not None else 0
        self.size = self.comm.Get_size() if self.comm is not None else 1
        self.stderr_fd = stderr_fd
        self.doing = "collecting the tests"

    def allgather(self, value):
        """Every rank's value, in order. Collective."""
        if self.comm is None:
            return [value]
        self.rest()
        return self.comm.allgather(value)

    def rest(self) -> None:
        """Wait for all ranks asleep: MPI waits busily, and takes a core from those that work.

        Collective.
        """
        if self.comm is None:
            return
        arrived, pause_s = self.comm.Ibarrier(), 0.0
        while not arrived.Test():
            time.sleep(pause_s)
            pause_s = min(pause_s + 1e-4, 5e-3)

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        if self.comm is not None:
            self.comm.Barrier()

    def say(self, message: str) -> None:
        """Print past pytest's capture, from any rank, in one write. Local."""
        os.write(self.stderr_fd, f"[rank {self.rank}] {message}\n".encode())

    def abort(self, message: str) -> NoReturn:
        """End the job on all ranks. Local."""
        self.say(message)
        if MPI is not None and self.size > 1:
            MPI.COMM_WORLD.Abort(1)
        os._exit(1)

    @contextlib.contextmanager
    def deadline(self, seconds: float, what: str):
        """Dump this rank's stack and end the job if the body takes longer. Local."""
        from nodepint_mpi.ranks.watchdog import thread_stacks  # after the hook for types

        done = threading.Event()

        def watch():
            if not done.wait(seconds):
                self.say(f"TIMEOUT after {seconds:g} s in {what}: {self.doing}")
                os.write(self.stderr_fd, (thread_stacks() + "\n").encode())
                faulthandler.cancel_dump_traceback_later()
                time.sleep(GRACE_S)
                os._exit(1)  # not Abort: that asks MPI for help, and MPI may be what is stuck

        # In case a C call holds the interpreter lock: this one needs none.
        faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=self.stderr_fd)
        watcher = threading.Thread(target=watch, name="test timeout", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            faulthandler.cancel_dump_traceback_later()
            watcher.join()


RANKS = pytest.StashKey[Ranks]()
LEFT_OUT = pytest.StashKey[bool]()  # by a rule that is the same on all ranks


@pytest.hookimpl(trylast=True)  # after pytest's terminal reporter has been made
def pytest_configure(config):
    # Only here is file descriptor 2 the real one: conftest is imported under capture.
    ranks = config.stash[RANKS] = Ranks(os.dup(2))
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if ranks.rank > 0:
        if reporter is not None:
            reporter._tw._file = open(os.devnull, "w")
        if hasattr(config, "cache"):
            config.cache.set = lambda key, value: None  # rank 0 keeps the cache
    elif LAUNCHED and reporter is not None and config.option.color == "auto":
        reporter._tw.hasmarkup = False  # mpirun makes every stdout a terminal
        reporter.isatty = type(reporter.isatty)(False)


def pytest_unconfigure(config):
    # A rank that leaves first with a non-zero code would end the job before rank 0 has printed.
    ranks = config.stash.get(RANKS, None)
    if ranks is None:
        return
    sys.stdout.flush()
    if ranks.comm is not None:
        with ranks.deadline(COLLECT_TIMEOUT_S, "the end of the session"):
            ranks.doing = "waiting for the other ranks"
            ranks.barrier()
        ranks.comm.Free()
    if ranks.rank > 0:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter._tw._file.close()
    os.close(ranks.stderr_fd)


def pytest_report_header(config):
    ranks = config.stash[RANKS]
    if MPI is None:
        return "MPI: none"
    vendor, version = MPI.get_vendor()
    return f"MPI: {vendor} {'.'.join(map(str, version))}, {ranks.size} rank(s)"


def pytest_collection_finish(session):
    gc.freeze()  # nothing of what has been imported goes away
    ranks = session.config.stash[RANKS]
    ids = [item.nodeid for item in session.items] + [f"errors: {session.testsfailed}"]
    with ranks.deadline(COLLECT_TIMEOUT_S, "collection"):
        everywhere = ranks.allgather(ids)
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            if ranks.rank == rank:  # the lowest one that differs speaks
                differ = sorted(set(other) ^ set(everywhere[0]))[:5] or ["another order"]
                tests = ", ".join(differ)
                ranks.abort(f"ABORT: rank {rank} collected other tests than rank 0: {tests}")
            ranks.barrier()  # does not return: the other one ends the job


def pytest_internalerror(excrepr, excinfo):
    if MPI is not None and MPI.COMM_WORLD.Get_size() > 1:
        os.write(2, f"[rank {MPI.COMM_WORLD.Get_rank()}] INTERNAL ERROR\n{excrepr}\n".encode())
        MPI.COMM_WORLD.Abort(1)


def pytest_keyboard_interrupt(excinfo):
    if excinfo.errisinstance(pytest.Session.Interrupted):
        return  # by -x or by errors in collection, on all ranks
    if MPI is not None and MPI.COMM_WORLD.Get_size() > 1:  # the others would wait
        os.write(2, f"[rank {MPI.COMM_WORLD.Get_rank()}] {excinfo.exconly()}\n".encode())
        MPI.COMM_WORLD.Abort(2)


def pytest_collection_modifyitems(config, items):
    size = config.stash[RANKS].size
    for item in items:
        marker = item.get_closest_marker("mpi")
        needs = _unmet_need(size, *marker.args, **marker.kwargs) if marker else None
        if needs is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs {needs}, has {size}"))
            item.stash[LEFT_OUT] = True


def _unmet_need(
    size: int,
    min_size: int = 1,
    max_size: int | None = None,
    *,
    sizes: tuple[int, ...] | None = None,
) -> str | None:
    """What the marker `mpi` asks for that so many ranks are not."""
    if sizes is not None and size not in sizes:
        return f"{' or '.join(map(str, sizes))} ranks"
    if size < min_size:
        return f"at least {min_size} ranks"
    if max_size is not None and size > max_size:
        return f"at most {max_size} rank(s)"
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    ranks = item.config.stash[RANKS]
    marker = item.get_closest_marker("timeout_s")
    seconds = marker.args[0] if marker is not None else DEFAULT_TIMEOUT_S
    seconds = float(os.environ.get("TEST_TIMEOUT", seconds))
    ranks.doing = "in the test"
    with ranks.deadline(seconds, item.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Let all ranks agree on the outcome: the worst one is everybody's. Collective."""
    report = yield
    ranks = item.config.stash[RANKS]
    if ranks.size == 1 or LEFT_OUT in item.stash:
        return report
    if report.failed:  # at once: the others may be waiting in the test for this rank
        ranks.say(f"FAILED {item.nodeid} ({report.when}): {_reason(report)}")
    ranks.doing = f"{report.when} done here ({report.outcome}), waiting for the other ranks"
    outcomes = ranks.allgather((report.outcome, report.longreprtext))
    ranks.doing = "in the test"
    failed = [rank for rank, (outcome, _) in enumerate(outcomes) if outcome == "failed"]
    skipped = [rank for rank, (outcome, _) in enumerate(outcomes) if outcome == "skipped"]
    if failed and not report.failed:
        report.outcome = "failed"
        report.longrepr = f"{outcomes[failed[0]][1]}\n(as seen on rank {failed[0]})"
    elif not failed and 0 < len(skipped) < ranks.size:
        failed = skipped
        report.outcome = "failed"
        report.longrepr = "skipped on some ranks only: the rule for a skip must be the same on all"
    if failed:
        where = ", ".join(map(str, failed))
        report.sections.append(("ranks", f"failed on rank(s) {where} of {ranks.size}"))
    return report


def _reason(report) -> str:
    """The line that tells why a test failed."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else report.longreprtext[-500:]


@pytest.fixture(autouse=True)
def _promotion(request):
    """`standard_promotion`: optax multiplies Python floats by its int32 step count (0.2.8)."""
    if request.node.get_closest_marker("standard_promotion") is None:
        yield
    else:
        with jax.numpy_dtype_promotion("standard"):
            yield


@pytest.fixture
def comm():
    """A fresh duplicate of the world, for this test alone. Collective."""
    from nodepint_mpi.parallel.comms import world

    duplicate = world().Dup()
    yield duplicate
    jax.effects_barrier()  # a jitted call may still be using it
    duplicate.Free()


@pytest.fixture
def comms():
    """The communicators of a run, for this test alone. Collective."""
    from nodepint_mpi.parallel.comms import free_comms, make_comms, world

    made = make_comms(world())
    yield made
    jax.effects_barrier()
    free_comms(made)


@pytest.fixture
def on_one_rank(comms, request):
    """Call something on the first rank and hand all what it returns: they need not all compile it.

    `on_one_rank(lambda: solve(alone()))`. Collective; what is called must not communicate.
    """
    from nodepint_mpi.ranks.agreement import together

    def call(work):
        result = None
        with together(comms.control):
            try:
                if comms.control.rank == 0:
                    result = work()
            finally:
                request.config.stash[RANKS].rest()
        return comms.control.bcast(result)

    return call


@pytest.fixture
def shared_tmp_path(tmp_path, request) -> Path:
    """A temporary folder that is the same on all ranks. Collective."""
    return request.config.stash[RANKS].allgather(tmp_path)[0]


@pytest.fixture
def key():
    """A key for random inputs, equal on all ranks."""
    return jax.random.key(20)


@pytest.fixture
def mpirun():
    """Run a command on n ranks: `mpirun(2, sys.executable, "x.py", timeout_s=40)`.

    Only from one rank (`mpi(max_size=1)`). The MPI this process has started itself must not be
    seen by the job, so its environment variables are taken out.
    """
    if MPI is None or shutil.which("mpirun") is None:
        pytest.skip("no MPI, or no mpirun on the PATH")
    from tests.launching import run_job

    return run_job


@pytest.fixture
def source(comms, shared_tmp_path):
    """A few damped rotations, observed at times on and between the slice boundaries."""
    import datasets
    import numpy as np

    if comms.control.rank == 0:
        t = np.linspace(0.0, 2.0, 9)
        start = np.random.default_rng(0).uniform(0.5, 1.5, (6, 2))
        turn = np.exp((-0.2 + 2.0j) * t)
        z = (start[:, :1] + 1j * start[:, 1:]) * turn
        rows = {"t": [t.tolist()] * 6, "u": np.stack([z.real, z.imag], axis=-1).tolist()}
        split = datasets.Dataset.from_dict(rows)
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(
            str(shared_tmp_path / "set")
        )
    comms.control.Barrier()
    return shared_tmp_path / "set"
