"""Rows of parallel files on any number of ranks, and failures that must not hang."""

import sys

import h5py
import numpy as np
import pytest

from nodepint_mpi.errors import CheckpointError, OutputError
from nodepint_mpi.io import hdf5
from nodepint_mpi.io.hdf5 import create_rows, creating, open_parallel, read_rows, write_rows
from tests.io.checkpoint_case import N_ROWS, deal, listing, small_disk

HOWS = ["even", "gaps", "last"]


def make_file(comm, path, whole, n_bytes=100_000):
    """A file with one dataset, without its rows. Collective."""
    if comm.rank == 0:
        with creating(path, n_bytes=n_bytes) as file:
            create_rows(file, "group/rows", shape=whole.shape, dtype=whole.dtype)
    comm.Barrier()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.bool_])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (4, 3, 2)])
def test_rows_come_back_whoever_owns_them(comm, shared_tmp_path, how, dtype, shape):
    path = shared_tmp_path / "rows.h5"
    whole = (np.random.default_rng(0).standard_normal((N_ROWS, *shape)) * 50).astype(dtype)
    make_file(comm, path, whole)
    start, n_owned = deal(comm.rank, comm.size, how)
    with open_parallel(comm, path, "r+") as file:
        block = whole[start : start + n_owned]
        write_rows(comm, file["group/rows"], block, row_start=start)
    with h5py.File(path) as file:
        assert file["group/rows"][:].tobytes() == whole.tobytes()
    for other in HOWS:
        start, n_owned = deal(comm.rank, comm.size, other)
        with open_parallel(comm, path, "r") as file:
            block = read_rows(comm, file["group/rows"], row_start=start, n_owned=n_owned)
        assert block.dtype == whole.dtype
        assert block.tobytes() == whole[start : start + n_owned].tobytes()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("piece_bytes", [1, 70, 10_000])
@pytest.mark.parametrize("large_bytes", [0, 2**20], ids=["each", "together"])
def test_large_blocks_go_in_pieces(
    comm, shared_tmp_path, monkeypatch, how, piece_bytes, large_bytes
):
    monkeypatch.setattr(hdf5, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(hdf5, "_LARGE_BYTES", large_bytes)
    path = shared_tmp_path / "rows.h5"
    whole = np.random.default_rng(0).standard_normal((N_ROWS, 3))
    make_file(comm, path, whole)
    start, n_owned = deal(comm.rank, comm.size, how)
    with open_parallel(comm, path, "r+") as file:
        block = np.asfortranarray(whole[start : start + n_owned])
        write_rows(comm, file["group/rows"], block, row_start=start)
    with open_parallel(comm, path, "r") as file:
        every = read_rows(comm, file["group/rows"], row_start=0, n_owned=N_ROWS)
    assert np.array_equal(every, whole)


def test_space_is_reserved_and_given_back(tmp_path):
    path = tmp_path / "rows.h5"
    with creating(path, n_bytes=3_000_000) as file:
        create_rows(file, "rows", shape=(1000, 100), dtype=np.dtype(float))
        assert path.stat().st_size == 3_000_000
    size = path.stat()
    assert 800_000 < size.st_size < 810_000
    assert size.st_blocks * 512 >= 800_000  # rows that were not written have their place too


def test_a_failure_while_creating_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), creating(tmp_path / "rows.h5", n_bytes=10_000):
        raise ZeroDivisionError
    with pytest.raises(OutputError, match="No such file"):
        with creating(tmp_path / "missing" / "rows.h5", n_bytes=10_000):
            pass
    with pytest.raises(OutputError, match=r"it needs \d+\.\d MiB and \d+\.\d MiB are free"):
        with creating(tmp_path / "rows.h5", n_bytes=2**62):
            pass
    assert listing(tmp_path) == []


def test_a_full_disk_shows_before_anything_is_written(comm, shared_tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "_check_free_space", lambda path, n_bytes: None)
    with small_disk(comm, shared_tmp_path / "disk", 200_000) as folder:
        if comm.rank == 0:
            with pytest.raises(OutputError, match="No space left on device"):
                with creating(folder / "rows.h5", n_bytes=300_000):
                    raise AssertionError("must not come here")
            assert listing(folder) == []


@pytest.mark.parametrize("mode, error", [("r", CheckpointError), ("r+", OutputError)])
def test_a_missing_file_is_an_error_on_all_ranks(comm, shared_tmp_path, mode, error):
    with pytest.raises(error, match=r"cannot (read|write) .*missing.h5: No such file"):
        with open_parallel(comm, shared_tmp_path / "missing.h5", mode):
            pass


def test_wrong_rows_are_refused(shared_tmp_path, comms):
    from nodepint_mpi.parallel.comms import alone

    path = shared_tmp_path / f"rows{comms.time.rank}.h5"
    with creating(path, n_bytes=10_000) as file:
        create_rows(file, "rows", shape=(2, 3), dtype=np.dtype(float))
    with open_parallel(alone(), path, "r+") as file:
        for block in [np.zeros((1, 3), np.float32), np.zeros((1, 2))]:
            with pytest.raises(ValueError, match="holds rows"):
                write_rows(alone(), file["rows"], block, row_start=0)


RAISE_INSIDE = """
import sys, time
from pathlib import Path
import numpy as np
from nodepint_mpi.io.hdf5 import create_rows, creating, open_parallel, read_rows
from nodepint_mpi.parallel.comms import world

control, path = world().Dup(), Path(sys.argv[1])
if control.rank == 0:
    with creating(path, n_bytes=10_000) as file:
        create_rows(file, "rows", shape=(2, 3), dtype=np.dtype(float))
control.Barrier()
with open_parallel(control, path, "r") as file:
    if control.rank == 1:
        raise ValueError("on purpose")
    read_rows(control, file["rows"], row_start=0, n_owned=2)
"""


@pytest.mark.mpi(max_size=1)
def test_an_exception_inside_an_open_file_ends_the_job(mpirun, tmp_path):
    ended = mpirun(3, sys.executable, "-c", RAISE_INSIDE, tmp_path / "rows.h5", timeout_s=30)
    assert ended.returncode != 0
    assert "rank 1" in ended.stderr
    assert "failure inside the open parallel file" in ended.stderr
    assert "on purpose" in ended.stderr
