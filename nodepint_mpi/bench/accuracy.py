"""Every method beside the serial solve: `nodepint bench methods`, `gradients` and `published`.

`bench.sweeps` looks at every iterate of what is brought to its end here.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from nodepint_mpi.bench.cases import (
    GRADIENT_CASES,
    GRADIENT_TOL,
    HORIZON,
    N_SLICES,
    PUBLISHED_RUNS,
    STEPS_PER_SLICE,
    SWEEP_CASES,
    TIMES,
    GradientCase,
    PublishedRun,
    SweepCase,
    make_gradient_case,
    make_methods,
    make_model_and_data,
    own_method,
)
from nodepint_mpi.build.imports import is_import_path
from nodepint_mpi.build.model import unknown_name
from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.partition import OwnedSlices, own_slices
from nodepint_mpi.core.problems import PROBLEMS, scale_to_box
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.stopping import FreezeSlices, JumpTolerance
from nodepint_mpi.core.sweeps import slice_distance
from nodepint_mpi.core.types import Block, Params, State
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.adjoint import pull_back_walk
from nodepint_mpi.parallel.comms import Comms, TimeComm
from nodepint_mpi.parallel.differentiate import linearize_solve
from nodepint_mpi.parallel.exchange import bcast_from, max_over_ranks, sum_over_ranks
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.methods.serial import walk_linearized
from nodepint_mpi.training.batch_model import split_model
from nodepint_mpi.training.step import gradient_part, summed

TIGHT = 1e-13  # Kuramoto makes errors 1e4 times larger on the way
ADJOINT_TIGHT = 1e-12
PASS = 1e-8

Report = Callable[[str], None]


def choose(key: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """These names, or all that are known if there are none. Local.

    Raises:
        ConfigError: for one that is not known; `key` names it.
    """
    for name in names:
        if name not in known:
            raise ConfigError(unknown_name(key, name, known))
    return list(names or known)


# ---- The serial solve --------------------------------------------------------------------------


class Exact(NamedTuple):
    """The serial solution on the owned slices, the loss read there, and its whole gradient."""

    starts: Block
    ends: Block
    sources: Block
    gradient: tuple[Params, State]


class Trial(NamedTuple):
    """A case on these ranks: methods by name, parameters and initial state, the serial solve."""

    case: SweepCase
    methods: dict[str, AbstractMethod]
    owned: OwnedSlices
    numbers: tuple[Params, State]
    exact: Exact


def set_up_trial(comms: Comms, case: SweepCase, methods: Sequence[str]) -> Trial:
    """Solve a case serially, to compare these methods with (all if empty). Collective.

    Raises:
        ConfigError: for an unknown method.
    """
    every = make_methods(case)
    key = "--method"
    every |= {path: own_method(case, path, key) for path in methods if is_import_path(path)}
    labels = choose(key, methods, every)
    edges = np.linspace(*case.problem.span, case.n_slices + 1)
    owned = own_slices(edges, comms.time.size, comms.time.rank)
    numbers = jax.tree.map(jnp.asarray, (case.problem.args, case.problem.initial))
    exact = jax.jit(lambda *numbers: solve_exactly(comms.time, case, owned, *numbers))(*numbers)
    return Trial(case, {label: every[label] for label in labels}, owned, numbers, exact)


def solve_exactly(
    comm: TimeComm, case: SweepCase, owned: OwnedSlices, params: Params, initial: State
) -> Exact:
    """The serial solution and the gradient of half its mean square. Collective, inside jit."""
    line = Line(comm, owned, params)
    walked = walk_linearized(line, Propagator(case.problem.field, case.fine), initial)
    ends = walked.states.ends
    sources = ends / (owned.n_slices * initial.size)
    gradient = pull_back_walk(line, walked, SliceResult(walked.result.saves, sources))
    whole = sum_over_ranks(comm, gradient.params), bcast_from(comm, gradient.initial, 0)
    return Exact(walked.states.starts, ends, sources, whole)


def relative_error(ours: Any, wanted: Any) -> Float[Array, ""]:
    """Distance of two trees relative to the second. Local."""
    ours, wanted = ravel_pytree(ours)[0], ravel_pytree(wanted)[0]
    return jnp.linalg.norm(ours - wanted) / jnp.linalg.norm(wanted)


# ---- Every method ------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a solve and its pull-back gave; equal on all ranks."""

    error: Float[Array, ""]
    gradient_error: Float[Array, ""]
    sweeps: Int[Array, ""]
    adjoint_sweeps: Int[Array, ""]
    damped: Int[Array, ""]
    fallbacks: Int[Array, ""]


