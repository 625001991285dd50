"""Forecast of `bench control time` on other numbers of ranks: the tracked iteration, replayed.

What ranks do is recorded from the iteration itself, on ranks that are imagined; a slice costs what
it was measured to cost on one core with as many slices at once as a rank has.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nodepint_mpi.bench.control_contestant import TimedCase
from nodepint_mpi.bench.control_oscillators import Oscillators
from nodepint_mpi.bench.control_time import ask
from nodepint_mpi.bench.planning.lines import (
    Layout,
    Operations,
    RecordedLine,
    imagined_line,
    record_line,
    traced,
)
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.recording import without_steps
from nodepint_mpi.bench.planning.replay import Costs, simulate_step
from nodepint_mpi.bench.planning.stages import Sweeps
from nodepint_mpi.optimal_control.objective import Objective, Penalty
from nodepint_mpi.parallel.tracking import SolveCarry


def record_iteration(case: TimedCase, layout: Layout) -> RecordedLine:
    """What all ranks of a line do in a tracked iteration that is not the first. Local.

    Raises:
        LayoutError: for more ranks than slices.
    """

    def operations(rank: int) -> Operations:
        oscillators = Oscillators(case, imagined_line(layout, rank))
        steered = oscillators.steered(True)
        objective = Objective(steered._replace(options=without_steps(steered.options)))
        penalty = Penalty(jnp.zeros(0), jnp.zeros(()))

        def step(values: Any, carry: SolveCarry) -> Any:
            return objective.tracked(values, oscillators.rest, penalty, carry)[:3]

        left = jax.eval_shape(step, oscillators.variables, SolveCarry())[2]
        return _traced_once(traced(step, oscillators.variables, left))

    return record_line(case.n_slices, layout, operations)


def _traced_once(operations: Operations) -> Operations:
    """Without the forward sweep that JAX traces first, as the solve itself, before it traces the
    same as the forward rule of its custom derivative: only the second one is computed."""
    halves = range(len(operations) // 2, 0, -1)
    n = next((n for n in halves if operations[:n] == operations[n : 2 * n]), 0)
    return operations[n:]


def measure_slices(case: TimedCase, ranks: Sequence[int]) -> dict[int, Costs]:
    """Costs of a slice by the number of ranks, measured in a process on one core. Local.

    Raises:
        NodepintError: if that fails.
    """
    widths = {n: -(-case.n_slices // n) for n in ranks}
    request = {"kind": "costs", "widths": sorted(set(widths.values()))}
    found = ask(case, request, 1, "the slices' costs")
    costs = {}
    for n, width in widths.items():
        row = found[str(width)]
        costs[n] = Costs(
            row["fine_s"], row["pulled_s"], 0.0, row["coarse_s"], row["copulled_s"], 0.0, 0.0, 0.0
        )
    return costs


def plan_control_time(
    case: TimedCase,
    costs: dict[int, Costs],
    network: Network,
    *,
    serial_s: float,
    n_iterations: int,
) -> list[dict[str, Any]]:
    """Seconds to the cost, speed-up and efficiency on each number of ranks. Local.

    Args:
        case: The problem.
        costs: By the number of ranks; those above the slices are left out.
        network: Between the ranks.
        serial_s: What the best serial run takes.
        n_iterations: Of the tracked iteration to the same cost.
    """
    rows = []
    for n, of_rank in costs.items():
        if n > case.n_slices:
            continue
        line = record_iteration(case, Layout(n))
        # One sweep forward and one back, as in a training step with tracking.
        step = simulate_step(line, of_rank, Sweeps(n_updates=1), network)
        seconds = n_iterations * step.step_s
        rows.append(
            {
                "ranks": n, "step_s": step.step_s, "seconds": seconds, "serial_s": serial_s,
                "speed_up": serial_s / seconds, "efficiency": serial_s / seconds / n,
                "shares": step.shares,
            }
        )  # fmt: skip
    return rows


def format_control_plan(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown. Local."""
    lines = [
        "| ranks | ms an iteration (forecast) | s | speed-up | efficiency | coarse | waiting |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['ranks']} | {1e3 * row['step_s']:.3g} | {row['seconds']:.3g} | "
        f"{row['speed_up']:.3g} | {row['efficiency']:.2f} | {row['shares']['coarse']:.0%} | "
        f"{row['shares']['wait']:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)
