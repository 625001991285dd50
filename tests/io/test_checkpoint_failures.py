"""Full disks, closed folders and kills: an error on all ranks, and the last checkpoint is safe."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from nodepint_mpi.errors import OutputError
from nodepint_mpi.io import checkpoint, checkpoint_rows, hdf5
from nodepint_mpi.io.checkpoint_folder import find_checkpoints
from nodepint_mpi.parallel.comms import alone
from tests.io.checkpoint_case import check, listing, load, save, small_disk

REPOSITORY = Path(__file__).parents[2]
PLENTY = "x" * 2_000_000  # makes a checkpoint too large


def test_a_missing_folder(comm, shared_tmp_path):
    with pytest.raises(OutputError, match="cannot save checkpoints in .*missing: No such file"):
        save(comm, shared_tmp_path / "missing", 1)
    if comm.rank == 0:
        (shared_tmp_path / "file").write_text("mine")
    comm.Barrier()
    with pytest.raises(OutputError, match="cannot save checkpoints in .*file: Not a directory"):
        save(comm, shared_tmp_path / "file", 1)
    assert (shared_tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written(comm, shared_tmp_path):
    with small_disk(comm, shared_tmp_path / "disk", 10_000_000) as folder:
        save(comm, folder, 1)
        if comm.rank == 0:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        comm.Barrier()
        with pytest.raises(OutputError, match="cannot write .*step-000002.*Read-only file system"):
            save(comm, folder, 2)
        check(load(comm, folder), comm)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_without_permission(comm, shared_tmp_path):
    save(comm, shared_tmp_path, 1)
    if comm.rank == 0:
        shared_tmp_path.chmod(0o500)
    comm.Barrier()
    with pytest.raises(OutputError, match="cannot write .*step-000002.*Permission denied"):
        save(comm, shared_tmp_path, 2)
    check(load(comm, shared_tmp_path), comm)
    if comm.rank == 0:
        shared_tmp_path.chmod(0o700)


@pytest.mark.parametrize("known", [True, False], ids=["statvfs", "reserve"])
def test_a_full_disk(comm, shared_tmp_path, monkeypatch, known):
    with small_disk(comm, shared_tmp_path / "disk", 1_500_000) as folder:
        save(comm, folder, 1)
        before = listing(folder)
        reason = r"it needs \d\.\d MiB and \d\.\d MiB are free"
        if not known:  # a quota, or another job that fills the disk at the same time
            monkeypatch.setattr(hdf5, "_check_free_space", lambda path, n_bytes: None)
            reason = "No space left on device"
        with pytest.raises(OutputError, match=f"cannot write .*step-000002.*{reason}"):
            save(comm, folder, 2, plenty=PLENTY)
        comm.Barrier()
        assert listing(folder) == before
        assert load(comm, folder).step == 1
        save(comm, folder, 3)
        check(load(comm, folder), comm)


def test_a_limit_on_the_size_of_files(comm, shared_tmp_path):
    save(comm, shared_tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    comm.Barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write .*step-000002.*File too large"):
            save(comm, shared_tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    comm.Barrier()
    assert listing(shared_tmp_path) == ["step-000001.h5"]
    check(load(comm, shared_tmp_path), comm)


def test_a_disk_that_fills_while_saving_does_no_harm(comm, shared_tmp_path, monkeypatch):
    """All space is reserved before the first byte is written."""
    original = checkpoint.write_all_rows

    def fill_and_write(control, path, *args, **options):
        if control.rank == 0:
            with pytest.raises(OSError, match="No space left"):
                with open(path.parent / "junk", "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
        control.Barrier()
        original(control, path, *args, **options)

    with small_disk(comm, shared_tmp_path / "disk", 3_000_000) as folder:
        save(comm, folder, 1)
        monkeypatch.setattr(checkpoint, "write_all_rows", fill_and_write)
        save(comm, folder, 2)
        assert load(comm, folder).step == 2
        check(load(comm, folder), comm)


@pytest.mark.parametrize(
    "step", ["lay_out", "read_back", "read_leaves", "write_seal", "flush_file", "publish"]
)
def test_a_failure_at_any_step_is_an_error_on_all_ranks(comm, shared_tmp_path, monkeypatch, step):
    save(comm, shared_tmp_path, 1)

    def fail(*args, **options):
        raise OutputError(f"{step} failed")

    with monkeypatch.context() as patch:
        if comm.rank == (comm.size - 1 if step in ("read_back", "flush_file") else 0):
            patch.setattr(checkpoint, step, fail)
        with pytest.raises(OutputError, match=f"{step} failed"):
            save(comm, shared_tmp_path, 2)
    comm.Barrier()
    assert listing(shared_tmp_path) == ["step-000001.h5"]
    check(load(comm, shared_tmp_path), comm)


@pytest.mark.mpi(max_size=1)
def test_a_single_rank_survives_a_failing_disk(comm, tmp_path, monkeypatch):
    """With more ranks it ends the job: see below."""
    save(comm, tmp_path, 1)

    def fail(*args, **options):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_rows, "write_rows", fail)
        with pytest.raises(OutputError, match="step-000002.*Input/output error"):
            save(comm, tmp_path, 2)
    assert listing(tmp_path) == ["step-000001.h5"]
    check(load(comm, tmp_path), comm)


@pytest.mark.parametrize("name", ["rows/starts", "row_xxh3/flat", "replicated/special"])
def test_what_does_not_read_back_is_not_published(comm, shared_tmp_path, monkeypatch, name):
    """A write that is lost without an error."""
    save(comm, shared_tmp_path, 1)
    original = checkpoint.write_all_rows

    def lose_one(control, path, *args, **options):
        original(control, path, *args, **options)
        if control.rank == 0:
            with h5py.File(path, "r+") as file:
                file[name][3] = 0
        control.Barrier()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_all_rows", lose_one)
        with pytest.raises(OutputError, match=f"does not read back as it was written: {name}"):
            save(comm, shared_tmp_path, 2)
    comm.Barrier()  # rank 0 tidies up
    assert listing(shared_tmp_path) == ["step-000001.h5"]


DIE_AT = """
import importlib, os, signal, sys
from pathlib import Path
from nodepint_mpi.parallel.comms import world
from tests.io.checkpoint_case import save

