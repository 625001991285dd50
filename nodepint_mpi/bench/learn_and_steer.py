"""Learn a field from trajectories and steer it: DP and DAL for either task, in all combinations.

64 trajectories of predator and prey, whose law of motion is learned by a network, which is then
steered towards (1, 1). What counts is the cost of the control *on the true system*, compared with
that of a control found on the true system itself.

The problem has several local minima. From no control L-BFGS finds one of 2,365, from the states on
a straight line one of 1,558, which is also that of the reference; from a constant push towards the
origin, which is where this begins, one of 68.4.

Reference:
    Gander, Kwok, Salomon (2020), SIAM J. Sci. Comput. 42, A2773-A2802, section 5.2.
"""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from nodepint_mpi.bench.control_cases import predator_prey
from nodepint_mpi.core.controls import PiecewiseLinear
from nodepint_mpi.core.costs import quadratic_cost
from nodepint_mpi.core.propagators import FixedSteps
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.optimal_control.control import control
from nodepint_mpi.optimal_control.learning import Learning, trajectory_loss
from nodepint_mpi.optimal_control.steered import state_control_problem
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.ivp import solve

TRUE = {"a": 10.0, "b": 0.2}
START, TARGET = (20.0, 15.0), (1.0, 1.0)
PUSH = -10.0
"""Of both populations, to start from."""
N_TRAJECTORIES, N_TIMES, HORIZON = 64, 16, 0.25
SCALE = 50.0
"""Of populations, for the network."""


class LearnedRates(eqx.Module):
    """x' = x r1(x, y), y' = y r2(x, y) with rates by a network: populations stay positive."""

    rates: eqx.nn.MLP

    def __init__(self, key: Array):
        self.rates = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, key=key)

    def __call__(self, u: Array) -> Array:
        return u * 10 * self.rates(u / SCALE - 1)


def learned_field(t: Array, u: Array, c: Array, model: LearnedRates) -> Array:
    """The learned drift, controlled additively."""
    return model(u) + c


def make_trajectories() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts (64, 2), times and states (64, times, 2) of the true system. Local."""
    draw = np.random.default_rng(0)
    starts = draw.uniform([0.5, 0.5], [90.0, 90.0], size=(N_TRAJECTORIES, 2))
    times = np.linspace(HORIZON / N_TIMES, HORIZON, N_TIMES)
    solution = solve(
        lambda t, u, args: predator_prey(t, u, jnp.zeros(2), args), jnp.asarray(starts),
        np.linspace(0.0, HORIZON, N_TIMES + 1), fine=FixedSteps(RK4(), 16), method="serial",
        args=TRUE, in_axes=(0, None),
    )  # fmt: skip
    assert isinstance(solution.interface, jax.Array)  # states are arrays
    return starts, times, np.asarray(jnp.moveaxis(solution.interface[1:], 1, 0))


def run_learning(comms: Comms, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """All four combinations. Collective over `comms`; equal on all ranks but for times; needs x64.

    Args:
        comms: The run's communicators.
        report: Told about each row as it ends.
    """
    starts, times, states = make_trajectories()
    edges, nodes = np.linspace(0.0, 1.0, 9), np.linspace(0.0, 1.0, 65)
    cost = quadratic_cost(target=TARGET, terminal=1.0, energy=0.5)
    model = LearnedRates(jax.random.key(0))
    first = PiecewiseLinear(nodes, np.full((65, 2), PUSH))
    fine = FixedSteps(RK4(), 32)
    truth = state_control_problem(
        predator_prey, jnp.asarray(START), edges, cost, first, TRUE,
        {"fine": fine, "method": "serial"}, comms.time,
    )  # fmt: skip
    known = control(
        predator_prey, jnp.asarray(START), edges, control=first, args=TRUE, cost=cost, fine=fine,
        coarse=FixedSteps(RK4(), 4), steps=300, comm=comms.time,
    )  # fmt: skip
    report(f"learning, known field: {known.cost:.3f}")
    rows = []
    for learn in ("dp", "dal"):
        for steer in ("dp", "dal"):
            began = time.perf_counter()
            loss = trajectory_loss(
                learned_field, starts, times, states, edges=np.linspace(0, HORIZON, 5),
                fine=FixedSteps(RK4(), 8), coarse=FixedSteps(RK4(), 2), n_controls=2,
                gradient=learn, comm=comms.time,
            )  # fmt: skip
            learning = Learning(
                loss, optax.adam(optax.cosine_decay_schedule(1e-2, 2000)), 2000, "before"
            )
            found = control(
                learned_field, jnp.asarray(START), edges, control=first, args=model, cost=cost,
                learning=learning, gradient=steer, fine=fine, coarse=FixedSteps(RK4(), 4),
                steps=300, comm=comms.time,
            )  # fmt: skip
            end = truth.solve(found.control, TRUE, check_ranks=False).interface[-1]
            value = float(truth.value(end)[0])
            rows.append(
                {
                    "learning": learn, "control": steer, "loss": found.losses[-1],
                    "learned_cost": found.cost, "true_cost": value, "known_cost": known.cost,
                    "status": found.status, "seconds": time.perf_counter() - began,
                }
            )  # fmt: skip
            report(f"learning, {learn} and {steer}: {value:.3f} on the true system")
    return rows


def format_learning(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown. Local."""
    lines = [
        "| learning | control | loss | cost, learned field | cost, true field | known field | s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['learning'].upper()} | {row['control'].upper()} | {row['loss']:.1e} | "
        f"{row['learned_cost']:.2f} | {row['true_cost']:.2f} | {row['known_cost']:.2f} | "
        f"{row['seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)
