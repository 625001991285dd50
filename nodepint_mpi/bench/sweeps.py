"""`nodepint bench sweeps`: error against sweeps and work, method by method, forward and adjoint."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nodepint_mpi.bench.accuracy import Exact, choose, format_rescues, relative_error, set_up_trial
from nodepint_mpi.bench.cases import SWEEP_CASES, SweepCase
from nodepint_mpi.bench.costs import (
    DEFINITION,
    Cost,
    fine_equivalents,
    method_cost,
)
from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.sensitivity import tangent_passes
from nodepint_mpi.core.stopping import FixedSweeps
from nodepint_mpi.core.sweeps import slice_distance
from nodepint_mpi.core.transposed import linearise_block
from nodepint_mpi.core.types import Params, State
from nodepint_mpi.parallel.adjoint import Coiterate, Linear, solve_adjoint
from nodepint_mpi.parallel.comms import Comms, TimeComm
from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.parallel.exchange import bcast_from, max_over_ranks, sum_over_ranks
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.judge import Iterate
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.methods.tangent import Tangent
from nodepint_mpi.parallel.shared_basis import count_in_use
from nodepint_mpi.parallel.solve import solve_interface


class Sweeps(NamedTuple):
    """What the sweeps of a method did, equal on all ranks; errors have a row for each iterate.

    `errors` are largest differences from the serial solution relative to its largest entry,
    `gradient_errors` those of the gradient. `tangents` counts directions pushed in iteration 0 and
    in every sweep, `linearised` those pushed for the adjoint.
    """

    errors: Float[Array, " iterates"]
    tangents: Int[Array, " iterates"]
    damped: Int[Array, " sweeps"]
    fell_back: Bool[Array, " sweeps"]
    gradient_errors: Float[Array, " iterates"]
    linearised: Int[Array, ""]


def run_sweeps(
    comms: Comms,
    name: str,
    tol: float,
    *,
    methods: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare methods on one problem. Collective over `comms`; equal on all ranks; needs x64.

    Args:
        comms: The run's communicators.
        name: Key of `SWEEP_CASES`.
        tol: Relative error that counts as solved.
        methods: Some of the methods, by the names of `make_methods`; all if empty.
        report: Told about each method as it ends.
    """
    choose("nodepint bench sweeps", [name], SWEEP_CASES)
    trial = set_up_trial(comms, SWEEP_CASES[name], methods)
    case = trial.case
    steps = (case.fine, case.coarse, case.cheap)
    weights = comms.control.bcast([fine_equivalents(case, some) for some in steps])
    weigh = dict(zip(steps, weights, strict=True))
    rows = []
    for label, method in trial.methods.items():
        sweep = jax.jit(
            lambda *numbers, method=method: sweep_method(
                comms.time, case, method, trial.owned, *numbers, tol=tol
            )
        )
        result = sweep(*trial.numbers, trial.exact)
        costs = [method_cost(some, weigh) for some in (method, method.fallback())]
        rows.append({"method": label, **judge_sweeps(case, costs, result, tol)})
        report(f"{name}: {label} done")
    return {
        "problem": name,
        "n_slices": case.n_slices,
        "n_ranks": comms.time.size,
        "tol": tol,
        "coarse": weights[1],
        "cheap": weights[2],
        "definition": DEFINITION,
        "methods": rows,
    }


class _Seen(NamedTuple):
    """Rows of `Sweeps` so far; what the method had learned when its error fell to the tolerance."""

    errors: Float[Array, " iterates"]
    tangents: Int[Array, " iterates"]
    damped: Int[Array, " iterates"]
    n_fallbacks: Int[Array, " iterates"]
    reached: Bool[Array, ""]
    memory: Any


