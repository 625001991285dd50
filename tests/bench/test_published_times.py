"""Published wall-clock times against the cost of parareal: K/N + (K+1)(1 - K/2N) T_G/T_F."""

import pytest

from nodepint_mpi.bench.planning.published import ONE_PROBLEM, WITH_COSTS, TimedRun

pytestmark = pytest.mark.mpi(max_size=1)


def cost_s(run: TimedRun) -> float:
    """The costs that its authors state, put together as Pentland et al. (2023) do."""
    assert run.serial_s is not None
    n, k = run.n_slices, run.n_sweeps
    fine_s = k * run.serial_s / n
    return fine_s + (k + 1) * (1 - k / (2 * n)) * (run.coarse_s or 0) + (run.model_s or 0)


def name(run: TimedRun) -> str:
    return f"{run.problem}, {run.method}"


@pytest.mark.parametrize("run", WITH_COSTS, ids=name)
def test_the_speed_up_follows_from_the_stated_costs(run):
    assert run.serial_s is not None
    assert run.speed_up == pytest.approx(run.serial_s / cost_s(run), rel=0.10)


@pytest.mark.parametrize("run", WITH_COSTS, ids=name)
def test_a_row_agrees_with_itself_but_for_its_rounding(run):
    assert run.speed_up * run.measured_s == pytest.approx(run.serial_s, rel=0.04)


def test_learning_is_most_of_the_time_where_it_is_slowest():
    slowest = min(WITH_COSTS, key=lambda run: run.speed_up or 0)
    assert slowest.model_s is not None
    assert 0.9 < slowest.model_s / slowest.measured_s < 1


def test_the_run_on_32_cores_tells_the_time_of_those_on_64_to_512():
    first, *others = ONE_PROBLEM
    for run in others:
        sweep = run.n_sweeps / run.n_slices / (first.n_sweeps / first.n_slices)
        assert run.measured_s == pytest.approx(first.measured_s * sweep, rel=0.06)
