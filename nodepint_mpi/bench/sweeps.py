"""`nodepint bench sweeps`: error against sweeps and work, method by method, forward and adjoint."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from nodepint_mpi.bench.cases import SWEEP_CASES, SweepCase, make_methods
from nodepint_mpi.bench.costs import (
    DEFINITION,
    Cost,
    fine_equivalents,
    method_cost,
)
from nodepint_mpi.build.model import unknown_name
from nodepint_mpi.core.partition import OwnedSlices, own_slices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.sensitivity import tangent_passes
from nodepint_mpi.core.sweeps import propagate_unsolved, slice_distance
from nodepint_mpi.core.transposed import linearise_block
from nodepint_mpi.core.types import Block, Params, State
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.adjoint import linearise_serially, pull_back_serially
from nodepint_mpi.parallel.comms import Comms, TimeComm
from nodepint_mpi.parallel.counters import cond, counting
from nodepint_mpi.parallel.exchange import bcast_from, max_over_ranks, sum_over_ranks
from nodepint_mpi.parallel.methods import AbstractSweeps, Line
from nodepint_mpi.parallel.pace import best_iterate, first_pace, judge_pace
from nodepint_mpi.parallel.shared_basis import count_in_use
from nodepint_mpi.parallel.tangent import Tangent


class Exact(NamedTuple):
    """The serial solution on the owned slices, the loss read there, and its whole gradient."""

    starts: Block
    ends: Block
    sources: Block
    gradient: tuple[Params, State]


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
    if name not in SWEEP_CASES:
        raise ConfigError(unknown_name("nodepint bench sweeps", name, SWEEP_CASES))
    case = SWEEP_CASES[name]
    every = make_methods(case)
    for label in methods:
        if label not in every:
            raise ConfigError(unknown_name("--method", label, every))
    edges = np.linspace(*case.problem.span, case.n_slices + 1)
    owned = own_slices(edges, comms.time.size, comms.time.rank)
    numbers = jax.tree.map(jnp.asarray, (case.problem.args, case.problem.initial))
    exact = jax.jit(lambda *numbers: solve_exactly(comms.time, case, owned, *numbers))(*numbers)
    steps = (case.fine, case.coarse, case.cheap)
    weights = comms.control.bcast([fine_equivalents(case, some) for some in steps])
    weigh = dict(zip(steps, weights, strict=True))
    rows = []
    for label in methods or every:
        method = every[label]
        sweep = jax.jit(
            lambda *numbers, method=method: sweep_method(
                comms.time, case, method, owned, *numbers, tol=tol
            )
        )
        result = sweep(*numbers, exact)
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


def solve_exactly(
    comm: TimeComm, case: SweepCase, owned: OwnedSlices, params: Params, initial: State
) -> Exact:
    """The serial solution and the gradient of half its mean square. Collective, inside jit."""
    line = linearise_serially(
        comm, Propagator(case.problem.field, case.fine), params, initial, owned
    )
    ends = line.states.ends
    sources = ends / (owned.n_slices * initial.size)
    gradient = pull_back_serially(comm, line, SliceResult(line.result.saves, sources))
    whole = sum_over_ranks(comm, gradient.params), bcast_from(comm, gradient.initial, 0)
    return Exact(line.states.starts, ends, sources, whole)


def sweep_method(
    comm: TimeComm,
    case: SweepCase,
    method: AbstractSweeps,
    owned: OwnedSlices,
    params: Params,
    initial: State,
    exact: Exact,
    *,
    tol: float,
) -> Sweeps:
    """Forward sweeps, then adjoint ones at the serial solution. Collective, inside jit.

    The sweeps of `parallel.solve` and `parallel.adjoint`, but for stopping: every iterate is
    wanted. The adjoint gets what the method had learned when its error fell to `tol`.
    """
    line = Line(comm, owned, params)
    fine, fallback = Propagator(case.problem.field, case.fine), method.fallback()
    largest = max_over_ranks(comm, jnp.max(jnp.abs(exact.ends)))

    def distance(ends):
        return max_over_ranks(comm, jnp.max(slice_distance(ends, exact.ends))) / largest

    def sweep(carry, k):
        states, memory, pace = carry
        fine_ends = propagate_unsolved(fine, params, states, k, owned)
        jump = max_over_ranks(comm, jnp.max(slice_distance(fine_ends, states.ends)))
        pace, taken_over = judge_pace(pace, jump, states.ends, fine_ends)
        falls_back = pace.falls_back & (fallback is not None)

        def correct():
            return method.correct(line, initial, states, fine_ends, k, memory, pace.slow)

        def fall_back():
            assert fallback is not None  # taken only if there is one
            best = best_iterate(pace, states.ends, fine_ends, k, owned)
            now = states.ends, fine_ends
            ends, fines = (jnp.where(taken_over, *pair) for pair in zip(best, now, strict=True))
            guess = fallback.start(line, initial, ends, None)
            done = fallback.correct(line, initial, guess.states, fines, k, guess.memory)
            return done._replace(memory=memory)

        with counting() as ledger:
            done = correct() if fallback is None else cond(falls_back, fall_back, correct)
        damped = max_over_ranks(comm, done.counts.damped)
        tangents = jnp.asarray(ledger.tally.tangents // owned.n_owned)
        row = (distance(done.states.ends), tangents, damped, falls_back, done.memory)
        return (done.states, done.memory, pace), row

    with counting() as ledger:
        begun = method.start(line, initial, None, None)
    pace = first_pace(begun.states.ends, has_fallback=fallback is not None)
    first = (begun.states, begun.memory, pace)
    rows = jax.lax.scan(sweep, first, jnp.arange(case.n_sweeps))[1]
    errors, tangents, damped, fell_back, memories = rows
    learned = jnp.where(jnp.any(errors <= tol), jnp.argmax(errors <= tol), case.n_sweeps - 1)
    memory = jax.tree.map(lambda values: values[learned], memories)
    return Sweeps(
        jnp.append(distance(begun.states.ends), errors),
        jnp.append(jnp.asarray(ledger.tally.tangents // owned.n_owned), tangents),
        damped,
        fell_back,
        _adjoint_errors(line, case, method, exact, memory),
        _count_linearised(method, memory),
    )


def _count_linearised(method: AbstractSweeps, memory: Any) -> Int[Array, ""]:
    """Directions pushed for the adjoint: none where the forward sweeps kept their tangents."""
    anew = isinstance(method, Tangent) and not method.recycle
    return count_in_use(memory.basis) if anew else jnp.array(0)


def _adjoint_errors(
    line: Line, case: SweepCase, method: AbstractSweeps, exact: Exact, memory: Any
) -> Float[Array, " iterates"]:
    """Errors of the gradient after 0, 1, ... adjoint sweeps. Collective."""
    comm = line.comm
    fine = Propagator(case.problem.field, case.fine)
    result, pull_back = linearise_block(fine, line.params, exact.starts, line.owned)
    sources = SliceResult(jnp.zeros_like(result.saves), exact.sources)
    linear = method.linearise(line, exact.starts, memory)

    def sweep(cotangents, _):
        bars, outs = pull_back(sources._replace(end=sources.end + cotangents.rights))
        gradient = sum_over_ranks(comm, bars), bcast_from(comm, outs[0], 0)
        errors = [relative_error(*parts) for parts in zip(gradient, exact.gradient, strict=True)]
        corrected = method.correct_cotangents(line, linear, exact.starts, outs, cotangents)
        return corrected, jnp.max(jnp.stack(errors))

    first = method.first_cotangents(line, linear, exact.starts, sources)
    return jax.lax.scan(sweep, first, None, length=case.n_sweeps + 1)[1]


def relative_error(ours: Any, wanted: Any) -> Float[Array, ""]:
    """Distance of two trees relative to the second. Local."""
    ours, wanted = ravel_pytree(ours)[0], ravel_pytree(wanted)[0]
    return jnp.linalg.norm(ours - wanted) / jnp.linalg.norm(wanted)


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
            notes = [f"{row[key]} {key}" for key in ("damped", "fallbacks") if row[key]]
            lines.append(
                f"  {row['method']:32} {reached[0]:>6} {reached[1]:>7} {reached[2]:>7} "
                f"{done['errors'][-1]:10.1e}  {', '.join(notes) if direction == 'forward' else ''}"
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
