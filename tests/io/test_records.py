"""Metrics: one JSON line each, the same as columns in HDF5, and a resume that drops the future.

Records are local; here every rank keeps its own.
"""

import json
import logging
import math
import resource

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.errors import DataError, OutputError
from nodepint_mpi.io.records import Records, read_records, read_table
from tests.io.checkpoint_case import listing

CONFIG = "[optim]\nrate = 0.001\n" * 5000  # longer than HDF5's old limit of 64 KiB


def fill(folder, steps, **options):
    with Records(folder, **options) as records:
        for step in steps:
            records.append(step, loss=1 / step, sweeps=step)
    return (folder / "metrics.jsonl").read_bytes()


def test_numbers_come_back(tmp_path):
    with Records(tmp_path) as records:
        records.append(1, loss=jnp.float32(0.1), sweeps=np.int64(3), ok=True)
        assert read_records(tmp_path) == [
            {"step": 1, "loss": float(np.float32(0.1)), "sweeps": 3, "ok": True}
        ]  # at once, not when it is closed
        records.append(2, loss=np.array([0.1 + 0.2]), accuracy=1)
        records.append(2, loss=math.inf, accuracy=-math.nan)
    found = read_records(tmp_path)
    assert [record["step"] for record in found] == [1, 2, 2]
    assert found[1] == {"step": 2, "loss": 0.1 + 0.2, "accuracy": 1}
    assert found[2]["loss"] == math.inf and math.isnan(found[2]["accuracy"])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["accuracy"] == 1


def test_what_is_no_number_is_refused(tmp_path):
    with Records(tmp_path) as records:
        for bad in ["high", np.zeros(2), None, 1j]:
            with pytest.raises((TypeError, ValueError)):
                records.append(1, loss=bad)
        records.append(1, loss=0.5)
    assert len(read_records(tmp_path)) == 1


def test_the_table_has_a_column_for_each_quantity(tmp_path):
    with Records(tmp_path) as records:
        records.write_table(config=CONFIG)
        with h5py.File(tmp_path / "metrics.h5") as file:
            assert list(file) == ["step"] and file["step"].shape == (0,)
        records.append(1, loss=0.5)
        records.append(1, accuracy=0.25)
        records.append(3, loss=math.inf)
        records.write_table(config=CONFIG, fingerprint="4f1d", n_ranks=2)
    with h5py.File(tmp_path / "metrics.h5") as file:
        assert dict(file.attrs) == {"config": CONFIG, "fingerprint": "4f1d", "n_ranks": 2}
        assert file["step"][:].tolist() == [1, 1, 3]
        np.testing.assert_array_equal(file["loss"], [0.5, np.nan, np.inf])
        np.testing.assert_array_equal(file["accuracy"], [np.nan, 0.25, np.nan])
        assert all(column.maxshape == (None,) for column in file.values())
    assert listing(tmp_path) == ["metrics.h5", "metrics.jsonl"]


def test_a_resumed_run_drops_later_records(tmp_path):
    fill(tmp_path, range(1, 8))
    with Records(tmp_path, resume_step=4) as records:
        records.append(5, loss=55.0)
        records.write_table()
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3, 4, 5]
    assert read_records(tmp_path)[-1] == {"step": 5, "loss": 55.0}
    with h5py.File(tmp_path / "metrics.h5") as file:
        assert file["step"][:].tolist() == [1, 2, 3, 4, 5]


def test_resumed_and_uninterrupted_runs_have_the_same_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    whole = fill(tmp_path / "one", range(1, 9))
    fill(tmp_path / "two", range(1, 6))
    assert fill(tmp_path / "two", range(4, 9), resume_step=3) == whole


def test_a_torn_line_is_left_out_at_any_byte(tmp_path, caplog):
    whole = fill(tmp_path, range(1, 4))
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    path = tmp_path / "metrics.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        n_whole = sum(end <= length for end in ends)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nodepint_mpi"):
            assert len(read_records(tmp_path)) == n_whole
        torn = length not in (0, *ends)
        assert [record.getMessage() for record in caplog.records] == (
            [f"{path}: the last line is incomplete and was skipped"] if torn else []
        )
        assert fill(tmp_path, range(n_whole + 1, 4), resume_step=n_whole) == whole


