"""`nodepint bench sde`: stochastic equations by `solve`: strong and weak errors, and time.

Sweeps are counted in `bench.sde_sweeps`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nodepint_mpi.bench.sde_cases import SDE_CASES, SdeCase
from nodepint_mpi.bench.sde_sweeps import format_sde_sweeps, run_sde_sweeps
from nodepint_mpi.core.noise import draw_increments, path_key
from nodepint_mpi.core.propagators import FixedSteps
from nodepint_mpi.core.stopping import FixedSweeps
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.noise import Noise

Report = Callable[[str], None]
SEED, N_SLICES = 0, 8
TABLES = "strong", "weak", "sweeps", "time"
MULTIPLICATIVE = {"Euler": diffrax.Euler(), "ItoMilstein": diffrax.ItoMilstein()}
ADDITIVE = {"SRA1": diffrax.SRA1(), "ShARK": diffrax.ShARK()}


def run_sde(
    comms: Comms, tables: Sequence[str], *, n_paths: int, repeats: int, report: Report
) -> dict[str, Any]:
    """The tables asked for. Collective over `comms`; equal on all ranks but for times; needs x64.

    Args:
        comms: The run's communicators.
        tables: Of `TABLES`; all if empty.
        n_paths: Paths of the strong errors; ten times as many for the weak ones.
        repeats: Of the timing.
        report: Told about each table as it ends.
    """
    made = {
        "strong": lambda: _strong(comms, n_paths),
        "weak": lambda: [_weak(comms, SDE_CASES["geometric"], (8, 16, 32, 64), 10 * n_paths)],
        "sweeps": lambda: run_sde_sweeps(comms, report),
        "time": lambda: [_times(comms, case, repeats) for case in SDE_CASES.items()],
    }
    result = {}
    for name in tables or TABLES:
        result[name] = made[name]()
        report(f"{name}: done")
    return result


def format_sde(result: dict[str, Any]) -> str:
    """The tables in Markdown. Local."""
    parts = []
    for name, rows in result.items():
        if name in ("strong", "weak"):
            parts.append(_format_errors(name, rows))
        elif name == "sweeps":
            parts.append(format_sde_sweeps(rows))
        else:
            parts.append(_format_times(rows))
    return "\n\n".join(parts)


# ---- Errors ------------------------------------------------------------------------------------


def _strong(comms: Comms, n_paths: int) -> list[dict[str, Any]]:
    levels = 64, 256, 1024
    rows = [
        _exact_errors(comms, SDE_CASES["geometric"], solver, levels, n_paths)
        for solver in MULTIPLICATIVE
    ]
    levels = 32, 64, 128, 256
    case = SDE_CASES["periodic"]  # where the drift is linear, these solvers are of order two
    return rows + [_common_path_errors(comms, case, solver, levels, n_paths) for solver in ADDITIVE]


def _solve(comms: Comms, case: SdeCase, n_paths: int, args: Any, **options: Any) -> Array:
    """States at the end of paths with arguments of their own, (paths,). Collective."""
    axes = None, None if args is case.args else 0
    solution = solve(
        case.drift, jnp.asarray(case.start), np.linspace(0.0, case.horizon, N_SLICES + 1),
        diffusion=case.diffusion, args=args, in_axes=axes, comm=comms.time, check_ranks=False,
        noise=Noise(SEED, jnp.arange(n_paths), additive=case.additive), **options,
    )  # fmt: skip
    return solution.interface[-1]


def _exact_errors(
    comms: Comms, case: SdeCase, solver: str, levels: Sequence[int], n_paths: int
) -> dict[str, Any]:
    """Root mean square errors of states and of their derivatives, against the closed form."""
    exact = case.exact
    assert exact is not None  # cases of this table have one
    own = {name: jnp.full(n_paths, value) for name, value in case.args.items()}
    errors: dict[str, list[float]] = {name: [] for name in ("X", *case.args)}
    for n_steps in levels:
        fine = FixedSteps(MULTIPLICATIVE[solver], n_steps // N_SLICES)

        def ends(args, fine=fine):
            found = _solve(comms, case, n_paths, args, fine=fine, method="serial")
            return jnp.sum(found), found

        w = _brownian_ends(n_paths, n_steps, case.horizon)

        def wanted(args, w=w):
            found = exact(args, case.start, case.horizon, w)
            return jnp.sum(found), found

        (_, found), slopes = jax.jit(jax.value_and_grad(ends, has_aux=True))(own)
        (_, right), right_slopes = jax.value_and_grad(wanted, has_aux=True)(own)
        errors["X"].append(_rms(found - right))
        for name in case.args:
            errors[name].append(_rms(slopes[name] - right_slopes[name]))
    return _with_slopes(solver, levels, errors)


def _common_path_errors(
    comms: Comms, case: SdeCase, solver: str, levels: Sequence[int], n_paths: int
) -> dict[str, Any]:
    """Root mean square errors against eight times the finest steps along the same path.

    Iteration 0 of parareal is the coarse solution, of sums of the fine increments.
    """
    steps = ADDITIVE[solver]
    finest = FixedSteps(steps, 8 * max(levels) // N_SLICES)

    def by(n_steps: int) -> Array:
        coarse = FixedSteps(steps, n_steps // N_SLICES)
        return _solve(
            comms, case, n_paths, case.args, fine=finest, coarse=coarse, method="parareal",
            stopping=FixedSweeps(0),
        )  # fmt: skip

    right = _solve(comms, case, n_paths, case.args, fine=finest, method="serial")
    return _with_slopes(solver, levels, {"X": [_rms(by(n) - right) for n in levels]})


def _weak(comms: Comms, case: SdeCase, levels: Sequence[int], n_paths: int) -> dict[str, Any]:
    """Errors of the mean. Those of the paths are averaged, so that what the mean of the paths
    themselves misses does not count."""
    assert case.exact is not None  # the case of this table has one
    args = {name: jnp.asarray(value) for name, value in case.args.items()}
    errors = []
    for n_steps in levels:
        fine = FixedSteps(MULTIPLICATIVE["Euler"], n_steps // N_SLICES)
        found = _solve(comms, case, n_paths, case.args, fine=fine, method="serial")
        w = _brownian_ends(n_paths, n_steps, case.horizon)
        right = case.exact(args, case.start, case.horizon, w)
        errors.append(abs(float(jnp.mean(found - right))))
    return _with_slopes("Euler", levels, {"mean of X": errors})


def _brownian_ends(n_paths: int, n_steps: int, horizon: float) -> Array:
    """W at the end of every path, (paths,)."""

    def one(path):
        width = jnp.asarray(horizon / n_steps)
        return jnp.sum(draw_increments(path_key(SEED, path), 0, n_steps, width, ()).w)

    return jax.jit(jax.vmap(one))(jnp.arange(n_paths))


def _rms(errors: Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(errors))))


def _with_slopes(solver: str, levels: Sequence[int], errors: dict) -> dict[str, Any]:
    fits = {n: -float(np.polyfit(np.log(levels), np.log(e), 1)[0]) for n, e in errors.items()}
    return {"solver": solver, "steps": list(levels), "errors": errors, "orders": fits}


def _format_errors(name: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"| {name} errors | steps | errors | order |", "|---|---|---|---|"]
    for row in rows:
        for of, errors in row["errors"].items():
            what = of if of.endswith("X") else f"dX/d{of}"
            shown = ", ".join(f"{error:.1e}" for error in errors)
            steps = ", ".join(map(str, row["steps"]))
            order = f"{row['orders'][of]:.2f}"
            lines.append(f"| {row['solver']}, {what} | {steps} | {shown} | {order} |")
    return "\n".join(lines)


# ---- Time --------------------------------------------------------------------------------------


def _times(comms: Comms, named: tuple[str, SdeCase], repeats: int) -> dict[str, Any]:
    """A serial solve and a loop over the same steps written out by hand, in turn."""
    name, case = named
    n_paths, n_steps = 256, N_SLICES * 256
    steps = FixedSteps(diffrax.Euler(), n_steps // N_SLICES)
    contenders = {
        "solve": lambda: _solve(comms, case, n_paths, case.args, fine=steps, method="serial"),
        "scan": _scan(case, n_paths, n_steps),
    }
    times: dict[str, list[float]] = {key: [] for key in contenders}
    ends = {}
    for repeat in range(repeats + 1):
        for key, contender in contenders.items():
            began = time.perf_counter()
            ends[key] = jax.block_until_ready(contender())
            if repeat:
                times[key].append(time.perf_counter() - began)
    medians = {f"{key}_s": statistics.median(values) for key, values in times.items()}
    difference = float(jnp.max(jnp.abs(ends["solve"] - ends["scan"])))
    return {
        "case": name, "n_paths": n_paths, "n_steps": n_steps, **medians,
        "ratio": medians["solve_s"] / medians["scan_s"], "difference": difference,
    }  # fmt: skip


def _scan(case: SdeCase, n_paths: int, n_steps: int) -> Callable[[], Array]:
    """Euler-Maruyama as one writes it without us: all increments of a path, then a loop."""
    width = case.horizon / n_steps

    def one(path, args):
        dw = draw_increments(path_key(SEED, path), 0, n_steps, jnp.asarray(width), ()).w

        def step(u, row):
            t, dw = row
            return u + width * case.drift(t, u, args) + case.diffusion(t, u, args) * dw, None

        return jax.lax.scan(step, jnp.asarray(case.start), (width * jnp.arange(n_steps), dw))[0]

    args = {key: jnp.asarray(value) for key, value in case.args.items()}
    every = jax.jit(jax.vmap(one, in_axes=(0, None)))
    return lambda: every(jnp.arange(n_paths), args)


def _format_times(rows: list[dict[str, Any]]) -> str:
    lines = ["| serial time | solve | scan by hand | ratio | difference |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['case']}, {row['n_paths']} paths, {row['n_steps']} steps | "
            f"{row['solve_s'] * 1e3:.1f} ms | {row['scan_s'] * 1e3:.1f} ms | {row['ratio']:.2f} | "
            f"{row['difference']:.0e} |"
        )
    return "\n".join(lines)
