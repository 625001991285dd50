"""`nodepint bench model`: the simulation beside published times of parareal. Local; pure."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from nodepint_mpi.bench.planning.clocks import Clocks
from nodepint_mpi.bench.planning.lines import Layout, RecordedLine
from nodepint_mpi.bench.planning.network import Network, Number
from nodepint_mpi.bench.planning.published import ONE_PROBLEM, WITH_COSTS, TimedRun
from nodepint_mpi.bench.planning.recording import NoSteps, record_solve
from nodepint_mpi.bench.planning.replay import Costs, replay
from nodepint_mpi.bench.planning.stages import Sweeps
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.stopping import FixedSweeps
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.levels import Levels
from nodepint_mpi.parallel.methods.parareal import Parareal

NO_NETWORK = Network(latency_s=0.0, bandwidth=float("inf"))
"""The authors state none; their slices take seconds to hours."""


def simulated_s(run: TimedRun, serial_s: Number) -> float:
    """Seconds that a published run should take by its costs. Local.

    Learned corrections are trained on one rank while the others wait.
    """
    n_slices = run.n_slices
    coarse_s = (run.coarse_s or 0.0) / n_slices
    costs = Costs(serial_s / n_slices, 0.0, 0.0, coarse_s, 0.0, 0.0, 0.0, 0.0)
    clocks = Clocks(n_slices, n_slices, 1, NO_NETWORK)
    replay(clocks, parareal_line(n_slices), costs, Sweeps(run.n_sweeps, back=0))
    return float(clocks.now.max()) + (run.model_s or 0.0)


@functools.cache
def parareal_line(n_slices: int, levels: Levels | None = None) -> RecordedLine:
    """A forward solve by parareal with a rank for every slice. Local."""
    flow = Propagator(no_field, NoSteps())
    method = Parareal(flow, levels=levels)
    solver = TimeSolver(flow, method, FixedSweeps(n_slices), adjoint_tol=0.0)
    return record_solve(solver, np.linspace(0.0, 1.0, n_slices + 1), Layout(n_slices))


def no_field(t: Any, u: Any, params: Any) -> Any:
    """A state that stays. Local."""
    del t, params
    return jnp.zeros_like(u)


def validate() -> list[dict[str, Any]]:
    """Every published run, measured and simulated. Local.

    Runs of one problem whose serial time is not stated are judged by the first of them.
    """
    rows = []
    for run in WITH_COSTS:
        assert run.serial_s is not None and run.speed_up is not None  # as the table has them
        speed_up = run.serial_s / simulated_s(run, run.serial_s)
        rows.append(_row(run, run.speed_up, speed_up, "speed-up"))
    first = ONE_PROBLEM[0]
    serial_s = first.measured_s * first.n_slices / first.n_sweeps
    for run in ONE_PROBLEM[1:]:
        gain = simulated_s(first, serial_s) / simulated_s(run, serial_s)
        rows.append(_row(run, first.measured_s / run.measured_s, gain, "to 32 cores"))
    return rows


def format_validation(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown and the worst ratio. Local."""
    head = "source", "problem", "method", "cores", "sweeps", "what", "measured", "model", "ratio"
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        numbers = [f"{row[name]:.2f}" for name in ("measured", "model", "ratio")]
        first = [str(row[name]) for name in head[:6]]
        lines.append(f"| {' | '.join([*first, *numbers])} |")
    ratios = [row["ratio"] for row in rows]
    lines += ["", f"model over measured: {min(ratios):.3f} to {max(ratios):.3f}"]
    return "\n".join(lines)


def _row(run: TimedRun, measured: Number, model: Number, what: str) -> dict[str, Any]:
    return {
        "source": run.source,
        "problem": run.problem,
        "method": run.method,
        "cores": run.n_slices,
        "sweeps": run.n_sweeps,
        "what": what,
        "measured": measured,
        "model": model,
        "ratio": model / measured,
    }