def run_methods(
    comms: Comms,
    names: Sequence[str] = (),
    *,
    methods: Sequence[str] = (),
    report: Report = lambda line: None,
) -> list[dict[str, Any]]:
    """Solve and differentiate every problem by every method, to the end.

    Collective over `comms`; equal on all ranks; needs x64.

    Args:
        comms: The run's communicators.
        names: Keys of `SWEEP_CASES`; all if empty.
        methods: Some of the methods, by the names of `make_methods`; all a problem has if empty.
        report: Told a line of the table as each method ends.
    """
    rows = []
    for name in choose("nodepint bench methods", names, SWEEP_CASES):
        trial = set_up_trial(comms, SWEEP_CASES[name], methods)
        for label, method in trial.methods.items():
            began = time.perf_counter()
            row = {"problem": name, "method": label, "n_ranks": comms.time.size}
            outcome = _check_method(comms.time, trial, method)
            row |= {key: value.item() for key, value in outcome._asdict().items()}
            row["ok"] = max(row["error"], row["gradient_error"]) <= PASS
            row["seconds_with_compilation"] = time.perf_counter() - began
            rows.append(row)
            report(_format_method(row))
    return rows


def _check_method(comm: TimeComm, trial: Trial, method: AbstractMethod) -> Outcome:
    """Solve, pull back the cotangents of the serial solution, compare both."""
    case, owned = trial.case, trial.owned
    fine, stopping = Propagator(case.problem.field, case.fine), JumpTolerance(TIGHT)
    solver = TimeSolver(fine, method, stopping, adjoint_tol=ADJOINT_TIGHT)

    @jax.jit
    def check(params: Params, initial: State, exact: Exact) -> Outcome:
        solved = linearize_solve(Line(comm, owned, params), solver, initial)
        ends = solved.at.result.end
        largest = max_over_ranks(comm, jnp.max(jnp.abs(exact.ends)))
        sources = ends / (owned.n_slices * initial.size)
        gradient = solved.at.pull_back(SliceResult(solved.at.result.saves, sources))
        whole = sum_over_ranks(comm, gradient.params), bcast_from(comm, gradient.initial, 0)
        errors = [relative_error(*parts) for parts in zip(whole, exact.gradient, strict=True)]
        return Outcome(
            error=max_over_ranks(comm, jnp.max(slice_distance(ends, exact.ends))) / largest,
            gradient_error=jnp.max(jnp.stack(errors)),
            sweeps=solved.record.n_sweeps,
            adjoint_sweeps=gradient.record.n_sweeps,
            damped=solved.record.n_damped,
            fallbacks=solved.record.n_fallbacks,
        )

    return jax.device_get(check(*trial.numbers, trial.exact))


def format_methods(rows: Sequence[dict[str, Any]]) -> str:
    """How many there were, and which did not get there. Local."""
    missed = [f"{row['problem']}: {row['method']}" for row in rows if not row["ok"]]
    told = f"{len(rows) - len(missed)} of {len(rows)} within {PASS:g} of solution and gradient"
    return "\n".join([f"{told}, on {rows[0]['n_ranks']} ranks", *(f"missed: {m}" for m in missed)])


def format_rescues(row: dict[str, Any]) -> str:
    """How often a sweep was damped, or left to a fallback. Local."""
    return ", ".join(f"{row[key]} {key}" for key in ("damped", "fallbacks") if row[key])


def _format_method(row: dict[str, Any]) -> str:
    return (
        f"{row['problem']:16} {row['method']:32} error {row['error']:7.1e}, gradient "
        f"{row['gradient_error']:7.1e}, sweeps {_both(row):>7} {format_rescues(row)}"
    )


def _both(row: dict[str, Any]) -> str:
    """Sweeps, forward and adjoint."""
    return f"{row['sweeps']} + {row['adjoint_sweeps']}"


# ---- The gradient of training ------------------------------------------------------------------


def run_gradients(comms: Comms) -> list[dict[str, Any]]:
    """Relative gradient errors of all cases. Collective over `comms`; equal on all ranks."""
    return [
        {**case._asdict(), "n_ranks": comms.time.size, **gradient_error(comms, case)}
        for case in GRADIENT_CASES
    ]


