"""`nodepint bench published`: sweeps of plain parareal beside the published counts."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.problems import PROBLEMS, scale_to_box
from nodepint_mpi.core.propagators import AbstractIntegrator, FixedSteps
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.stopping import FreezeSlices
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.run.build_model import unknown_name


class PublishedRun(NamedTuple):
    """One row of a published table: the problem, its propagators, its rule, its count.

    Steps are per slice. With a box the system is scaled to [-1, 1]^d, and so is `eps`.
    """

    problem: str
    n_slices: int
    coarse: AbstractIntegrator
    fine: AbstractIntegrator
    rule: str
    eps: float
    sweeps: int
    box: tuple[Any, Any] | None = None


_FHN: dict[str, Any] = dict(
    problem="fitzhugh_nagumo", n_slices=40,
    coarse=FixedSteps(diffrax.Midpoint(), 4), fine=FixedSteps(RK4(), 4000),
)  # fmt: skip
_ROSSLER: dict[str, Any] = dict(
    problem="rossler", n_slices=40,
    coarse=FixedSteps(diffrax.Euler(), 2250), fine=FixedSteps(RK4(), 112500),
)  # fmt: skip
_LORENZ: dict[str, Any] = dict(
    problem="lorenz", n_slices=50,
    coarse=FixedSteps(RK4(), 6), fine=FixedSteps(RK4(), 450),
)  # fmt: skip
_BURGERS: dict[str, Any] = dict(
    problem="burgers", n_slices=128,
    coarse=FixedSteps(diffrax.Euler(), 4), fine=FixedSteps(diffrax.Dopri8(), 40),
)  # fmt: skip
_FHN_BOX = ((-2.0, -1.0), (2.1, 1.2))
_ROSSLER_BOX = ((-10.0, -11.0, 0.0), (12.0, 8.0, 23.0))
_LORENZ_BOX = ((-17.1, -23.0, 6.0), (18.1, 25.0, 45.0))

RUNS: dict[str, PublishedRun] = {
    "fitzhugh_nagumo": PublishedRun(**_FHN, rule="end", eps=5e-7, sweeps=11, box=_FHN_BOX),
    "fitzhugh_nagumo_5e-9": PublishedRun(**_FHN, rule="end", eps=5e-9, sweeps=14, box=_FHN_BOX),
    "fitzhugh_nagumo_start": PublishedRun(**_FHN, rule="start", eps=1e-6, sweeps=11),
    "lorenz": PublishedRun(**_LORENZ, rule="end", eps=5e-7, sweeps=15, box=_LORENZ_BOX),
    "lorenz_5e-9": PublishedRun(**_LORENZ, rule="end", eps=5e-9, sweeps=17, box=_LORENZ_BOX),
    "burgers": PublishedRun(**_BURGERS, rule="end", eps=5e-7, sweeps=10, box=(0.0, 1.0)),
    "rossler": PublishedRun(**_ROSSLER, rule="end", eps=5e-7, sweeps=18, box=_ROSSLER_BOX),
    "rossler_start": PublishedRun(**_ROSSLER, rule="start", eps=1e-6, sweeps=19),
}
"""Rule `end` is of Gattiglio et al., arXiv:2405.12182 and arXiv:2411.06225; rule `start` of
Pentland et al., Statistics and Computing 33:20 (2023)."""


def run_published(
    comms: Comms, names: Sequence[str], *, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Repeat published runs. Collective over `comms`; equal on all ranks.

    Args:
        comms: The run's communicators.
        names: Keys of `RUNS`; all if empty.
        report: Told about each run as it ends.
    """
    for name in names:
        if name not in RUNS:
            raise ConfigError(unknown_name("bench published", name, RUNS))
    rows = []
    for name in names or RUNS:
        rows.append({"name": name, **repeat_run(comms, RUNS[name])})
        report(f"{name}: {rows[-1]['sweeps']} sweeps, published {rows[-1]['published']}")
    return rows


def repeat_run(comms: Comms, run: PublishedRun) -> dict[str, Any]:
    """One published run, and its true distance from the serial solution. Collective."""
    problem = PROBLEMS[run.problem]
    if run.box is not None:
        problem = scale_to_box(problem, *run.box)
    options: dict[str, Any] = dict(
        fine=run.fine,
        args={name: jnp.asarray(value) for name, value in problem.args.items()},
        comm=comms.time,
    )
    edges = np.linspace(*problem.span, run.n_slices + 1)
    began = time.perf_counter()
    stopping = FreezeSlices(run.eps, "end" if run.rule == "end" else "start")
    solution = solve(
        problem.field, problem.initial, edges, coarse=run.coarse, stopping=stopping, **options
    )
    jax.block_until_ready(solution)
    seconds = time.perf_counter() - began
    serial = solve(problem.field, problem.initial, edges, method="serial", **options)
    return {
        "sweeps": solution.sweeps,
        "published": run.sweeps,
        "error": float(jnp.max(jnp.abs(solution.interface - serial.interface))),
        "updates": solution.updates.tolist(),
        "fronts": solution.fronts.tolist(),
        "status": solution.status.name.lower(),
        "seconds_with_compilation": seconds,
    }


def format_published(rows: list[dict[str, Any]]) -> str:
    """A table; `error` is the true distance from the serial fine solution. Local."""
    lines = [f"{'run':24} {'sweeps':>6} {'published':>9} {'error':>9} {'seconds':>8}"]
    for row in rows:
        lines.append(
            f"{row['name']:24} {row['sweeps']:6d} {row['published']:9d} {row['error']:9.1e} "
            f"{row['seconds_with_compilation']:8.1f}"
        )
    return "\n".join(lines)