def sweep_method(
    comm: TimeComm,
    case: SweepCase,
    method: AbstractMethod,
    owned: OwnedSlices,
    params: Params,
    initial: State,
    exact: Exact,
    *,
    tol: float,
) -> Sweeps:
    """Forward sweeps, then adjoint ones at the serial solution. Collective, inside jit.

    Those of a solve, but that they go on when it would stop. The adjoint gets what the method had
    learned when its error fell to `tol`.
    """
    line, n_sweeps = Line(comm, owned, params), case.n_sweeps
    solver = TimeSolver(
        Propagator(case.problem.field, case.fine),
        method,
        FixedSweeps(n_sweeps),
        adjoint_tol=0.0,
        adjoint_max_sweeps=n_sweeps,
    )
    largest = max_over_ranks(comm, jnp.max(jnp.abs(exact.ends)))

    def look(seen: _Seen | None, iterate: Iterate, tally: Tally) -> _Seen:
        k, record = iterate.record.n_sweeps, iterate.record
        distance = jnp.max(slice_distance(iterate.states.ends, exact.ends))
        error = max_over_ranks(comm, distance) / largest
        if seen is None:
            nothing = jnp.zeros(n_sweeps + 1, int)
            unknown = jnp.full(n_sweeps + 1, jnp.nan, error.dtype)
            seen = _Seen(unknown, nothing, nothing, nothing, jnp.array(False), iterate.memory)
        return _Seen(
            seen.errors.at[k].set(error),
            seen.tangents.at[k].set(tally.tangents // owned.n_owned),
            seen.damped.at[k].set(max_over_ranks(comm, iterate.counts.damped)),
            seen.n_fallbacks.at[k].set(record.n_fallbacks),
            seen.reached | ((k > 0) & (error <= tol)),
            jax.tree.map(
                lambda old, new: jnp.where(seen.reached, old, new), seen.memory, iterate.memory
            ),
        )

    seen = solve_interface(line, solver, initial, on_iterate=look).seen
    assert isinstance(seen, _Seen)  # all methods here iterate
    return Sweeps(
        seen.errors,
        seen.tangents,
        seen.damped[1:],
        jnp.diff(seen.n_fallbacks) > 0,
        _adjoint_errors(line, solver, exact, seen.memory, n_sweeps),
        _count_linearised(method, seen.memory),
    )


def _count_linearised(method: AbstractMethod, memory: Any) -> Int[Array, ""]:
    """Directions pushed for the adjoint: none where the forward sweeps kept their tangents."""
    anew = isinstance(method, Tangent) and not method.recycle
    return count_in_use(memory.basis) if anew else jnp.array(0)


def _adjoint_errors(
    line: Line, solver: TimeSolver, exact: Exact, memory: Any, n_sweeps: int
) -> Float[Array, " iterates"]:
    """Errors of the gradient after 0, 1, ... adjoint sweeps. Collective."""
    comm = line.comm
    result, pull_back = linearise_block(solver.fine, line.params, exact.starts, line.owned)
    sources = SliceResult(jnp.zeros_like(result.saves), exact.sources)

    def look(seen, iterate: Coiterate, tally: Tally):
        del tally
        k, errors = seen
        whole = (
            sum_over_ranks(comm, iterate.params_bar),
            bcast_from(comm, iterate.initial_bar, 0),
        )
        error = [relative_error(*parts) for parts in zip(whole, exact.gradient, strict=True)]
        # A residual of zero ends the sweeps: the gradient stays as it is.
        later = jnp.arange(n_sweeps + 1) >= k
        return k + 1, jnp.where(later, jnp.max(jnp.stack(error)), errors)

    nothing = jnp.array(0), jnp.zeros(n_sweeps + 1, exact.ends.dtype)
    linear = Linear(exact.starts, memory, pull_back)
    found = solve_adjoint(line, solver, linear, sources, on_iterate=look, seen=nothing).seen
    assert isinstance(found, tuple)  # what `look` returns
    return found[1]


def judge_sweeps(
    case: SweepCase, costs: Sequence[Cost], sweeps: Sweeps, tol: float
) -> dict[str, Any]:
    """Errors, work and path of every iterate, and where the tolerance is met. Local.

    `costs` are those of the method and of its fallback.
    """
    cost, fallback = costs
    errors, tangents, damped, fell_back, gradient_errors, linearised = map(np.asarray, sweeps)
    n_slices, k = case.n_slices, np.arange(case.n_sweeps + 1)
    unsolved = (n_slices - k[:-1]) / n_slices
    walked = unsolved * np.where(fell_back, fallback.walked, cost.walked)
    spread = np.where(fell_back, fallback.walked, cost.spread)
    pushed = tangent_passes(tangents) * cost.tangent

    n_used = int(np.argmax(errors <= tol)) or case.n_sweeps

    def summed(first, per_sweep):
        return np.cumsum(np.append(first, per_sweep) + pushed)

    back = tangent_passes(linearised) * cost.tangent + cost.linearised + k + 1
    return {
        "forward": _reached(
            errors,
            summed(cost.first, unsolved + walked + spread),
            summed(n_slices * cost.first, 1 + n_slices * walked + spread),
            tol,
        ),
        "adjoint": _reached(
            gradient_errors,
            back + cost.first + k * cost.pulled,
            back + n_slices * (cost.first + k * cost.pulled),
            tol,
        ),
        "damped": int(damped[:n_used].sum()),
        "fallbacks": int(fell_back[:n_used].sum()),
    }


def _reached(errors: np.ndarray, work: np.ndarray, path: np.ndarray, tol: float) -> dict[str, Any]:
    """The curves, and sweeps, work and path at the first iterate within the tolerance."""
    below = np.flatnonzero(errors <= tol)
    at = int(below[0]) if below.size else None
    return {
        "errors": errors.tolist(),
        "work": work.tolist(),
        "path": path.tolist(),
        "sweeps": at,
        "work_to_tol": None if at is None else float(work[at]),
        "path_to_tol": None if at is None else float(path[at]),
    }


def format_sweeps(result: dict[str, Any]) -> str:
    """Two tables, forward and adjoint, and the cheapest method of each. Local."""
    lines = [
        f"{result['problem']}: {result['n_slices']} slices; a coarse slice costs "
        f"{result['coarse']:.3g} fine solves, a cheap one {result['cheap']:.3g}"
    ]
    for direction in ("forward", "adjoint"):
        lines.append(
            f"{direction:34} {'sweeps':>6} {'work':>7} {'path':>7} {'last error':>10}  "
            f"(to {result['tol']:g})"
        )
        for row in result["methods"]:
            done = row[direction]
            reached = ["-" if done[key] is None else f"{done[key]:.{digits}f}" for key, digits in
                       (("sweeps", 0), ("work_to_tol", 2), ("path_to_tol", 2))]  # fmt: skip
            rescues = format_rescues(row) if direction == "forward" else ""
            lines.append(
                f"  {row['method']:32} {reached[0]:>6} {reached[1]:>7} {reached[2]:>7} "
                f"{done['errors'][-1]:10.1e}  {rescues}"
            )
    return "\n".join([*lines, result["definition"], *_cheapest(result)])


def _cheapest(result: dict[str, Any]) -> list[str]:
    """One sentence for each direction."""
    tol, sentences = f"{result['tol']:g}", []
    for direction in ("forward", "adjoint"):
        solved = [row for row in result["methods"] if row[direction]["sweeps"] is not None]
        if not solved:
            sentences.append(f"No method reaches {tol}, {direction}.")
            continue
        work, path = (
            min(solved, key=lambda row, key=key: row[direction][key])
            for key in ("work_to_tol", "path_to_tol")
        )
        sentences.append(
            f"Least work to {tol}, {direction}: {work['method']} with "
            f"{work[direction]['work_to_tol']:.2f} fine-solve equivalents; shortest path: "
            f"{path['method']} with {path[direction]['path_to_tol']:.2f}."
        )
    return sentences
