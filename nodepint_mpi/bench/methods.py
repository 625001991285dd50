"""`nodepint bench methods`: every method against the serial solution and the serial gradient."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nodepint_mpi.bench.cases import SWEEP_CASES, make_methods
from nodepint_mpi.bench.sweeps import Exact, relative_error, solve_exactly
from nodepint_mpi.build.model import unknown_name
from nodepint_mpi.core.partition import OwnedSlices, own_slices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.stopping import JumpTolerance
from nodepint_mpi.core.sweeps import slice_distance
from nodepint_mpi.core.types import Params, State
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import Comms, TimeComm
from nodepint_mpi.parallel.differentiate import TimeSolver, linearise_solve
from nodepint_mpi.parallel.exchange import bcast_from, max_over_ranks, sum_over_ranks

TIGHT = 1e-13  # Kuramoto makes errors 1e4 times larger on the way
ADJOINT_TIGHT = 1e-12
PASS = 1e-8


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
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Solve and differentiate every problem by every method, to the end.

    Collective over `comms`; equal on all ranks; needs x64.

    Args:
        comms: The run's communicators.
        names: Keys of `SWEEP_CASES`; all if empty.
        methods: Some of the methods, by the names of `make_methods`; all a problem has if empty.
        report: Told a line of the table as each method ends.
    """
    for name in names:
        if name not in SWEEP_CASES:
            raise ConfigError(unknown_name("nodepint bench methods", name, SWEEP_CASES))
    rows = []
    for name in names or SWEEP_CASES:
        case = SWEEP_CASES[name]
        every = make_methods(case)
        for label in methods:
            if label not in every:
                raise ConfigError(unknown_name("--method", label, every))
        edges = np.linspace(*case.problem.span, case.n_slices + 1)
        owned = own_slices(edges, comms.time.size, comms.time.rank)
        numbers = jax.tree.map(jnp.asarray, (case.problem.args, case.problem.initial))
        exact = jax.jit(
            lambda *numbers, case=case, owned=owned: solve_exactly(
                comms.time, case, owned, *numbers
            )
        )(*numbers)
        for label in methods or every:
            solver = TimeSolver(
                Propagator(case.problem.field, case.fine),
                every[label],
                JumpTolerance(TIGHT),
                adjoint_tol=ADJOINT_TIGHT,
            )
            began = time.perf_counter()
            run = jax.jit(
                lambda *numbers, solver=solver, owned=owned: check_method(
                    comms.time, solver, owned, *numbers
                )
            )
            outcome = jax.device_get(run(*numbers, exact))._asdict()
            row = {"problem": name, "method": label, "n_ranks": comms.time.size}
            row |= {key: value.item() for key, value in outcome.items()}
            row["ok"] = max(row["error"], row["gradient_error"]) <= PASS
            row["seconds_with_compilation"] = time.perf_counter() - began
            rows.append(row)
            report(_line(row))
    return rows


def check_method(
    comm: TimeComm,
    solver: TimeSolver,
    owned: OwnedSlices,
    params: Params,
    initial: State,
    exact: Exact,
) -> Outcome:
    """Solve, pull back the cotangents of `exact`, compare both. Collective, inside jit."""
    solved = linearise_solve(comm, solver, params, initial, None, owned)
    ends = solved.line.result.end
    largest = max_over_ranks(comm, jnp.max(jnp.abs(exact.ends)))
    error = max_over_ranks(comm, jnp.max(slice_distance(ends, exact.ends))) / largest
    sources = ends / (owned.n_slices * initial.size)
    gradient = solved.line.pull_back(SliceResult(solved.line.result.saves, sources), None)
    whole = sum_over_ranks(comm, gradient.params), bcast_from(comm, gradient.initial, 0)
    errors = [relative_error(*parts) for parts in zip(whole, exact.gradient, strict=True)]
    return Outcome(
        error,
        jnp.max(jnp.stack(errors)),
        solved.record.n_sweeps,
        gradient.record.n_sweeps,
        solved.record.n_damped,
        solved.record.n_fallbacks,
    )


def format_methods(rows: Sequence[dict[str, Any]]) -> str:
    """How many there were, and which did not get there. Local."""
    missed = [f"{row['problem']}: {row['method']}" for row in rows if not row["ok"]]
    told = f"{len(rows) - len(missed)} of {len(rows)} within {PASS:g} of solution and gradient"
    return "\n".join([f"{told}, on {rows[0]['n_ranks']} ranks", *(f"missed: {m}" for m in missed)])


def _line(row: dict[str, Any]) -> str:
    notes = [f"{row[key]} {key}" for key in ("damped", "fallbacks") if row[key]]
    sweeps = f"{row['sweeps']} + {row['adjoint_sweeps']}"
    return (
        f"{row['problem']:16} {row['method']:32} error {row['error']:7.1e}, gradient "
        f"{row['gradient_error']:7.1e}, sweeps {sweeps:>7} {', '.join(notes)}"
    )
