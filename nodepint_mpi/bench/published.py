"""`nodepint bench published`: sweeps beside the published counts, of parareal or of our own."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.build.model import unknown_name
from nodepint_mpi.core.problems import PROBLEMS, scale_to_box
from nodepint_mpi.core.propagators import AbstractIntegrator, FixedSteps
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.stopping import FreezeSlices
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.shared_basis import SharedBasis


class PublishedRun(NamedTuple):
    """One row of a published table: the problem, its propagators, its rule, its count.

    Steps are per slice. With a box the system is scaled to [-1, 1]^d, and so is `eps`. `learned`
    are the counts of parareal with learned corrections: by a Gaussian process on all data, and on
    nearest neighbors. `tangents` and `basis` are what our own method takes instead of learning,
    with `tangents` for coarse propagator too.
    """

    problem: str
    n_slices: int
    coarse: AbstractIntegrator
    fine: AbstractIntegrator
    rule: str
    eps: float
    sweeps: int
    learned: tuple[int, ...]
    tangents: AbstractIntegrator
    basis: SharedBasis
    box: tuple[Any, Any] | None = None


_FHN: dict[str, Any] = dict(
    problem="fitzhugh_nagumo", n_slices=40,
    coarse=FixedSteps(diffrax.Midpoint(), 4), fine=FixedSteps(RK4(), 4000),
    tangents=FixedSteps(RK4(), 10), basis=SharedBasis("identity"),
)  # fmt: skip
_ROSSLER: dict[str, Any] = dict(
    problem="rossler", n_slices=40,
    coarse=FixedSteps(diffrax.Euler(), 2250), fine=FixedSteps(RK4(), 112500),
    tangents=FixedSteps(RK4(), 1000), basis=SharedBasis("identity"),
)  # fmt: skip
_LORENZ: dict[str, Any] = dict(
    problem="lorenz", n_slices=50,
    coarse=FixedSteps(RK4(), 6), fine=FixedSteps(RK4(), 450),
    tangents=FixedSteps(RK4(), 45), basis=SharedBasis("identity"),
)  # fmt: skip
_BURGERS: dict[str, Any] = dict(
    problem="burgers", n_slices=128,
    coarse=FixedSteps(diffrax.Euler(), 4), fine=FixedSteps(diffrax.Dopri8(), 40),
    tangents=FixedSteps(RK4(), 4), basis=SharedBasis("jumps", 64, 32),
)  # fmt: skip
_FHN_BOX = ((-2.0, -1.0), (2.1, 1.2))
_ROSSLER_BOX = ((-10.0, -11.0, 0.0), (12.0, 8.0, 23.0))
_LORENZ_BOX = ((-17.1, -23.0, 6.0), (18.1, 25.0, 45.0))

RUNS: dict[str, PublishedRun] = {
    "fitzhugh_nagumo": PublishedRun(
        **_FHN, rule="end", eps=5e-7, sweeps=11, learned=(5, 5), box=_FHN_BOX
    ),
    "fitzhugh_nagumo_5e-9": PublishedRun(
        **_FHN, rule="end", eps=5e-9, sweeps=14, learned=(6, 6), box=_FHN_BOX
    ),
    "fitzhugh_nagumo_start": PublishedRun(**_FHN, rule="start", eps=1e-6, sweeps=11, learned=(5,)),
    "lorenz": PublishedRun(
        **_LORENZ, rule="end", eps=5e-7, sweeps=15, learned=(11, 9), box=_LORENZ_BOX
    ),
    "lorenz_5e-9": PublishedRun(
        **_LORENZ, rule="end", eps=5e-9, sweeps=17, learned=(12, 10), box=_LORENZ_BOX
    ),
    "burgers": PublishedRun(
        **_BURGERS, rule="end", eps=5e-7, sweeps=10, learned=(6, 9), box=(0.0, 1.0)
    ),
    "rossler": PublishedRun(
        **_ROSSLER, rule="end", eps=5e-7, sweeps=18, learned=(13, 12), box=_ROSSLER_BOX
    ),
    "rossler_start": PublishedRun(**_ROSSLER, rule="start", eps=1e-6, sweeps=19, learned=(13,)),
}
"""Rule `end` is of Gattiglio et al., arXiv:2405.12182 and arXiv:2411.06225; rule `start` of
Pentland et al., Statistics and Computing 33:20 (2023)."""


def run_published(
    comms: Comms,
    names: Sequence[str],
    *,
    method: str = "parareal",
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Repeat published runs. Collective over `comms`; equal on all ranks.

    Args:
        comms: The run's communicators.
        names: Keys of `RUNS`; all if empty.
        method: "parareal" as they did, or "tangent" with the same fine solves and stopping rule.
        report: Told about each run as it ends.
    """
    for name in names:
        if name not in RUNS:
            raise ConfigError(unknown_name("nodepint bench published", name, RUNS))
    rows = []
    for name in names or RUNS:
        rows.append({"name": name, **repeat_run(comms, RUNS[name], method)})
        report(f"{name}: {rows[-1]['sweeps']} sweeps, published {rows[-1]['published']}")
    return rows


def repeat_run(comms: Comms, run: PublishedRun, method: str = "parareal") -> dict[str, Any]:
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
    own: dict[str, Any] = {"method": method, "coarse": run.coarse}
    if method == "tangent":
        own |= dict(basis=run.basis, tangents=run.tangents, coarse=run.tangents)
    began = time.perf_counter()
    stopping = FreezeSlices(run.eps, "end" if run.rule == "end" else "start")
    solution = solve(
        problem.field,
        problem.initial,
        edges,
        stopping=stopping,
        **own,
        **options,
    )
    jax.block_until_ready(solution)
    seconds = time.perf_counter() - began
    serial = solve(problem.field, problem.initial, edges, method="serial", **options)
    return {
        "method": method,
        "sweeps": solution.sweeps,
        "published": run.sweeps,
        "published_learned": run.learned,
        "error": float(jnp.max(jnp.abs(solution.interface - serial.interface))),
        "updates": solution.updates.tolist(),
        "fronts": solution.fronts.tolist(),
        "status": solution.status.name.lower(),
        "seconds_with_compilation": seconds,
    }


def format_published(rows: list[dict[str, Any]]) -> str:
    """A table; `error` is the true distance from the serial fine solution. Local."""
    head = f"{'parareal':>9} {'learned':>9} {'error':>9} {'seconds':>8}"
    lines = [f"{'run':24} {'sweeps':>6} {head}   (parareal, learned: as published)"]
    for row in rows:
        learned = " / ".join(map(str, row["published_learned"]))
        lines.append(
            f"{row['name']:24} {row['sweeps']:6d} {row['published']:9d} {learned:>9} "
            f"{row['error']:9.1e} {row['seconds_with_compilation']:8.1f}"
        )
    return "\n".join(lines)
