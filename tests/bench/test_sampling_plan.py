"""Forecasts of sampling on more ranks, against clocks worked out by hand."""

import pytest

import nodepint_mpi as nm
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.sampling_plan import format_sampling_plan, plan_sampling

pytestmark = pytest.mark.mpi(max_size=1)

FREE = Network(0.0, float("inf"))
SERIAL_S = 16.0


def row(options, sweeps, seconds=0.0):
    return {
        "name": options.method, "sweeps": sweeps, "seconds": seconds, "ranks": 1,
        "serial_seconds": SERIAL_S, "shape": [3, 2],
    }  # fmt: skip


def test_parareal_takes_the_coarse_walks_and_its_share_of_the_fine_solves():
    one = nm.Sampling(method="parareal", n_steps=64, n_slices=16)
    (found,) = plan_sampling([row(one, 2)], [one], [16], FREE)
    # A rank for each slice: the coarse walk, two sweeps of a fine solve each, and a pipelined walk.
    fine_s = SERIAL_S / 16
    coarse_s = fine_s / 4
    assert found["seconds"] == pytest.approx(16 * coarse_s + 2 * (fine_s + coarse_s), rel=0.25)
    assert found["gain"] == pytest.approx(SERIAL_S / found["seconds"])


def test_one_rank_takes_what_was_measured_of_tangents():
    one = nm.Sampling(n_steps=64, n_slices=16)
    measured = 40.0
    alone, two = plan_sampling([row(one, 2, measured)], [one], [1, 2], FREE)
    assert alone["seconds"] == pytest.approx(measured, rel=1e-6)
    assert measured / 2 <= two["seconds"] < measured


def test_messages_count_and_too_many_ranks_are_left_out():
    one = nm.Sampling(method="parareal", n_steps=64, n_slices=16)
    rows = [row(one, 2)]
    slow = plan_sampling(rows, [one], [8, 32], Network(0.5, 1e9))
    assert [found["ranks"] for found in slow] == [8]
    (fast,) = plan_sampling(rows, [one], [8], FREE)
    assert slow[0]["seconds"] > fast["seconds"] + 0.5
    assert "| parareal | 8 | 2 |" in format_sampling_plan(slow)


def test_the_serial_sampler_has_no_row():
    one = nm.Sampling(method="serial", n_steps=64)
    assert plan_sampling([row(one, 0)], [one], [2], FREE) == []
