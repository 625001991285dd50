"""Sweeps of parareal along stochastic paths, path by path, for `nodepint bench sde`."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.bench.sde_cases import SDE_CASES, SdeCase
from nodepint_mpi.core.propagators import FixedSteps
from nodepint_mpi.core.stopping import AbstractStopping, FixedSweeps, FreezeSlices
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.noise import Noise
from nodepint_mpi.parallel.solution import Solution

N_SLICES, N_FINE, N_PATHS, TOL = 32, 64, 200, 1e-6
SHOWN = 6
"""Iterates whose errors are shown."""
COARSE = {
    "1 Euler": (diffrax.Euler(), 1),
    "4 Euler": (diffrax.Euler(), 4),
    "1 Milstein": (diffrax.ItoMilstein(), 1),
}


def run_sde_sweeps(comms: Comms, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Sweeps until no slice of a path changes by `TOL`. Collective; equal on all ranks.

    Fine steps are by the solver of the coarse ones. Errors of iterates are the largest of all paths
    against the serial solve.
    """
    rows = []
    for name, case in SDE_CASES.items():
        for coarse in COARSE:
            if case.additive and "Milstein" in coarse:
                continue  # it is Euler's method there
            rows.append({"case": name, "coarse": coarse, **count_sweeps(comms, case, coarse)})
            report(f"{name}, {coarse}: {rows[-1]['median']:g} sweeps")
    return rows


def count_sweeps(comms: Comms, case: SdeCase, coarse: str) -> dict[str, Any]:
    """Sweeps of all paths of one equation, and errors of iterates. Collective.

    Args:
        comms: The run's communicators.
        case: The equation.
        coarse: Key of `COARSE`.
    """
    solver, n_coarse = COARSE[coarse]

    def run(stopping: AbstractStopping | None, **options: Any) -> Solution:
        return solve(
            case.drift, jnp.asarray(case.start), np.linspace(0.0, case.horizon, N_SLICES + 1),
            diffusion=case.diffusion, args=case.args, in_axes=(None, None), stopping=stopping,
            noise=Noise(0, jnp.arange(N_PATHS), additive=case.additive), **options,
            fine=FixedSteps(solver, N_FINE), coarse=FixedSteps(solver, n_coarse), comm=comms.time,
        )  # fmt: skip

    solution, serial = run(FreezeSlices(TOL)), run(None, method="serial")
    sweeps = solution.sample_sweeps
    assert sweeps is not None  # a batch has them
    iterates = [run(FixedSweeps(0))]
    while len(iterates) < SHOWN:  # a sweep from an iterate is the next one
        iterates.append(run(FixedSweeps(1), guess=iterates[-1].interface))

    def error(found: Solution) -> float:
        return float(jnp.max(jnp.abs(found.interface - serial.interface)))

    return {
        "median": float(np.median(sweeps)),
        "largest": int(np.max(sweeps)),
        "guarded": int(solution.record.n_guarded),
        "status": solution.status.name.lower(),
        "error": error(solution),
        "errors": [error(found) for found in iterates],
    }


def format_sde_sweeps(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown. Local."""
    lines = [
        "| equation, coarse steps a slice | sweeps: median / largest | status | guarded slices | "
        f"error at the end | errors of iterates 0 to {SHOWN - 1} |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = " ".join(f"{error:.0e}" for error in row["errors"])
        lines.append(
            f"| {row['case']}, {row['coarse']} | {row['median']:g} / {row['largest']} | "
            f"{row['status']} | {row['guarded']} | {row['error']:.0e} | {errors} |"
        )
    return "\n".join(lines)