def gradient_error(comms: Comms, case: GradientCase) -> dict[str, float]:
    """|ours - serial| / |serial| over all parameters, and the sweeps. Collective; needs x64."""
    model, inputs, targets = make_model_and_data(TIMES[case.loss])
    params, static = split_model(model)
    problem = make_gradient_case(comms, case, static)
    ours, report = jax.jit(lambda batch: summed(comms.time, gradient_part(problem, params, batch)))(
        SampleBatch(inputs, targets)
    )
    loss, wanted = _serial_gradient(case.loss, case.steps)
    return {
        "gradient_error": float(relative_error(ours, wanted)),
        "loss_error": float(jnp.abs(report.loss - loss) / loss),
        "sweeps": int(report.sweeps),
        "adjoint_sweeps": int(report.adjoint_sweeps),
    }


def format_gradients(rows: list[dict[str, Any]]) -> str:
    """A table, a line per case. Local."""
    lines = [f"{'loss':12} {'steps':9} {'method':9} {'gradient error':>14} {'sweeps':>7}"]
    for row in rows:
        lines.append(
            f"{row['loss']:12} {row['steps']:9} {row['method']:9} {row['gradient_error']:14.1e} "
            f"{_both(row):>7}"
        )
    return "\n".join(lines)


@functools.cache  # the same for all methods, and it takes longer to compile than some of them
def _serial_gradient(loss: str, steps: str):
    """The same loss and gradient by one plain diffrax solve over the whole horizon."""
    model, inputs, targets = make_model_and_data(TIMES[loss])
    params, static = split_model(model)
    grid = np.linspace(0.0, HORIZON, N_SLICES * STEPS_PER_SLICE + 1)
    controllers = {
        "fixed": diffrax.StepTo(jnp.asarray(grid)),
        "adaptive": diffrax.PIDController(rtol=GRADIENT_TOL, atol=GRADIENT_TOL),
    }

    def serial_loss(params):
        model = eqx.combine(params, static)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, u, args: jax.vmap(lambda v: model.processor(t, v, None))(u)),
            diffrax.Tsit5(),
            t0=0.0,
            t1=HORIZON,
            dt0=None,
            y0=jax.vmap(model.encoder)(inputs),
            saveat=diffrax.SaveAt(ts=jnp.asarray(TIMES[loss])),
            stepsize_controller=controllers[steps],
        )
        predictions = jax.vmap(jax.vmap(model.decoder))(solution.ys)
        return jnp.mean(jnp.square(predictions - jnp.moveaxis(targets, 1, 0)))

    return jax.jit(jax.value_and_grad(serial_loss))(params)


# ---- Published runs ----------------------------------------------------------------------------


def run_published(
    comms: Comms,
    names: Sequence[str],
    *,
    method: str = "parareal",
    report: Report,
) -> list[dict[str, Any]]:
    """Repeat published runs. Collective over `comms`; equal on all ranks.

    Args:
        comms: The run's communicators.
        names: Keys of `PUBLISHED_RUNS`; all if empty.
        method: "parareal" as they did, or "tangent" with the same fine solves and stopping rule.
        report: Told about each run as it ends.
    """
    rows = []
    for name in choose("nodepint bench published", names, PUBLISHED_RUNS):
        rows.append({"name": name, **repeat_run(comms, PUBLISHED_RUNS[name], method)})
        report(f"{name}: {rows[-1]['sweeps']} sweeps, published {rows[-1]['published']}")
    return rows


def repeat_run(comms: Comms, run: PublishedRun, method: str = "parareal") -> dict[str, Any]:
    """One published run, and its true distance from the serial solution. Collective."""
    problem = PROBLEMS[run.problem]
    if run.box is not None:
        problem = scale_to_box(problem, *run.box)
    solve_by = functools.partial(
        solve,
        problem.field,
        problem.initial,
        np.linspace(*problem.span, run.n_slices + 1),
        fine=run.fine,
        args={name: jnp.asarray(value) for name, value in problem.args.items()},
        comm=comms.time,
    )
    own: dict[str, Any] = {"coarse": run.coarse}
    if method == "tangent":
        own = {"coarse": run.tangents, "tangents": run.tangents, "basis": run.basis}
    began = time.perf_counter()
    stopping = FreezeSlices(run.eps, run.rule)
    solution = jax.block_until_ready(solve_by(method=method, stopping=stopping, **own))
    seconds = time.perf_counter() - began
    serial = solve_by(method="serial")
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
