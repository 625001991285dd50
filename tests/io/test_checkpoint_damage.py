"""Whatever happens to the bytes of a checkpoint: the right data or an error, never wrong data."""

import logging
import zlib

import h5py
import numpy as np
import pytest

from nodepint_mpi.errors import CheckpointError
from nodepint_mpi.io import seal
from nodepint_mpi.io.checkpoint import load_checkpoint
from nodepint_mpi.io.seal import Seal, Span, choose_apart, digest_file, find_damage, write_seal
from nodepint_mpi.parallel.comms import alone
from tests.io.checkpoint_case import check, listing, load, make_tree, same_tree, save

N_FLIPS = 150  # on one rank, where with the others below more than 200 files are damaged in all


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


def span_of(path, name: str) -> tuple[int, int]:
    """First byte of an array in the file, and the one after its last. Local."""
    with h5py.File(path) as file:
        first = file[name].id.get_offset()
        return first, first + file[name].nbytes


def test_flipped_bytes(comm, shared_tmp_path):
    path = save(comm, shared_tmp_path, 7)
    good = path.read_bytes()
    first, last = span_of(path, "rows/starts")
    comm.Barrier()
    rng = np.random.default_rng(comm.bcast(int(np.random.default_rng().integers(2**32))))
    places = [
        *rng.integers(len(good), size=N_FLIPS // comm.size),  # each takes many messages
        *rng.integers(512, size=20 // comm.size),
        *rng.integers(first, last, size=20 // comm.size),  # guarded by the rows' own checksums
        *(0, 511, 512, first - 1, first, last - 1, last, len(good) - 1),
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


def test_a_damaged_one_is_named_and_skipped(comm, shared_tmp_path, caplog):
    paths = [save(comm, shared_tmp_path, step, keep=3) for step in (1, 2, 3)]
    change(comm, paths[2], paths[2].read_bytes()[:-10])
    with caplog.at_level(logging.WARNING, "nodepint_mpi"):
        loaded = load(comm, shared_tmp_path)
    assert loaded.step == 2
    check(loaded, comm)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (1 if comm.rank == 0 else 0)
    assert all("skipped" in text and str(paths[2]) in text for text in warnings)
    with pytest.raises(CheckpointError, match="step-000003.h5 is damaged: it has .* bytes instead"):
        load(comm, paths[2])  # asked for by name: no silent fall-back
    for path in paths[:2]:
        change(comm, path, b"")
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*-000003.*-000002.*-000001"):
        load(comm, shared_tmp_path)
    assert len(listing(shared_tmp_path)) == 3  # nothing is removed


def reseal(path) -> None:
    n_bytes = path.stat().st_size
    write_seal(path, Seal(n_bytes, (), digest_file(alone(), path, n_bytes)[0]))


@pytest.mark.parametrize("name", ["rows/starts", "row_xxh3/flat", "replicated/moments/0"])
def test_checksums_guard_arrays_after_the_seal(comm, shared_tmp_path, name):
    """What the disk returns may differ from one read to the next."""
    save(comm, shared_tmp_path, 4)
    path = save(comm, shared_tmp_path, 5)
    if comm.rank == 0:
        bad = bytearray(path.read_bytes())
        bad[span_of(path, name)[1] - 2] ^= 4
        path.write_bytes(bad)
        reseal(path)
    comm.Barrier()
    array = name.replace("row_xxh3", "rows")
    with pytest.raises(CheckpointError, match=f"{array}(: row 6)? does not match its checksum"):
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


def _add_external(file, folder):
    del file["rows/flat"]
    np.full(100, 1234.5).tofile(folder / "other")
    shape, place = (7,), [(str(folder / "other"), 0, 28)]
    file.create_dataset("rows/flat", shape, "i4", external=place).attrs["dtype"] = np.bytes_(
        b"int32"
    )


def _claim_too_much(file, folder):
    del file["replicated/single"]
    made = file.create_dataset("replicated/single", (10**12,), "f4")
    made.attrs["dtype"] = np.bytes_(b"float32")


def _step(file, folder):
    file.attrs["step"] = 6


def _link(file, folder):
    file["replicated/single-too"] = h5py.SoftLink("/replicated/single")


def _rows(file, folder):
    del file["row_xxh3/flat"]
    file["row_xxh3/flat"] = np.zeros(3, np.uint64)


@pytest.mark.parametrize(
    "craft, said",
    [
        (_add_external, "rows/flat has external storage"),
        (_claim_too_much, "replicated/single declares 4000000000000 bytes, the file has"),
        (_step, "is named step-000005.h5 and holds step 6"),
        (_link, "replicated/single-too is a link"),
        (_rows, "rows/flat does not have a checksum for each of its rows"),
    ],
)
def test_a_crafted_file_with_a_seal_is_refused_on_every_rank(comm, shared_tmp_path, craft, said):
    path = save(comm, shared_tmp_path, 5)
    if comm.rank == 0:
        with h5py.File(path, "r+") as file:
            craft(file, shared_tmp_path)
        reseal(path)
    comm.Barrier()
    with pytest.raises(CheckpointError, match=said) as caught:
        load(comm, path)
    assert "\n" not in str(caught.value)


def test_arrays_under_each_other_s_names_do_not_match_their_checksums(comm, shared_tmp_path):
    path = save(comm, shared_tmp_path, 5)
    if comm.rank == 0:
        with h5py.File(path, "r+") as file:
            file.move("replicated/scalar", "replicated/x")
            file.move("replicated/rate", "replicated/scalar")
            file.move("replicated/x", "replicated/rate")
        reseal(path)
    comm.Barrier()
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load(comm, path)


def test_a_later_format_is_refused_but_not_called_damaged(comm, shared_tmp_path, monkeypatch):
    path = save(comm, shared_tmp_path, 5)
    if comm.rank == 0:
        with monkeypatch.context() as patch:
            patch.setattr(seal, "FORMAT", 9)
            reseal(path)
    comm.Barrier()
    for where in (path, shared_tmp_path):
        with pytest.raises(CheckpointError, match="has format 9, this program reads format 4"):
            load(comm, where)


def test_the_first_format_is_refused_but_not_called_damaged(comm, shared_tmp_path):
    path = save(comm, shared_tmp_path, 5)
    text = b"format 1\nbytes %d\nsha256 %064x\n" % (path.stat().st_size, 0)
    head = b"nodepint checkpoint\n" + text + b"crc32 %08x\n" % zlib.crc32(text)
    change(comm, path, head.ljust(512, b"\0") + path.read_bytes()[512:])
    for where in (path, shared_tmp_path):
        with pytest.raises(CheckpointError, match="has format 1, .* resume with the version of"):
            load(comm, where)


def test_rows_that_are_not_read_are_not_looked_at(comm, shared_tmp_path):
    """Parameters can be had from a file whose large arrays are damaged; its rows cannot."""
    path = save(comm, shared_tmp_path, 5)
    bad = bytearray(path.read_bytes())
    bad[span_of(path, "rows/starts")[0]] ^= 1
    comm.Barrier()
    change(comm, path, bytes(bad))
    none = load_checkpoint(comm, path, like_at=lambda _: make_tree(99), row_start=0,
                           n_owned_rows=0, fingerprint=None)  # fmt: skip
    same_tree(none.replicated, make_tree(5))
    with pytest.raises(CheckpointError, match="rows/starts: row 0 does not match its checksum"):
        load(comm, path)


def test_the_seal_leaves_out_the_largest_arrays(comm, shared_tmp_path):
    many = [Span(1000 * n, n) for n in range(1, 30)]
    assert choose_apart(reversed(many)) == tuple(many[-8:])
    path = save(comm, shared_tmp_path, 5)
    apart = path.read_bytes().splitlines()[3].decode().split()
    spans = [span_of(path, f"rows/{name}") for name in ("starts", "half", "more/frozen", "flat")]
    assert apart == ["apart", *(f"{a}+{b - a}" for a, b in sorted(spans))]


@pytest.mark.parametrize("piece_bytes", [1000, 4096, 10**9])
@pytest.mark.parametrize("apart", [(), (Span(600, 2000), Span(2600, 5), Span(19_000, 1000))])
def test_the_digest_does_not_depend_on_the_ranks(
    comm, shared_tmp_path, monkeypatch, piece_bytes, apart
):
    monkeypatch.setattr(seal, "_PIECE_BYTES", piece_bytes)
    path = shared_tmp_path / "file"
    good = np.random.default_rng(0).bytes(20_000)
    change(comm, path, good)
    digest = digest_file(comm, path, 20_000, apart)
    assert digest == digest_file(alone(), path, 20_000, apart)
    left_out = {n for span in apart for n in range(span.start, span.start + span.n_bytes)}
    for place in (0, 511, 512, 599, 600, 2599, 2600, 2605, 18_999, 19_000, 19_999):
        bad = bytearray(good)
        bad[place] ^= 1
        comm.Barrier()
        change(comm, path, bytes(bad))
        same = digest_file(comm, path, 20_000, apart) == digest
        assert same == (place < 512 or place in left_out), place
    damage = digest_file(comm, path, 30_000, apart)[1]
    assert "it is shorter than 30000 bytes" in damage
    assert find_damage(comm, path) == "its head is not that of a checkpoint, or damaged"


def test_the_head_is_text(comm, shared_tmp_path):
    path = save(comm, shared_tmp_path, 5)
    lines = path.read_bytes()[:512].rstrip(b"\0").decode().splitlines()
    assert lines[:3] == ["nodepint checkpoint", "format 4", f"bytes {path.stat().st_size}"]
    assert [line.split()[0] for line in lines[3:]] == ["apart", "xxh3_128", "crc32"]
    assert path.read_bytes()[512:520] == b"\x89HDF\r\n\x1a\n"
