"""Scalars for TensorBoard, read back by the format's own description: TFRecords of events."""

import math
import struct
import sys
from typing import Any

import pytest
from tensorboardX.proto import event_pb2 as _event_pb2

from nodepint_mpi.errors import ConfigError, OutputError
from nodepint_mpi.io.records import Records
from nodepint_mpi.training.scalars import Scalars, require_tensorboard

event_pb2: Any = _event_pb2  # made when it is imported
pytestmark = pytest.mark.mpi(max_size=1)


def read_events(folder):
    """Events of all files, in the order of their names: length, its CRC, content, its CRC."""
    events = []
    for path in sorted((folder / "tensorboard").iterdir()):
        assert "tfevents" in path.name  # what TensorBoard looks for
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            events.append(event_pb2.Event.FromString(content[place + 12 : place + 12 + length]))
            place += 12 + length + 4
    return events


def test_scalars_are_those_of_the_records(tmp_path):
    with Scalars(tmp_path) as scalars, Records(tmp_path, copy_to=scalars.append) as records:
        records.append(1, loss=0.5, sweeps=3)
        head, first = read_events(tmp_path)  # at once
        assert head.file_version == "brain.Event:2"
        records.append(2, loss=math.inf, sweeps=2)
    second = read_events(tmp_path)[2]
    for event, step, wanted in (
        (first, 1, {"loss": 0.5, "sweeps": 3.0}),
        (second, 2, {"sweeps": 2}),
    ):
        assert event.step == step
        assert {value.tag: value.simple_value for value in event.summary.value} == wanted
        assert event.wall_time > 1e9


def test_a_resumed_run_has_later_steps_dropped(tmp_path):
    with Scalars(tmp_path) as scalars:
        scalars.append({"step": 9, "loss": 1.0})
    with Scalars(tmp_path, resume_step=5):
        pass
    (start,) = [event for event in read_events(tmp_path) if event.HasField("session_log")]
    assert start.step == 6  # TensorBoard drops what came before from this step on
    assert start.session_log.status == event_pb2.SessionLog.START


def test_what_is_missing_is_said_before_the_run(tmp_path, monkeypatch):
    require_tensorboard()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="needs the package tensorboardX.*pip install"):
        require_tensorboard()


def test_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(OutputError, match="cannot write scalars in .*No such file"):
        Scalars(tmp_path / "gone")
