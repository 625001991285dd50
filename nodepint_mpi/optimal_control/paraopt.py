"""ParaOpt: optimal control parallel in time, by Newton's method at the slice edges.

Unknown are the states Y and the multipliers Lambda at the slice edges. Every slice solves its own
two-point problem from Y_n at its left end and Lambda_{n+1} at its right, all of them at once; with
the state P_n found at the right end and the multiplier Q_n at the left one, the conditions are

    Y_{n+1} = P_n(Y_n, Lambda_{n+1}),   Lambda_n = Q_n(Y_n, Lambda_{n+1}),   Y_0 = u0,
    Lambda_N = terminal'(Y_N).

A sweep is a step of Newton's method with the derivatives of slices of fewer steps.

Reference:
    Gander, Kwok, Salomon (2020), SIAM J. Sci. Comput. 42, A2773-A2802.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.core.partition import check_edges, own_slices
from nodepint_mpi.optimal_control.correction import Edges
from nodepint_mpi.optimal_control.hamiltonian import Hamiltonian
from nodepint_mpi.optimal_control.paraopt_options import ParaOpt, ParaOptSolution, ParaOptStatus
from nodepint_mpi.optimal_control.paraopt_problem import (
    make_problem,
    make_start,
    pod,
    straight,
    straight_line,
)
from nodepint_mpi.optimal_control.paraopt_programs import (
    N_POWERS,
    Layout,
    Problem,
    Propagated,
    SlicePrograms,
    nodes_of,
    resample,
)
from nodepint_mpi.optimal_control.schemes import make_scheme
from nodepint_mpi.optimal_control.two_point import Trajectory
from nodepint_mpi.parallel.comms import TimeComm, world_time_comm
from nodepint_mpi.parallel.method_options import require_one_basis_rank
from nodepint_mpi.parallel.programs import static_key
from nodepint_mpi.parallel.same_arguments import require_same_arguments

N_GROWING = 6
"""Sweeps in a row, each with a larger update than the last, after which the iteration diverges."""

LARGEST_GROWTH = 1e6
"""An update larger than the first one by this factor ends the iteration at once."""

ADVICE = (
    "Take more coarse steps (a `ratio` nearer to 1), more slices, or a start nearer to the "
    "solution (`guess`, or `start='coarse'`)."
)


def solve_paraopt(
    field: Callable[..., Any],
    u0: Any,
    edges: Any,
    *,
    running: Callable[..., Any],
    terminal: Callable[..., Any],
    n_controls: int,
    options: ParaOpt,
    args: PyTree = None,
    target: Any = None,
    guess: tuple[Any, Any] | None = None,
    comm: TimeComm | None = None,
    on_estimate: Callable[[float], None] | None = None,
    on_sweep: Callable[[int, float, float], None] | None = None,
) -> ParaOptSolution:
    """Minimize terminal(u(T)) + int running(t, u, c) dt where du/dt = field(t, u, c, args).

    Collective over `comm`, outside of jit; every rank must pass equal arguments, and gets the whole
    solution. States, multipliers and controls are those of the fine steps, to `tol`, and the same
    on any number of ranks, to round-off. That a stationary point is a minimum is not checked.

    The control is eliminated: it is where  multiplier . field + running  is smallest, found by
    Newton's method from zero, which is exact where that is quadratic in the control.

    Failing to reach the tolerance is not an error: see `status` and `reason` of what is returned.

    Args:
        field: Vector field of a state (state,) and a control (controls,).
        u0: Initial state, (state,).
        edges: Slice boundaries, (n_slices + 1,), strictly increasing, in the unit of time.
        running: Running cost of time, state and control, with a positive second derivative by the
            control.
        terminal: Cost of the last state.
        n_controls: Numbers in a control.
        options: Steps, scheme, Newton's matrix, tolerance.
        args: Anything the field needs. Arrays are traced; other values make programs of their own.
        target: State (state,) to which the line of the first states leads; they are all `u0`
            unless given.
        guess: States and multipliers at the edges to start from, (n_slices + 1, state) each.
        comm: A line of ranks; the whole world unless given.
        on_estimate: Called, on all ranks, with the estimated contraction before the first sweep.
        on_sweep: Called, on all ranks, after each sweep, with its number, the norm of its changes,
            and the cost of the states before it.

    Raises:
        AgreementError: on all ranks, if they do not pass equal arguments.
        ProblemError: on all ranks, if shapes, options and costs do not fit together.
        LayoutError: on all ranks, if there are more ranks than slices.
        NonFiniteError: on all ranks, if `u0`, `target` or `guess` holds NaN or infinity.
    """
    comm = world_time_comm() if comm is None else comm
    require_one_basis_rank(comm, "solve_paraopt")
    given = {"field": field, "u0": u0, "edges": edges, "running": running, "terminal": terminal}
    given |= {"n_controls": n_controls, "options": vars(options), "args": args, "target": target}
    require_same_arguments(comm.control, given | {"guess": guess})
    edges = check_edges(edges)
    own = own_slices(edges, comm.size, comm.rank)
    hamiltonian = Hamiltonian(field, running, args, n_controls)
    problem = make_problem(hamiltonian, terminal, u0, edges, options)
    every = make_start(problem.initial, target, guess, len(edges))
    own_edges = slice(own.first, own.first + own.n_owned + 1)
    layout = Layout(
        tuple(edges.tolist()), options.scheme, options.n_steps, options.n_coarse,
        options.linearize == "coarse" and options.n_coarse < options.n_steps,
    )  # fmt: skip
    if options.start == "coarse" or isinstance(options.basis, int):
        parts = _Parts(comm, layout, problem)
        found = parts("solve_coarse", straight_line(every, options.n_coarse))
        if not found.is_solved:
            record = _Record(edges, options)
            record.fail("Newton's method found no solution of the whole problem by coarse steps")
            at_edges = Edges(*(part[own_edges] for part in every))
            return _solution(parts, at_edges, straight(at_edges, options.n_steps), record)
        if isinstance(options.basis, int):
            directions = pod(found.trajectory, options.basis)
            problem = problem.along(directions)
        if guess is None:
            every = Edges(*(part[:: options.n_coarse] for part in found.trajectory))
    at_edges = Edges(*(part[own_edges] for part in every))
    return _iterate(_Parts(comm, layout, problem), at_edges, options, on_estimate, on_sweep)


class _Parts:
    """The compiled parts of a solve, kept by the line of ranks while they are in use."""

    def __init__(self, comm: TimeComm, layout: Layout, problem: Problem) -> None:
        self.comm, self.layout = comm, layout
        self.owned = own_slices(np.asarray(layout.edges), comm.size, comm.rank)
        self.arrays, self._static = eqx.partition(problem, eqx.is_array)
        leaves, structure = jax.tree.flatten(self._static)
        shapes = [(part.shape, part.dtype.name) for part in jax.tree.leaves(self.arrays)]
        self._key = layout, structure, tuple(map(static_key, leaves)), tuple(shapes)

    def __call__(self, name: str, *arguments: Any) -> Any:
        """The part of a name, called. Collective over the line."""

        def make():
            programs = SlicePrograms(self.comm, self.layout, self._static)
            return jax.jit(getattr(programs, name))

        part = self.comm.programs.get(("paraopt", name, *self._key), make)
        return part(self.arrays, *arguments)


def _iterate(
    parts: _Parts,
    edges: Edges,
    options: ParaOpt,
    on_estimate: Callable[[float], None] | None,
    on_sweep: Callable[[int, float, float], None] | None,
) -> ParaOptSolution:
    """The algorithm: solve all slices, correct the edges, until the changes are small."""
    record = _Record(np.asarray(parts.layout.edges), options)
    fine = straight(edges, options.n_steps)
    coarse = resample(fine, options.n_coarse)
    solved: tuple[Edges, Trajectory] = edges, fine
    while True:
        is_first = not record.costs
        now = parts("propagate", edges, fine, coarse, jnp.asarray(is_first))
        if not record.note_slices(now):
            break
        fine, coarse, solved = now.fine, now.coarse, (edges, now.fine)
        if record.is_done():
            break
        if is_first:
            record.contraction = 0.0 if options.is_exact else _contraction(parts, edges, now)
            if on_estimate is not None:
                on_estimate(record.contraction)
        edges, squares = parts("correct", edges, now)
        if not record.note_update(squares):
            break
        if on_sweep is not None:
            on_sweep(len(record.updates), record.updates[-1], record.costs[-1])
    return _solution(parts, *solved, record)


def _contraction(parts: _Parts, edges: Edges, now: Propagated) -> float:
    """The geometric mean of the last factors of the power iteration. Collective."""
    factors = np.asarray(parts("estimate", edges, now))[-N_POWERS // 3 :]
    return float(np.exp(np.mean(np.log(np.maximum(factors, np.finfo(factors.dtype).tiny)))))


def _solution(parts: _Parts, edges: Edges, fine: Trajectory, record: "_Record") -> ParaOptSolution:
    """What is gathered, as NumPy arrays. Collective."""
    gathered = parts("gather", edges, fine)
    nodes = nodes_of(record.edges, parts.layout.n_steps)
    times = jnp.asarray(np.append(nodes[:, :-1], record.edges[-1]))
    column = times[:, None]
    control_times, _, _ = make_scheme(parts.layout.scheme).control_points(times, column, column)
    return ParaOptSolution(
        **{name: np.asarray(part) for name, part in gathered._asdict().items()},
        times=np.asarray(times),
        control_times=np.asarray(control_times),
        cost=record.costs[-1] if record.costs else math.nan,
        costs=np.asarray(record.costs),
        updates=np.asarray(record.updates),
        jump=record.jump,
        contraction=record.contraction,
        status=record.status,
        reason=record.reason,
    )


@dataclass
class _Record:
    """What is known of the iteration, from values that are equal on all ranks. Local."""

    edges: np.ndarray
    options: ParaOpt
    costs: list[float] = dataclass_field(default_factory=list)
    updates: list[float] = dataclass_field(default_factory=list)
    jump: float = math.nan
    contraction: float = math.nan
    status: ParaOptStatus = ParaOptStatus.MAX_SWEEPS
    reason: str = ""

    def note_slices(self, now: Propagated) -> bool:
        """Whether all slices were solved."""
        report = jax.tree.map(np.asarray, now.report)
        for is_solved, steps in ((report.is_solved, "fine"), (report.is_coarse_solved, "coarse")):
            failed = np.flatnonzero(is_solved < 1)
            if len(failed):
                n = int(failed[0])
                which = f"slice {n} (t from {self.edges[n]:g} to {self.edges[n + 1]:g})"
                if len(failed) > 1:
                    which += f" and {len(failed) - 1} more"
                advice = ADVICE
                if steps == "coarse":
                    advice += " `linearize='fine'` needs no coarse solution."
                self._diverge(
                    f"Newton's method found no solution of the {steps} two-point problem of "
                    f"{which} from the edges after {len(self.updates)} sweeps",
                    advice,
                )
                return False
        cost = float(np.sum(report.cost))
        if not np.isfinite(cost):
            self._diverge(f"the cost is {cost} after {len(self.updates)} sweeps", ADVICE)
            return False
        self.costs.append(cost)
        self.jump = float(np.max(report.jump))
        return True

    def note_update(self, squares: Array) -> bool:
        """Whether the changes at the edges can be used."""
        update = float(np.sqrt(np.sum(np.asarray(squares))))
        sweep = len(self.updates) + 1
        if not np.isfinite(update):
            worst = int(np.argmin(np.isfinite(np.asarray(squares))))
            self._diverge(
                f"sweep {sweep} gave changes that are not finite, first at t = "
                f"{self.edges[worst + 1]:g}",
                ADVICE,
            )
            return False
        self.updates.append(update)
        recent = self.updates[-N_GROWING - 1 :]
        grows = len(recent) > N_GROWING and bool(np.all(np.diff(recent) > 0))
        if grows or update > LARGEST_GROWTH * max(self.updates[0], self.options.tol):
            self._diverge(
                f"the changes grow, from {recent[0]:.1e} to {update:.1e} in sweep {sweep}", ADVICE
            )
            return False
        return True

    def is_done(self) -> bool:
        """Whether to stop here, where all slices are solved."""
        n_sweeps, tol = len(self.updates), self.options.tol
        if n_sweeps and self.updates[-1] < tol:
            self.status = ParaOptStatus.CONVERGED
            self.reason = f"converged: sweep {n_sweeps} changed the edges by less than {tol:.1e}"
            return True
        if n_sweeps < self.options.max_sweeps:
            return False
        self.reason = (
            f"not converged: the last of {n_sweeps} sweeps changed the edges by "
            f"{self.updates[-1]:.1e}, more than {tol:.1e}. Allow more sweeps (`max_sweeps`), or "
            f"make each better. {ADVICE}"
        )
        return True

    def fail(self, what: str) -> None:
        """End before the first sweep."""
        self._diverge(what, ADVICE)

    def _diverge(self, what: str, advice: str) -> None:
        self.status, self.reason = ParaOptStatus.DIVERGED, f"diverged: {what}. {advice}"
