"""What rank 0 shows while training, and that compiling is not in the time that is left."""

import functools
import logging
import time
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from nodepint_mpi.profiling.timers import COMPILING, CompileClock
from nodepint_mpi.training import progress
from nodepint_mpi.training.progress import Progress
from nodepint_mpi.training.step import StepReport

pytestmark = pytest.mark.mpi(max_size=1)


@pytest.fixture
def seconds(monkeypatch):
    """A clock that the test moves: a list of one number."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def make_report() -> StepReport:
    """Of a step with a loss of a quarter."""
    zeros = dict.fromkeys(StepReport._fields, np.zeros(()))
    shown = {"loss": 0.25, "sweeps": 2, "adjoint_sweeps": 1, "jump": 1e-3}
    made: Any = zeros | {name: np.array(value) for name, value in shown.items()}
    return StepReport(**made)


def test_lines_say_when_it_compiles_and_leave_that_out(seconds, caplog):
    clock = CompileClock()
    caplog.set_level(logging.INFO)
    logging.getLogger("nodepint_mpi").propagate = True
    with Progress(10, 30, clock, shown=True) as shown:
        seconds[0] += 61.0
        clock.hear(f"{COMPILING}backend_compile_duration", 60.0)
        shown.advance(11)
        seconds[0] += 9.0
        shown.advance(20)
        shown.report(20, make_report(), 1.0, {"valid_loss": 0.5})
    assert [record.getMessage() for record in caplog.records] == [
        "compiling the training step ...",
        "compiled in 60.0 s, which is not in the times of steps",
        "step 20 of 30: loss 0.25, sweeps 2 + 1, jump 1.0e-03, 1000.0 ms/step, valid loss 0.5, "
        "10 s left",
    ]


def test_a_bar_moves_in_every_step_and_other_ranks_are_silent(seconds, capsys, monkeypatch):
    monkeypatch.setattr(progress, "terminal_width", lambda stream: 120)
    monkeypatch.setattr(progress, "tqdm", functools.partial(tqdm, mininterval=0))
    for is_shown in (False, True):
        with Progress(0, 4, CompileClock(), shown=is_shown) as shown:
            for step in (1, 2, 3):
                seconds[0] += 2.0
                shown.advance(step)
                if step == 2:
                    shown.report(step, make_report(), 2.0, {})
        written = capsys.readouterr().err
        assert bool(written) == is_shown
    states = [state for state in written.split("\r") if "of 4" in state]
    assert states[0].startswith("compiling   0 % |")
    assert "25 % |" in states[1] and "1 of 4, 6 s left" in states[1]
    assert "3 of 4, 2 s left, loss 0.25, sweeps 2 + 1, jump 1.0e-03, 2000.0 ms/step" in states[3]