def test_a_damaged_line_in_the_middle_is_named_and_left_out(tmp_path, caplog):
    whole = fill(tmp_path, range(1, 4))
    for bad in [b'{"step": 2, "lo', b"[1]", b'{"loss": 1.0}', b'{"step": null}', b"\xff", b""]:
        lines = whole.split(b"\n")
        lines[1] = bad
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nodepint_mpi"):
            assert [record["step"] for record in read_records(tmp_path)] == [1, 3]
        assert "line 2 is damaged and was skipped" in caplog.text


def test_a_damaged_table_is_made_anew(tmp_path):
    fill(tmp_path, range(1, 4))
    (tmp_path / "metrics.h5").write_bytes(b"\x89HDF\r\n\x1a\n damaged")
    with Records(tmp_path, resume_step=2) as records:
        records.write_table()
    with h5py.File(tmp_path / "metrics.h5") as file:
        assert file["step"][:].tolist() == [1, 2]


def test_a_new_run_overwrites_nothing(tmp_path):
    whole = fill(tmp_path, range(1, 4))
    with pytest.raises(OutputError, match="metrics.jsonl exists; resume that run or choose"):
        Records(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_resuming_without_records_starts_them(tmp_path):
    assert read_records(tmp_path) == []
    assert fill(tmp_path, [5], resume_step=4) == b'{"step": 5, "loss": 0.2, "sweeps": 5}\n'


def test_a_resumed_run_knows_the_last_record_it_goes_on_from(tmp_path):
    fill(tmp_path, [2, 4, 6])
    with Records(tmp_path, resume_step=5) as records:
        assert records.last == {"step": 4, "loss": 0.25, "sweeps": 4}
    with Records(tmp_path, resume_step=1) as records:
        assert records.last == {}


def test_every_record_is_handed_on_once_it_is_written(tmp_path):
    seen = []

    def look(record):
        seen.append((dict(record), read_records(tmp_path)))

    with Records(tmp_path, copy_to=look) as records:
        records.append(1, loss=0.5)
        records.append(2, loss=np.float64(0.25))
    assert [record for record, _ in seen] == read_records(tmp_path)
    assert [len(there) for _, there in seen] == [1, 2]


def test_the_table_is_read_as_it_was_written(tmp_path):
    assert read_table(tmp_path) == {}
    with Records(tmp_path) as records:
        records.append(1, loss=0.5)
        records.append(3, loss=0.25, accuracy=0.5)
        records.write_table()
    found = read_table(tmp_path)
    np.testing.assert_array_equal(found["step"], [1, 3])
    np.testing.assert_array_equal(found["accuracy"], [np.nan, 0.5])
    (tmp_path / "metrics.h5").write_bytes((tmp_path / "metrics.h5").read_bytes()[:600])
    with pytest.raises(DataError, match=r"metrics\.h5 is damaged"):
        read_table(tmp_path)


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for step in (None, 3):
        with pytest.raises(OutputError, match="cannot write .*missing/metrics.jsonl: No such file"):
            Records(tmp_path / "missing", resume_step=step)
        with pytest.raises(OutputError, match="Not a directory"):
            Records(tmp_path / "file", resume_step=step)


def test_a_full_disk_costs_the_new_record_only(tmp_path):
    records = Records(tmp_path)
    records.append(1, loss=0.5)
    records.write_table()
    table = (tmp_path / "metrics.h5").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write .*metrics.h5: File too large"):
            records.write_table(config=CONFIG)
        with pytest.raises(OutputError, match="cannot write .*metrics.jsonl: File too large"):
            for step in range(2, 5):
                records.append(step, loss=0.25)
        with pytest.raises(OutputError, match="cannot write .*metrics.jsonl: File too large"):
            records.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    records.close()
    assert (tmp_path / "metrics.h5").read_bytes() == table
    assert read_records(tmp_path)[0] == {"step": 1, "loss": 0.5}
    assert listing(tmp_path) == ["metrics.h5", "metrics.jsonl"]
