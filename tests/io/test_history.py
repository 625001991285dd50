"""The history of every step: nothing lost or doubled by a resume, nothing damaged is read.

Local; here every rank keeps its own.
"""

import logging

import numpy as np
import pytest

from nodepint_mpi.errors import OutputError
from nodepint_mpi.io import history
from nodepint_mpi.io.history import HISTORY, RECORD, History, every_step, read_history
from nodepint_mpi.io.records import Records


def fill(folder, steps, **options):
    made = History(folder, **options)
    for step in steps:
        made.append(step, loss=1 / step, grad_norm=step**0.5, step_s=0.1, sweeps=(step, 2 * step))
    made.write()
    return (folder / HISTORY).read_bytes()


def test_every_step_comes_back_once_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "AT_MOST", 3)
    made = History(tmp_path)
    for step in (1, 2):
        made.append(step, loss=0.1 / step, grad_norm=np.inf, step_s=0.5, sweeps=(4, 2))
    assert not (tmp_path / HISTORY).exists()
    made.append(3, loss=np.nan, grad_norm=3.0, step_s=0.5, sweeps=(4, 2))  # as many as are kept
    found = read_history(tmp_path)
    np.testing.assert_array_equal(found["step"], [1, 2, 3])
    np.testing.assert_array_equal(found["loss"], [0.1, 0.05, np.nan])
    np.testing.assert_array_equal(found["grad_norm"], [np.inf, np.inf, 3.0])
    np.testing.assert_array_equal(found["sweeps"], [4, 4, 4])
    assert list(found) == ["step", "loss", "grad_norm", "step_s", "sweeps", "adjoint_sweeps"]
    raw = np.fromfile(tmp_path / HISTORY, RECORD)  # as the documentation reads it
    np.testing.assert_array_equal(raw["loss"], found["loss"])
    with pytest.raises(OutputError, match="cannot write"):
        fill(tmp_path, [1])  # a new run over an old one


def test_resumed_and_uninterrupted_runs_have_the_same_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    whole = fill(tmp_path / "one", range(1, 9))
    fill(tmp_path / "two", range(1, 7))
    assert fill(tmp_path / "two", range(4, 9), resume_step=3) == whole


def test_what_is_torn_or_damaged_is_left_out(tmp_path, caplog):
    whole = fill(tmp_path, range(1, 4))
    path, size = tmp_path / HISTORY, RECORD.itemsize
    for length in range(0, len(whole) + 1, 5):
        path.write_bytes(whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nodepint_mpi"):
            assert len(read_history(tmp_path)["step"]) == length // size
        assert ("damaged and was left out" in caplog.text) == (length % size > 0)
        assert fill(tmp_path, range(length // size + 1, 4), resume_step=length // size) == whole
    for place in range(size, 2 * size, 7):
        bad = bytearray(whole)
        bad[place] ^= 4
        path.write_bytes(bad)
        assert read_history(tmp_path)["step"].tolist() == [1]
    path.write_bytes(whole + whole)  # twice
    assert read_history(tmp_path)["step"].tolist() == [1, 2, 3]


def test_records_are_taken_where_the_history_has_nothing(tmp_path):
    """Before a history that a newer version began, and after the last checkpoint."""
    records = {"step": np.array([2, 4, 6, 8]), "loss": np.array([20.0, 40.0, 60.0, 80.0])}
    alone = every_step(tmp_path, records)
    assert list(alone) == list(read_history(tmp_path))
    np.testing.assert_array_equal(alone["step"], records["step"])
    np.testing.assert_array_equal(alone["loss"], records["loss"])
    assert np.isnan(alone["sweeps"]).all()  # which these records lack
    fill(tmp_path, range(3, 7))
    found = every_step(tmp_path, records)
    np.testing.assert_array_equal(found["step"], [2, 3, 4, 5, 6, 8])
    np.testing.assert_array_equal(found["loss"], [20.0, 1 / 3, 1 / 4, 1 / 5, 1 / 6, 80.0])
    np.testing.assert_array_equal(found["sweeps"], [np.nan, 3, 4, 5, 6, np.nan])


def test_steps_that_are_missing_are_said(tmp_path, caplog):
    fill(tmp_path, range(1, 4))
    with caplog.at_level(logging.WARNING, "nodepint_mpi"):
        History(tmp_path, resume_step=5)
    assert "ends at step 3: the steps up to 5 are missing" in caplog.text
    caplog.clear()
    (tmp_path / HISTORY).unlink()
    History(tmp_path, resume_step=5)  # a run begun before there was a history
    assert not caplog.text and not len(read_history(tmp_path)["step"])


def test_a_run_that_fails_keeps_its_last_steps(tmp_path):
    with pytest.raises(RuntimeError), Records(tmp_path) as records:
        records.history.append(1, loss=0.5, grad_norm=1.0, step_s=0.1, sweeps=(1, 1))
        raise RuntimeError
    assert read_history(tmp_path)["step"].tolist() == [1]
