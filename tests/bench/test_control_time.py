"""Times to a cost on a long horizon: what is compared, and the forecast on more ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.bench.control_contestant import TimedCase
from nodepint_mpi.bench.control_oscillators import Oscillators
from nodepint_mpi.bench.control_plan import (
    format_control_plan,
    plan_control_time,
    record_iteration,
)
from nodepint_mpi.bench.planning.lines import Layout
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.replay import Costs
from nodepint_mpi.bench.planning.stages import Sweeps, count_work
from nodepint_mpi.optimal_control.objective import combine
from nodepint_mpi.parallel.tracking import SolveCarry, value_and_grad

pytestmark = pytest.mark.timeout_s(180)
SMALL = TimedCase(d=6, n_slices=8, fine_steps=4, horizon=2.0, n_nodes=9, n_controls=2)
FREE = Network(0.0, float("inf"))
FINE_S, PULLED_S, COARSE_S, COPULLED_S = 8.0, 16.0, 0.25, 0.5
COSTS = Costs(FINE_S, PULLED_S, 0.0, COARSE_S, COPULLED_S, 0.0, 0.0, 0.0)


@pytest.mark.mpi(max_size=2)
def test_all_ways_find_the_cost_that_plain_diffrax_gives(comms):
    oscillators = Oscillators(SMALL, comms.time)
    least = {}
    for optimizer, steps in (("lbfgs", 12), ("quasi-newton", 20)):
        _, points, sweeps, _ = oscillators.ours(optimizer, steps)
        costs = [float(oscillators.cost_of(jnp.asarray(point))) for point in points]
        least[optimizer] = min(costs)
        assert len(sweeps) == len(points) and costs[-1] < 0.9 * costs[0]
    _, points, _, _ = oscillators.plain("lbfgs", 12)
    plain = float(oscillators.cost_of(jnp.asarray(points[-1])))
    np.testing.assert_allclose(list(least.values()), plain, rtol=0.01)


@pytest.mark.mpi(max_size=2)
def test_the_replay_counts_what_the_iteration_counts(comms):
    oscillators = Oscillators(SMALL, comms.time)
    steered = oscillators.steered(True)

    def loss(variables, lent):
        control, args = combine(variables, oscillators.rest)
        solution = steered.solve(control, args, carry=lent, check_ranks=False)
        return steered.value(solution.interface[-1])[0], solution.work

    step = jax.jit(value_and_grad(loss, has_aux=True))
    carry = step(oscillators.variables, SolveCarry())[2]
    (_, work), _, _ = step(oscillators.variables, carry)
    counts = count_work(record_iteration(SMALL, Layout(comms.time.size)), Sweeps())

    def replayed(name):
        return sum(n[comms.time.rank] for (_, what), n in counts.items() if what == name)

    for name in ("fine", "coarse"):
        assert replayed(name) == float(getattr(work, name)), name
    assert replayed("fine_pulled") == SMALL.n_slices / comms.time.size
    assert replayed("coarse_pulled") > 0


@pytest.mark.mpi(max_size=1)
def test_one_rank_takes_the_sum_and_all_ranks_take_the_longest_way():
    ranks = {1: COSTS, 8: COSTS, 16: COSTS}
    alone, all_ranks = plan_control_time(SMALL, ranks, FREE, serial_s=2400.0, n_iterations=10)
    n = SMALL.n_slices
    # Every slice is solved and pulled back once; the last has no one to correct.
    assert n * (FINE_S + PULLED_S) <= alone["step_s"] <= n * (FINE_S + PULLED_S + 4 * COPULLED_S)
    most = FINE_S + PULLED_S + 2 * n * (COARSE_S + COPULLED_S) + 4 * COPULLED_S
    assert FINE_S + PULLED_S < all_ranks["step_s"] <= most
    assert all_ranks["speed_up"] == pytest.approx(240.0 / all_ranks["step_s"])
    assert all_ranks["efficiency"] == pytest.approx(all_ranks["speed_up"] / 8)
    assert "| 8 |" in format_control_plan([all_ranks])
