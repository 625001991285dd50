"""Whatever happens to the bytes of a checkpoint: the right data or an error, never wrong data."""

import logging

import h5py
import numpy as np
import pytest

from nodepint_mpi.errors import CheckpointError
from nodepint_mpi.io import seal
from nodepint_mpi.io.seal import digest_file, find_damage, write_seal
from nodepint_mpi.parallel.comms import alone
from tests.io.checkpoint_case import check, listing, load, save

N_FLIPS = 150  # on one rank; each takes many messages on more


def change(comm, path, content: bytes) -> None:
    """Replace a file's content on rank 0. Collective."""
    if comm.rank == 0:
        path.write_bytes(content)
    comm.Barrier()


def load_or_refuse(comm, path) -> bool:
    """Whether a file is refused; if it is not, its data must be right. Collective."""
    try:
        check(load(comm, path), comm)
    except CheckpointError as error:
        assert str(path) in str(error)
        return True
    return False


def test_flipped_bytes(comm, shared_tmp_path):
    path = save(comm, shared_tmp_path, 7)
    good = path.read_bytes()
    comm.Barrier()
    rng = np.random.default_rng(comm.bcast(int(np.random.default_rng().integers(2**32))))
    places = [
        *rng.integers(len(good), size=N_FLIPS // comm.size),
        *rng.integers(512, size=20),
        0,
        511,
        512,
    ]
    for place in map(int, places):
        bad = bytearray(good)
        bad[place] ^= int(rng.integers(1, 256))
        change(comm, path, bytes(bad))
        assert load_or_refuse(comm, path), f"byte {place}"
    change(comm, path, good)
    assert not load_or_refuse(comm, path)


def test_wrong_lengths(comm, shared_tmp_path):
    path = save(comm, shared_tmp_path, 7)
    good = path.read_bytes()
    comm.Barrier()
    rng = np.random.default_rng(comm.bcast(int(np.random.default_rng().integers(2**32))))
    for length in [0, 1, 100, 511, 512, 513, len(good) - 1, *rng.integers(len(good), size=20)]:
        change(comm, path, good[:length])
        assert load_or_refuse(comm, path), f"first {length} bytes"
    for tail in [b"\0", b"x" * 5000, good]:
        change(comm, path, good + tail)
        assert load_or_refuse(comm, path), "longer"
    change(comm, path, good[:3000] + bytes(4096) + good[7096:])
    assert load_or_refuse(comm, path), "a lost block"


def test_files_that_are_no_checkpoints(comm, shared_tmp_path):
    path = shared_tmp_path / "step-000003.h5"
    if comm.rank == 0:
        with h5py.File(path, "w") as file:
            file["a"] = 1
    comm.Barrier()
    with pytest.raises(CheckpointError, match="is damaged: its head is not that of a checkpoint"):
        load(comm, path)
    change(comm, path, bytes(5000))
    with pytest.raises(CheckpointError, match="is damaged: it was never finished"):
        load(comm, path)
    if comm.rank == 0:
        path.unlink()
        path.mkdir()
    comm.Barrier()
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        load(comm, path)
    with pytest.raises(CheckpointError, match="is damaged|Is a directory|no good checkpoint"):
        load(comm, shared_tmp_path)


def test_a_damaged_one_is_named_and_passed_over(comm, shared_tmp_path, caplog):
    paths = [save(comm, shared_tmp_path, step, keep=3) for step in (1, 2, 3)]
    change(comm, paths[2], paths[2].read_bytes()[:-10])
    with caplog.at_level(logging.WARNING, "nodepint_mpi"):
        loaded = load(comm, shared_tmp_path)
    assert loaded.step == 2
    check(loaded, comm)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (1 if comm.rank == 0 else 0)
    assert all("passed over" in text and str(paths[2]) in text for text in warnings)
    with pytest.raises(CheckpointError, match="step-000003.h5 is damaged: it has .* bytes instead"):
        load(comm, paths[2])  # asked for by name: no silent fall-back
    for path in paths[:2]:
        change(comm, path, b"")
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*-000003.*-000002.*-000001"):
        load(comm, shared_tmp_path)
    assert len(listing(shared_tmp_path)) == 3  # nothing is removed


def reseal(path) -> None:
    write_seal(path, digest_file(alone(), path, path.stat().st_size)[0])


@pytest.mark.parametrize("name", ["rows/starts", "row_crc32/flat", "replicated/moments/0"])
def test_checksums_guard_arrays_after_the_seal(comm, shared_tmp_path, name):
    """What the disk returns may differ from one read to the next."""
    save(comm, shared_tmp_path, 4)
    path = save(comm, shared_tmp_path, 5)
    if comm.rank == 0:
        with h5py.File(path) as file:
            place = file[name].id.get_offset() + file[name].nbytes - 2
        bad = bytearray(path.read_bytes())
        bad[place] ^= 4
        path.write_bytes(bad)
        reseal(path)
    comm.Barrier()
    array = name.replace("row_crc32", "rows")
    with pytest.raises(CheckpointError, match=f"{array}(: row 6)? does not match its CRC-32"):
        load(comm, path)
    assert load(comm, shared_tmp_path).step == 4


def test_a_sealed_file_without_its_parts_is_damaged(comm, shared_tmp_path):
    path = save(comm, shared_tmp_path, 5)
    if comm.rank == 0:
        with h5py.File(path, "r+") as file:
            del file["meta"]
        reseal(path)
    comm.Barrier()
    with pytest.raises(CheckpointError, match="is damaged: .*meta"):
        load(comm, path)


def test_a_later_format_is_refused_but_not_called_damaged(comm, shared_tmp_path, monkeypatch):
    path = save(comm, shared_tmp_path, 5)
    if comm.rank == 0:
        with monkeypatch.context() as patch:
            patch.setattr(seal, "FORMAT", 2)
            reseal(path)
    comm.Barrier()
    for where in (path, shared_tmp_path):
        with pytest.raises(CheckpointError, match="has format 2, this program reads format 1"):
            load(comm, where)


@pytest.mark.parametrize("piece_bytes", [1000, 4096, 10**9])
def test_the_digest_does_not_depend_on_the_ranks(comm, shared_tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(seal, "_PIECE_BYTES", piece_bytes)
    path = shared_tmp_path / "file"
    change(comm, path, np.random.default_rng(0).bytes(20_000))
    assert digest_file(comm, path, 20_000) == digest_file(alone(), path, 20_000)
    damage = digest_file(comm, path, 30_000)[1]
    assert "it is shorter than 30000 bytes" in damage
    assert find_damage(comm, path) == "its head is not that of a checkpoint, or damaged"


def test_the_head_is_text(comm, shared_tmp_path):
    path = save(comm, shared_tmp_path, 5)
    lines = path.read_bytes()[:512].rstrip(b"\0").decode().splitlines()
    assert lines[:3] == ["nodepint checkpoint", "format 1", f"bytes {path.stat().st_size}"]
    assert lines[3].startswith("sha256 ") and lines[4].startswith("crc32 ")
    assert path.read_bytes()[512:520] == b"\x89HDF\r\n\x1a\n"
