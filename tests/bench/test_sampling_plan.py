"""Forecasts of sampling on more ranks, against clocks worked out by hand."""

import jax.numpy as jnp
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


def test_one_rank_takes_what_the_solve_has_counted():
    one = nm.Sampling(method="parareal", n_steps=64, n_slices=16)
    drawn = nm.sample(lambda t, u, args: -jnp.sin(3 * u) * (1 + t), 2, 3, one)
    work, sweeps = drawn.solution.work, drawn.counts.sweeps
    fine_s, coarse_s = SERIAL_S / 16, SERIAL_S / 64
    wanted = float(work.fine) * fine_s + float(work.coarse) * coarse_s
    alone, all_ranks = plan_sampling([row(one, sweeps, wanted)], [one], [1, 16], FREE)
    (slower,) = plan_sampling([row(one, sweeps, 2 * wanted)], [one], [16], FREE)
    assert slower["seconds"] == pytest.approx(2 * all_ranks["seconds"])
    assert alone["seconds"] == pytest.approx(wanted, rel=1e-9)
    assert alone["gain"] == pytest.approx(SERIAL_S / wanted)
    # With a rank for each slice: a sweep ends with a sum over ranks, so coarse walks follow one
    # another; in the end jumps are checked by one more fine solve. Solved slices save a little.
    most = 16 * coarse_s + sweeps * (fine_s + 16 * coarse_s) + fine_s
    assert 0.85 * most <= all_ranks["seconds"] <= most


def test_one_rank_takes_what_was_measured_of_tangents():
    one, measured = nm.Sampling(n_steps=64, n_slices=16), 100.0
    alone, two = plan_sampling([row(one, 2, measured)], [one], [1, 2], FREE)
    assert alone["seconds"] == pytest.approx(measured, rel=1e-6)
    assert measured / 2 <= two["seconds"] < 0.6 * measured


def test_messages_count_and_too_many_ranks_are_left_out():
    one = nm.Sampling(method="parareal", n_steps=64, n_slices=16)
    rows = [row(one, 2, 60.0)]
    slow = plan_sampling(rows, [one], [8, 32], Network(0.5, 1e9))
    assert [found["ranks"] for found in slow] == [8]
    (fast,) = plan_sampling(rows, [one], [8], FREE)
    assert slow[0]["seconds"] > fast["seconds"] + 0.5
    assert "| parareal | 8 | 2 |" in format_sampling_plan(slow)


def test_the_serial_sampler_has_no_row():
    one = nm.Sampling(method="serial", n_steps=64)
    assert plan_sampling([row(one, 0)], [one], [2], FREE) == []
