"""`nodepint bench basis`: what ranks gain that share the tangents, and that they find the same."""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.bench.basis_contestant import N_SLICES, N_SWEEPS, RANK, make_case
from nodepint_mpi.bench.planning.lines import Layout
from nodepint_mpi.bench.planning.recording import record_solve
from nodepint_mpi.bench.planning.stages import Sweeps, count_work
from nodepint_mpi.core.problems import burgers, burgers_problem
from nodepint_mpi.core.propagators import FixedSteps
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.scopes import FINE_FORWARD, TANGENTS
from nodepint_mpi.core.stopping import FixedSweeps
from nodepint_mpi.errors import ConfigError, LayoutError, NodepintError
from nodepint_mpi.parallel.comms import Comms, alone, free_comms, make_comms, world
from nodepint_mpi.parallel.dealing import own_part
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.parallel.tracking import SolveCarry, value_and_grad
from nodepint_mpi.ranks.child import cores_for, find_mpirun, run_for_json
from nodepint_mpi.ranks.launcher import in_job

TIMEOUT_S = 900.0
GRID_TOL, LOSS_TOL = 1e-12, 1e-10
"""By how much iterates and gradients, and losses of a descent, may differ, relative."""

# ---- What the ranks do, and how long it takes ---------------------------------------------------


def count_sweeps(basis_ranks: Sequence[int]) -> list[dict[str, Any]]:
    """What the busiest of ranks does that share tangents, in fine solves of a slice. Local.

    From the recorded operations of one sweep. `counted` is a sweep's fine solves and directions,
    relative to one rank's; `passes` the same with what goes with the directions, a pass of the
    state for each group of them that is pushed through together (`core.sensitivity`).

    Raises:
        ConfigError: for more ranks than directions.
    """
    solver, edges, initial = make_case()
    state, rows, alone_on = jax.ShapeDtypeStruct(initial.shape, float), [], None
    for n_basis in [1, *(n for n in basis_ranks if n > 1)]:
        if n_basis > RANK:
            raise ConfigError(f"{n_basis} ranks cannot share {RANK} directions.")
        work = count_work(record_solve(solver, edges, Layout(1, 1, n_basis), state), Sweeps(1, 0))
        fine, tangents, passes = (
            float(work[what][0]) / N_SLICES
            for what in (
                (FINE_FORWARD, "fine"), (TANGENTS, "tangents"), (TANGENTS, "tangent_passes")
            )
        )  # fmt: skip
        sums = fine + tangents, fine + passes
        alone_on = alone_on or sums
        rows.append(
            {
                "basis_ranks": n_basis,
                "fine": fine,
                "tangents": tangents,
                "promised": (1 + RANK / n_basis) / (1 + RANK),
                "counted": sums[0] / alone_on[0],
                "passes": sums[1] / alone_on[1],
            }
        )
    return rows


def time_sweeps(basis_ranks: Sequence[int], n_repeats: int) -> list[dict[str, Any]]:
    """Seconds of a solve on one core, and on as many as share the tangents. Starts jobs of its own.

    `difference` is of the last states from those of one rank, relative to the largest.

    Raises:
        ConfigError: inside a job, and for more ranks than cores.
        NodepintError: if a job fails.
    """
    if in_job():
        raise ConfigError("`nodepint bench basis --repeats` starts its own jobs: leave out mpirun.")
    cores, rows, last = cores_for(max(basis_ranks)), [], None
    for n_basis in [1, *(n for n in basis_ranks if n > 1)]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "request.json"
            file.write_text(json.dumps({"repeats": n_repeats}))
            command = [sys.executable, "-m", "nodepint_mpi.bench.basis_contestant", str(file)]
            command.append(",".join(map(str, cores[:n_basis])))
            if n_basis > 1:
                command = [find_mpirun(), "-n", str(n_basis), *command]
            found, why = run_for_json(command, TIMEOUT_S)
        if found is None:
            raise NodepintError(f"{n_basis} ranks that share tangents failed: {why}")
        state = np.array(found["last"])
        last = state if last is None else last
        seconds = statistics.median(found["seconds"])
        rows.append(
            {
                "basis_ranks": n_basis,
                "seconds": found["seconds"],
                "median_s": seconds,
                "speed_up": (rows[0]["median_s"] if rows else seconds) / seconds,
                "difference": float(np.max(np.abs(state - last)) / np.max(np.abs(last))),
            }
        )
    return rows


def format_basis(counted: Sequence[dict[str, Any]], timed: Sequence[dict[str, Any]]) -> str:
    """Both tables in Markdown. Local."""
    lines = [
        f"Burgers on 1,024 points, {N_SLICES} slices, {RANK} exact tangents a slice. Of a sweep, "
        "for each slice of the busiest rank:",
        "",
        "| basis ranks | fine solves | directions | (1 + r/B) / (1 + r) | counted "
        "| with the state's own passes |",
        "|---|---|---|---|---|---|",
    ]
    for row in counted:
        lines.append(
            f"| {row['basis_ranks']} | {row['fine']:g} | {row['tangents']:g} | "
            f"{row['promised']:.4f} | {row['counted']:.4f} | {row['passes']:.4f} |"
        )
    if timed:
        lines += [
            "",
            f"Measured, {N_SWEEPS} sweeps, a core for each rank:",
            "",
            "| basis ranks | s (median) | all | times as fast as one | last state differs by |",
            "|---|---|---|---|---|",
        ]
    for row in timed:
        every = ", ".join(f"{seconds:.3g}" for seconds in row["seconds"])
        lines.append(
            f"| {row['basis_ranks']} | {row['median_s']:.3g} | {every} | {row['speed_up']:.2f} | "
            f"{row['difference']:.1e} |"
        )
    return "\n".join(lines)


