"""`nodepint sample --plan`: what sampling would take on other numbers of ranks.

What ranks do is recorded from the solve itself, on ranks that are imagined, and replayed on clocks,
as `nodepint plan` does for training steps; the costs are those measured on one rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.bench.planning.lines import Layout
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.recording import record_solve
from nodepint_mpi.bench.planning.replay import Costs, simulate_step
from nodepint_mpi.bench.planning.stages import Sweeps, count_work
from nodepint_mpi.core.propagators import Propagator, Stay
from nodepint_mpi.core.scopes import TANGENTS
from nodepint_mpi.parallel.generate import how
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.sampling import Sampling


def plan_sampling(
    rows: Sequence[dict[str, Any]],
    options: Sequence[Sampling],
    ranks: Sequence[int],
    network: Network,
) -> list[dict[str, Any]]:
    """Forecasts of rows that `sample_run` has measured with `compare` on one rank. Local.

    Args:
        rows: One for each of the options.
        options: As given to it.
        ranks: Numbers of ranks along time to forecast; those above a row's slices are left out.
        network: Latency and bandwidth between them.
    """
    found = []
    for row, given in zip(rows, options, strict=True):
        one = given.checked(int(np.prod(row["shape"][1:])))
        if one.method == "serial":
            continue
        solver, edges = _solver_of(one), np.linspace(0.0, one.end, one.slices + 1)
        state = jax.ShapeDtypeStruct(tuple(row["shape"]), jnp.zeros(()).dtype)
        limit = solver.stopping.sweep_limit(one.slices)
        judged = not solver.stopping.freezes_by_update and row["sweeps"] < limit
        sweeps = Sweeps(row["sweeps"], 0, judged)
        costs = _costs(row, one, count_work(record_solve(solver, edges, Layout(1), state), sweeps))
        for n_ranks in (n for n in ranks if n <= one.slices):
            line = record_solve(solver, edges, Layout(n_ranks), state)
            seconds = simulate_step(line, costs, sweeps, network).step_s
            found.append(
                {
                    "name": row["name"], "ranks": n_ranks, "sweeps": row["sweeps"],
                    "seconds": seconds, "serial_seconds": row["serial_seconds"],
                    "gain": row["serial_seconds"] / seconds,
                }
            )  # fmt: skip
    return found


def _solver_of(one: Sampling) -> TimeSolver:
    """What solves, on a field that is never called."""
    drift = partial(_stay, ())
    parts = how(drift, one)
    return TimeSolver(
        fine=Propagator(drift, parts["fine"]), method=parts["method"], stopping=parts["stopping"],
        adjoint_tol=0.0, n_batch_axes=1,
    )  # fmt: skip


def _stay(_: Any, t: Any, u: Any, args: Any) -> Any:
    del t, args
    return u


def _costs(row: dict[str, Any], one: Sampling, counts: dict[tuple[str, str], Any]) -> Costs:
    """What makes up the seconds of one rank: shares of fine and coarse steps as in the serial
    solution; of a tangent, what this one took besides."""
    fine_s = row["serial_seconds"] / one.slices
    coarse_s = fine_s * one.coarse_steps / one.steps_per_slice
    if isinstance(one.coarse_integrator(), Stay):
        coarse_s = 0.0

    def total(*names: str) -> float:
        return sum(float(np.sum(n)) for (_, name), n in counts.items() if name in names)

    n_tangents = sum(
        float(np.sum(n)) for (phase, name), n in counts.items()
        if phase == TANGENTS and name in ("tangent_passes", "reduced")
    )  # fmt: skip
    known_s = fine_s * total("fine") + coarse_s * total("coarse")
    if not n_tangents:  # slices side by side may cost more than one after the other
        each = row["seconds"] / known_s
        return Costs(each * fine_s, 0.0, 0.0, each * coarse_s, 0.0, 0.0, 0.0, 0.0)
    tangent_s = max(row["seconds"] - known_s, 0.0) / n_tangents
    return Costs(fine_s, 0.0, tangent_s, coarse_s, 0.0, 0.0, 0.0, 0.0)


def format_sampling_plan(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown. Local."""
    lines = [
        "| sampler and method | ranks | sweeps | s (forecast) | serial, s | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['ranks']} | {row['sweeps']} | {row['seconds']:.3g} | "
        f"{row['serial_seconds']:.3g} | {row['gain']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)
