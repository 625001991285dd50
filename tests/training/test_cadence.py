"""Checkpoints come as often as asked for, or as often as they are worth their time."""

import pytest

from nodepint_mpi.training.cadence import Seconds, is_due

pytestmark = pytest.mark.mpi(max_size=1)  # knows no ranks


def saved_steps(comm, every, *, n_steps: int, step_s: float, save_s: float):
    """Steps at which a run with such costs is saved, and its times, by rank 0's clock."""
    steps, seconds = [], Seconds([], [])
    for step in range(1, n_steps + 1):
        seconds.steps.append(
            step_s * (1 + comm.rank)
        )  # other ranks' clocks differ, and do not count
        if is_due(comm, every, step, seconds):
            steps.append(step)
            seconds.saving.append(save_s)
    return steps, seconds


def test_an_interval_that_is_asked_for_is_kept_whatever_it_costs(comm):
    steps, _ = saved_steps(comm, 7, n_steps=30, step_s=1e-3, save_s=100.0)
    assert steps == [7, 14, 21, 28]


def test_cheap_checkpoints_come_every_500_steps(comm):
    steps, seconds = saved_steps(comm, None, n_steps=2100, step_s=0.1, save_s=1.0)
    assert steps == [500, 1000, 1500, 2000]
    assert comm.bcast(seconds.share()) == pytest.approx(4 / 210)


def test_dear_checkpoints_take_at_most_3_percent_of_the_time(comm):
    """With 5 ms a step and 1.99 s a checkpoint, 3 % are one in 66.3 s or 13,267 steps."""
    steps, seconds = saved_steps(comm, None, n_steps=60_000, step_s=5e-3, save_s=1.99)
    assert steps == [500, 27_000, 40_000, 53_500]  # the first is not put off
    assert comm.bcast(seconds.share()) <= 0.03
    assert comm.allgather(steps) == [steps] * comm.size