# ---- The same on every grid ---------------------------------------------------------------------

_SLICES, _SAMPLES, _POINTS, _HORIZON = 8, 4, 24, 1.0
_SWEEPS, _STEPS, _RATE, _VISCOSITY = 3, 20, 1e-3, 0.02
_FINE = FixedSteps(RK4(), 6)


class Found(NamedTuple):
    """Of all samples: states at the edges, (edges, samples, points), and jumps of some sweeps; the
    loss and its derivative by the viscosity; losses of a descent."""

    interface: np.ndarray
    jumps: np.ndarray
    loss: np.ndarray
    gradient: np.ndarray
    losses: np.ndarray


def parse_grid(text: str) -> tuple[int, int, int]:
    """`2x2x2`: ranks along time, data and basis. Local.

    Raises:
        ConfigError: for anything else.
    """
    try:
        n_time, n_data, n_basis = map(int, text.split("x"))
    except ValueError:
        n_time = n_data = n_basis = 0
    if min(n_time, n_data, n_basis) < 1:
        raise ConfigError(
            f"Expected a grid of ranks along time, data and basis such as 2x2x2, got '{text}'."
        )
    return n_time, n_data, n_basis


def compare_grids(
    grids: Sequence[str], report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Solve and descend on grids of all ranks, and on one rank. Collective over the world.

    Burgers' equation with the tangent method: iterates of a few sweeps, a loss with its gradient,
    and the losses of a descent by tracked steps. `differences` are relative to the largest number
    of one rank's. Equal on all ranks.

    Args:
        grids: Such as "2x2x2": ranks along time, data and basis.
        report: Told about each grid as it is done.

    Raises:
        LayoutError: on all ranks, if they do not form such a grid, or have nothing to share.
    """
    shapes = [parse_grid(grid) for grid in grids]
    for n_time, n_data, n_basis in shapes:
        if n_time * n_data * n_basis != world().Get_size():
            raise LayoutError(
                f"{world().Get_size()} ranks do not form {n_time} x {n_data} x {n_basis}: start "
                f"{n_time * n_data * n_basis}."
            )
        if n_time > _SLICES or _SAMPLES % n_data or n_basis > _POINTS:
            raise LayoutError(
                f"A grid can have up to {_SLICES} ranks along time, a divisor of {_SAMPLES} along "
                f"data, and up to {_POINTS} along the basis."
            )
    rows, wanted = [], None
    if world().Get_rank() == 0:
        wanted = _find(make_comms(alone()))
    wanted = world().bcast(wanted)
    assert wanted is not None  # the first rank has it
    for n_time, n_data, n_basis in shapes:
        found = _find(make_comms(world(), n_groups=n_data, n_basis=n_basis))
        differences = {
            name: float(np.max(np.abs(ours - one)) / np.max(np.abs(one)))
            for name, ours, one in zip(Found._fields, found, wanted, strict=True)
        }
        tols = {name: LOSS_TOL if name == "losses" else GRID_TOL for name in Found._fields}
        same = all(differences[name] <= tol for name, tol in tols.items())
        all_same = world().allgather(same)
        rows.append(
            {"grid": [n_time, n_data, n_basis], "differences": differences, "same": all(all_same)}
        )
        numbers = ", ".join(f"{name} {off:.1e}" for name, off in differences.items())
        report(f"{n_time} x {n_data} x {n_basis}: {numbers}{'' if rows[-1]['same'] else ': OFF'}")
    return rows


def _field(t, u, viscosity):
    args = {"nu": viscosity, "dx": 2.0 / (_POINTS - 1)}
    return jax.vmap(lambda v: burgers(t, v, args))(u)


def _find(comms: Comms) -> Found:
    """By the ranks of these communicators, which are freed. Collective over them."""
    mine = own_part(comms.time, _SAMPLES)
    scales = jnp.linspace(0.5, 1.0, _SAMPLES)[mine, None]
    start = scales * jnp.asarray(burgers_problem(_POINTS, _VISCOSITY).initial)[None]
    basis = SharedBasis("jumps", rank=_POINTS, n_new=7, n_batch_axes=1)

    def run(viscosity, **options):
        return solve(
            _field, start, np.linspace(0.0, _HORIZON, _SLICES + 1), fine=_FINE, args=viscosity,
            method="tangent", basis=basis, n_batch_axes=1, comm=comms.time, check_ranks=False,
            **options,
        )  # fmt: skip

    def solved(viscosity):
        solution = run(viscosity, stopping=FixedSweeps(_SWEEPS), adjoint_tol=0.0)
        loss = jnp.sum(solution.interface[-1] ** 2)
        return loss, (solution.interface, solution.record.jumps[:_SWEEPS])

    def tracked(viscosity, carry):
        return jnp.sum(run(viscosity, carry=carry).interface[-1] ** 2)

    def of_all(value) -> float:
        return comms.data.allreduce(float(value))

    viscosity, carry, losses = jnp.array(_VISCOSITY), SolveCarry(), []
    (loss, (interface, jumps)), gradient = jax.jit(jax.value_and_grad(solved, has_aux=True))(
        viscosity
    )
    step = jax.jit(value_and_grad(tracked))
    for _ in range(_STEPS):
        value, slope, carry = step(viscosity, carry)
        losses.append(of_all(value))
        viscosity = viscosity - _RATE * slope
    parts = comms.data.allgather(np.asarray(interface))
    found = Found(
        np.concatenate(parts, axis=1), np.asarray(jumps), np.array(of_all(loss)),
        np.asarray(gradient), np.array(losses),
    )  # fmt: skip
    jax.effects_barrier()
    free_comms(comms)
    return found
