"""`nodepint bench control`: gradients, known costs, ParaOpt, Laplace's equation, learning."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from nodepint_mpi.bench.control_cases import (
    CONTROL_CASES,
    N_SLICES,
    ControlCase,
    predator_prey,
)
from nodepint_mpi.bench.control_contestant import TimedCase
from nodepint_mpi.bench.control_plan import (
    format_control_plan,
    measure_slices,
    plan_control_time,
)
from nodepint_mpi.bench.control_time import format_control_time, run_control_time
from nodepint_mpi.bench.laplace import format_laplace, run_laplace
from nodepint_mpi.bench.learn_and_steer import format_learning, run_learning
from nodepint_mpi.bench.paraopt import format_paraopt, run_paraopt
from nodepint_mpi.bench.planning.advice import ASSUMED
from nodepint_mpi.core.controls import (
    NetworkControl,
    PiecewiseConstant,
    PiecewiseLinear,
    roughened,
)
from nodepint_mpi.core.costs import quadratic_cost
from nodepint_mpi.core.propagators import FixedSteps
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.stopping import JumpTolerance
from nodepint_mpi.optimal_control.control import Controlled, control
from nodepint_mpi.optimal_control.gradients import with_gradient
from nodepint_mpi.optimal_control.objective import Objective, Penalty, separate
from nodepint_mpi.optimal_control.steered import state_control_problem
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.ivp import solve

Report = Callable[[str], None]
TABLES = "gradients", "costs", "paraopt", "laplace", "learning", "time"
SOLVERS = {"Euler": diffrax.Euler(), "Midpoint": diffrax.Midpoint(), "RK4": RK4()}
LEVELS = 4, 8, 16
N_ROUGH = 4
"""Starts at random, where a case has them."""


def run_control(
    comms: Comms, tables: Sequence[str], *, report: Report, plan: Sequence[int] = ()
) -> dict[str, Any]:
    """The tables asked for. Collective over `comms`; equal on all ranks but for times; needs x64.

    Args:
        comms: The run's communicators.
        tables: Of `TABLES`; all but "time", which starts jobs of its own, if empty.
        report: Told about each row as it ends.
        plan: Numbers of ranks to forecast the times on.
    """
    made: dict[str, Callable[[], Any]] = {
        "gradients": lambda: run_gradients(comms, report),
        "costs": lambda: run_costs(comms, report),
        "paraopt": lambda: run_paraopt(comms, (), report=report),
        "laplace": lambda: run_laplace(report),
        "learning": lambda: run_learning(comms, report),
        "time": lambda: run_time(report, plan),
    }
    return {name: made[name]() for name in tables or TABLES if tables or name != "time"}


def format_control(result: dict[str, Any]) -> str:
    """The tables in Markdown. Local."""
    shown: dict[str, Callable[[Any], str]] = {
        "gradients": format_gradients,
        "costs": format_costs,
        "paraopt": format_paraopt,
        "laplace": format_laplace,
        "learning": format_learning,
        "time": format_time,
    }
    return "\n\n".join(shown[name](rows) for name, rows in result.items())


def run_time(report: Report, plan: Sequence[int]) -> dict[str, Any]:
    """Seconds to 1 % of the least cost, and a forecast of them. Local; not in a job."""
    case = TimedCase()
    rows = run_control_time(case, report=report)
    if not plan:
        return {"rows": rows, "plan": []}
    serial = min(
        (row for row in rows if row["kind"] == "diffrax" and row["evaluations"]),
        key=lambda row: row["evaluations"] * row["step_s"],
    )
    tracked = next(row for row in rows if "quasi-Newton with tracking" in row["name"])
    found = plan_control_time(
        case, measure_slices(case, plan), ASSUMED, n_iterations=tracked["evaluations"],
        serial_s=serial["evaluations"] * serial["step_s"],
    )  # fmt: skip
    return {"rows": rows, "plan": found}


def format_time(result: dict[str, Any]) -> str:
    """Both tables. Local."""
    shown = format_control_time(result["rows"])
    return shown if not result["plan"] else f"{shown}\n\n{format_control_plan(result['plan'])}"


# ---- DP against DAL ------------------------------------------------------------------------------


def run_gradients(comms: Comms, report: Report) -> list[dict[str, Any]]:
    """Relative differences of both gradients for predator and prey. Collective over `comms`."""
    rows, nodes = [], np.linspace(0.0, 1.0, 33)
    values = np.stack([-2 * np.sin(3 * nodes), np.cos(2 * nodes)], axis=1)
    controls: dict[str, Any] = {
        "constant": PiecewiseConstant(nodes[:-1], values[:-1]),
        "linear": PiecewiseLinear(nodes, values),
        "network": NetworkControl((0, 1), 2, width=8, key=jax.random.key(0)),
        "feedback": NetworkControl((0, 1), 2, n_states=2, width=8, key=jax.random.key(0)),
    }
    cost = quadratic_cost(target=1.0, terminal=1.0, running=0.3, energy=0.5)
    for solver_name, solver in SOLVERS.items():
        for kind, module in controls.items():
            gaps = []
            for n_steps in LEVELS:
                slopes = []
                for gradient in ("dp", "dal"):
                    steps = with_gradient(FixedSteps(solver, n_steps), gradient)
                    problem = state_control_problem(
                        predator_prey, jnp.array([4.0, 3.0]), np.linspace(0, 1, 9), cost, module,
                        {"a": 1.0, "b": 0.2}, {"fine": steps, "method": "serial"}, comms.time,
                    )  # fmt: skip
                    variables, rest = separate(module, {"a": 1.0, "b": 0.2}, jointly=False)
                    none = Penalty(jnp.zeros(0), jnp.zeros(()))
                    _, slope, _ = Objective(problem).converged(variables, rest, none, None)
                    slopes.append(np.asarray(ravel_pytree(slope)[0]))
                gaps.append(np.linalg.norm(slopes[0] - slopes[1]) / np.linalg.norm(slopes[0]))
            order = -float(np.polyfit(np.log(LEVELS), np.log(gaps), 1)[0])
            rows.append({"solver": solver_name, "control": kind, "gaps": gaps, "order": order})
            report(f"gradients, {solver_name}, {kind}: order {order:.2f}")
    return rows


def format_gradients(rows: list[dict[str, Any]]) -> str:
    """Local."""
    steps = ", ".join(str(8 * n) for n in LEVELS)
    lines = [
        f"| solver | control | relative difference, {steps} steps | order |",
        "|---|---|---|---|",
    ]
    for row in rows:
        gaps = ", ".join(f"{gap:.1e}" for gap in row["gaps"])
        lines.append(f"| {row['solver']} | {row['control']} | {gaps} | {row['order']:.2f} |")
    return "\n".join(lines)


# ---- Known costs ---------------------------------------------------------------------------------


def _controls_of(case: ControlCase) -> dict[str, list[Any]]:
    """Controls to start from, of which the one that ends cheapest counts."""
    n_nodes = case.fine.n_steps * N_SLICES + 1  # type: ignore[attr-defined]
    nodes = np.linspace(0.0, case.horizon, n_nodes)
    first = np.broadcast_to(case.first(nodes)[:, None], (n_nodes, case.n_controls))
    networks = [
        NetworkControl(
            (0.0, case.horizon), case.n_controls, width=32, depth=2, pace=case.pace,
            key=jax.random.key(number),
        )
        for number in range(N_ROUGH if case.pace > 1 else 1)
    ]  # fmt: skip
    smooth = PiecewiseLinear(nodes, first)
    rough = [
        roughened(smooth, case.roughness, jax.random.key(number))
        for number in range(N_ROUGH if case.roughness else 0)
    ]
    return {"nodes": rough or [smooth], "network": networks}


def run_costs(comms: Comms, report: Report) -> list[dict[str, Any]]:
    """Costs found by L-BFGS from DP, against the best known. Collective over `comms`."""
    rows = []
    for name, case in CONTROL_CASES.items():
        for kind, starts in _controls_of(case).items():
            began = time.perf_counter()
            every = [
                control(
                    case.field, jnp.asarray(case.start),
                    np.linspace(0, case.horizon, N_SLICES + 1), control=start, cost=case.cost,
                    fine=case.fine, coarse=case.coarse, steps=5000, stopping=JumpTolerance(1e-10),
                    comm=comms.time,
                )
                for start in starts
            ]  # fmt: skip
            found = min(every, key=lambda one: one.cost)
            seconds = time.perf_counter() - began
            value = _reported(comms, case, found)
            gap = float(jnp.max(jnp.abs(found.gap), initial=0.0))
            rows.append(
                {
                    "problem": name, "control": kind, "cost": value, "best": case.best,
                    "ratio": value / case.best, "gap": gap, "iterations": len(found.costs) - 1,
                    "evaluations": sum(one.n_evaluations for one in every), "status": found.status,
                    "seconds": seconds,
                }
            )  # fmt: skip
            report(f"costs, {name}, {kind}: {value:.9g} to {case.best:.9g}, {found.status}")
    return rows


def _reported(comms: Comms, case: ControlCase, found: Controlled) -> float:
    """The cost as others give it: some take means over step ends."""
    if case.reported is None:
        return found.cost
    n_nodes = case.fine.n_steps * N_SLICES + 1  # type: ignore[attr-defined]
    times = np.linspace(0.0, case.horizon, n_nodes)
    solution = solve(
        lambda t, u, module: case.field(t, u, module(t, u), None), jnp.asarray(case.start),
        found.edges, fine=case.fine, method="serial", ts=times, args=found.control,
        comm=comms.time,
    )  # fmt: skip
    assert solution.ys is not None  # times were given
    controls = jax.vmap(found.control)(jnp.asarray(times), solution.ys)
    return case.reported(np.asarray(solution.ys), np.asarray(controls))


def format_costs(rows: list[dict[str, Any]]) -> str:
    """Local."""
    lines = [
        "| problem | control | cost | best known | ratio | gap | iterations | solves | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['problem']} | {row['control']} | {row['cost']:.9g} | {row['best']:.9g} | "
        f"{row['ratio']:.7g} | {row['gap']:.1e} | {row['iterations']} | {row['evaluations']} | "
        f"{row['seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)