folder, where, rank, count, deed = Path(sys.argv[1]), *sys.argv[2:]
control = world().Dup()
save(control, folder, 1, plain=True)
module, name = where.split(":")
module = importlib.import_module(module)
original, calls = getattr(module, name), []

def die(*args, **options):
    calls.append(1)
    if control.rank == int(rank) and len(calls) == int(count):
        if deed == "raise":
            raise OSError(5, "Input/output error")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)

setattr(module, name, die)
save(control, folder, 2, plain=True)
print("not reached")
"""

X64 = {"JAX_ENABLE_X64": "1"}
IO = "nodepint_mpi.io."
ROWS = IO + "checkpoint_rows:write_rows"


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(120)
@pytest.mark.parametrize(
    "where, rank, count",
    [
        (ROWS, 1, 4),
        (IO + "checkpoint:read_back", 0, 1),
        ("os:replace", 0, 1),
    ],
)
def test_a_killed_rank_leaves_the_last_one(mpirun, tmp_path, where, rank, count):
    command = [sys.executable, "-c", DIE_AT, tmp_path, where, rank, count, "kill"]
    ended = mpirun(2, *command, timeout_s=90, env=X64)
    assert ended.returncode != 0
    assert "not reached" not in ended.stdout
    loaded = load(alone(), tmp_path, plain=True)
    assert loaded.step == 1
    check(loaded, alone())
    assert listing(tmp_path) == ["step-000001.h5", "step-000002.h5.partial"]
    save(alone(), tmp_path, 3, plain=True)  # and what the kill has left is no obstacle
    assert listing(tmp_path) == ["step-000001.h5", "step-000003.h5"]


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(120)
def test_a_failing_write_ends_the_job_and_spares_the_last_one(mpirun, tmp_path):
    command = [
        sys.executable,
        "-c",
        DIE_AT,
        tmp_path,
        IO + "checkpoint_rows:write_rows",
        1,
        4,
        "raise",
    ]
    ended = mpirun(2, *command, timeout_s=90, env=X64)
    assert ended.returncode != 0
    assert "rank 1" in ended.stderr
    assert "failure inside the open parallel file" in ended.stderr
    assert "Input/output error" in ended.stderr
    check(load(alone(), tmp_path, plain=True), alone())


POINTS = {  # a function, which call of it, and the checkpoint that must be there
    "hdf5:_reserve:1": 1,
    "checkpoint_file:create_rows:3": 1,
    "checkpoint:write_all_rows:1": 1,
    "checkpoint_rows:write_rows:6": 1,
    "checkpoint:read_back:1": 1,
    "checkpoint:digest_file:1": 1,
    "checkpoint:write_seal:1": 1,
    "checkpoint:flush_file:1": 1,
    "checkpoint_folder:sync_folder:1": 2,
    "checkpoint:prune:1": 2,
}
N_RANDOM = 15


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(150)
def test_kills_at_any_moment_leave_the_last_one(tmp_path):
    own = ("OMPI_", "PMIX_", "PMI_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    env |= X64 | {"PYTHONPATH": str(REPOSITORY)}
    script = REPOSITORY / "tests" / "io" / "kill_savers.py"
    command = [sys.executable, script, tmp_path, str(N_RANDOM), *(IO + point for point in POINTS)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=140)
    assert ended.returncode == 0, ended.stderr
    reports = [json.loads(line) for line in ended.stdout.splitlines()]
    expected = [*POINTS.items(), *[("random", None)] * N_RANDOM]
    for report, (point, step) in zip(reports, expected, strict=True):
        assert report["killed"], point
        folder = Path(report["folder"])
        loaded = load(alone(), folder, plain=True)
        assert loaded.path == find_checkpoints(folder)[0], point  # none is damaged
        if step is None:
            assert report["saved"] <= loaded.step <= report["saved"] + 1
        else:
            assert loaded.step == step, point
        check(loaded, alone())
