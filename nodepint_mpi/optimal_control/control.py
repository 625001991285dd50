"""Optimal control, parallel in time: the library call `nodepint_mpi.control`."""

import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from nodepint_mpi.core.costs import Distance
from nodepint_mpi.core.partition import check_edges, check_layout
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.names import hint
from nodepint_mpi.optimal_control.by_paraopt import (
    check_paraopt,
    control_of,
    has_failed,
    steer_by_paraopt,
)
from nodepint_mpi.optimal_control.gradients import with_gradient
from nodepint_mpi.optimal_control.iterations import After, Iterations, Plan
from nodepint_mpi.optimal_control.paraopt_options import ParaOpt, ParaOptSolution
from nodepint_mpi.optimal_control.progress import Progress
from nodepint_mpi.optimal_control.steered import Steered, state_control_problem
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.method_options import check_comm, require_one_basis_rank
from nodepint_mpi.parallel.same_arguments import require_same_arguments
from nodepint_mpi.parallel.solution import Solution, Status

_log = logging.getLogger(__name__)
_OURS = {"args", "ts", "carry", "guess", "comm", "throw", "check_ranks", "n_batch_axes", "fine"}
_OPTIONS = {
    name
    for name, parameter in inspect.signature(solve).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _OURS
}


class Controlled(NamedTuple):
    """What `control` found; equal on all ranks.

    `control` is the optimized module and `model` the learned one, the `args` as they were without
    learning. `cost` is that of a converged solve, `gap` what the constraint leaves. `costs` has the
    cost of each iteration and `losses` those of learning. `states` are (edges, *samples, *state) at
    `edges`, `controls` (edges, *samples, n_controls), and `multipliers` the derivatives of the cost
    with respect to the states there, (edges, numbers), None for a batch or with noise.
    """

    control: Any
    model: PyTree
    cost: float
    gap: Float[Array, " constraints"]
    costs: list[float]
    losses: list[float]
    edges: np.ndarray
    states: PyTree
    controls: Array
    multipliers: Array | None
    status: str
    n_evaluations: int
    sweeps: list[int]


def control(
    field: Callable,
    u0: PyTree,
    edges: Any,
    *,
    control: Any,
    cost: Any,
    fine: Any,
    gradient: Any = "dp",
    optimizer: Any = "lbfgs",
    steps: Any = 200,
    tol: Any = 1e-7,
    constraint_tol: Any = 1e-6,
    tracking: bool = False,
    args: PyTree = None,
    learning: Any = None,
    comm: TimeComm | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Controlled:
    """Change a control so that a cost of the trajectory becomes small, parallel in time.

    Collective over `comm`; every rank must pass equal arguments, and gets the whole result.

    Minimizes J = terminal(u(T)) + integral of running(t, u, c) dt over the parameters of `control`,
    where du/dt = field(t, u, c, args), c = control(t, u). The state is solved, and the adjoint
    pulled back, by the sweeps of `solve`, slices dealt out to the ranks.

    Args:
        field: `field(t, u, c, args)`, of one sample, with the control's value `c`, (n_controls,).
        u0: Initial state, an array or a tree of arrays; a batch of them with `in_axes`.
        edges: Slice boundaries, (n_slices + 1,), strictly increasing.
        control: An Equinox module called as `control(t, u)`, such as `PiecewiseConstant`,
            `PiecewiseLinear` or `NetworkControl`, or within bounds, `Bounded`.
        cost: A `Cost`, for instance of `quadratic_cost`. A batch, or paths of noise, take its mean.
        fine: Steps of the fine propagator over one slice.
        gradient: "dp", differentiable programming: the derivative of the discrete solve; or "dal",
            direct adjoint looping: the adjoint equation, solved backward by the same steps. They
            differ by the discretization error.
        optimizer: "lbfgs", or an optimizer of optax.
        steps: The most iterations; with a constraint or learning in turns, of each round.
        tol: L-BFGS is done when the largest entry of the gradient is so small, relative to the
            first one.
        constraint_tol: Largest entry of `constraint(u(T))` at the end. The constraint enters as an
            augmented Lagrangian, whose multiplier is updated from round to round.
        tracking: One sweep each way per step from what the last step left, with optax.
        args: What else the field gets: constants, or a model.
        learning: How `args` are learned from data meanwhile, see `Learning`.
        comm: A line of ranks; the whole world unless given.
        report: Called on every rank after each iteration with a dictionary of what it found.
        **options: Of `solve`: `coarse`, `method`, `stopping`, `basis`, `diffusion`, `noise`,
            `in_axes` ((0 or None, axes of args)), and so on. `method` may also be "paraopt", or
            `ParaOpt` with options of its own: Newton's method on states and multipliers at the
            edges. It finds a control for each of its fine steps, whatever `control` is, and where
            it diverges the optimizer goes on from `control`.

    Returns:
        The control, what it costs, and the trajectory: see `Controlled`.

    Raises:
        ProblemError: on all ranks, if the arguments do not fit together.
        AgreementError: on all ranks, if they do not pass equal arguments.
        NonFiniteError: on all ranks, if the trajectory of the first control is not finite.

    Reference:
        Hinze, Pinnau, Ulbrich, Ulbrich (2009), Optimization with PDE Constraints, section 1.6; the
        augmented Lagrangian: Nocedal, Wright (2006), Numerical Optimization, section 17.3.
    """
    task = prepare(
        field, u0, edges, control=control, cost=cost, fine=fine, gradient=gradient,
        plan=Plan(optimizer, steps, tol, constraint_tol, tracking, learning), args=args, comm=comm,
        options=options,
    )  # fmt: skip

    def after(told: dict[str, Any], progress: Callable[[], Progress]) -> bool:
        del progress
        if report is not None:
            report(told)
        return False

    return task.take(after)


class Task(NamedTuple):
    """A control problem, checked, with what it starts from and how it is solved."""

    problem: Steered
    plan: Plan
    paraopt: ParaOpt | None
    control: Any
    args: PyTree

    def start(self) -> Progress:
        """What the first iteration begins with. Local."""
        return Iterations(self.problem, self.plan, None).start(self.control, self.args)

    def blank(self) -> Progress:
        """Shapes of what a checkpoint holds. Local."""
        return Iterations(self.problem, self.plan, None).blank(self.control, self.args)

    def take(self, after: After | None, progress: Progress | None = None) -> Controlled:
        """All iterations, or those that are left. Collective over the problem's line.

        Args:
            after: Called after each iteration.
            progress: Where to go on; from the start unless given.
        """
        problem, plan, before = self.problem, self.plan, ""
        if self.paraopt is not None and progress is None:

            def swept(told: dict[str, Any]) -> None:
                if after is not None:
                    after(told, self.start)  # a sweep is not interrupted

            found = steer_by_paraopt(
                problem, self.paraopt, self.control, self.args, self._target(), swept
            )
            if not has_failed(found):
                return _by_paraopt(problem, found, self.args)
            name = "lbfgs" if plan.is_lbfgs else "optax"
            before = f"ParaOpt {found.reason} Instead, by {name}: "
            if problem.comm.rank == 0:
                _log.warning("%s", before.removesuffix(": ") + ".")
        if progress is None:
            # This says what else does not fit, and whether the start is finite.
            problem.solve(self.control, self.args)
            progress = self.start()
        run = Iterations(problem, plan, after)
        control, model, status = run.take(progress)
        solution = problem.solve(control, model, throw=False, check_ranks=False)
        return _controlled(problem, run, control, model, before + status, solution)

    def _target(self) -> Any:
        """The state that a quadratic terminal cost asks for, if it does of all states."""
        terminal = self.problem.cost.terminal
        whole = isinstance(terminal, Distance) and terminal.of is None and len(terminal.target) > 1
        return terminal.target if isinstance(terminal, Distance) and whole else None


def prepare(
    field: Callable,
    u0: PyTree,
    edges: Any,
    *,
    control: Any,
    cost: Any,
    fine: Any,
    gradient: Any,
    plan: Plan,
    args: PyTree,
    comm: TimeComm | None,
    options: dict[str, Any],
) -> Task:
    """Check that arguments fit together and are equal on all ranks. Collective over `comm`.

    Takes those of `control`, with its optimizer and what belongs to it as a `plan`.

    Raises:
        ProblemError, AgreementError: on all ranks, as `control` does.
    """
    comm = check_comm(comm)
    require_one_basis_rank(comm, "control")
    _check_options(options)
    plan.check(options)
    edges = check_edges(edges)
    check_layout(len(edges) - 1, comm.size)
    given = {"field": field, "u0": u0, "edges": edges, "control": control, "cost": cost}
    given |= {"args": args, "steps": plan.steps, "tol": plan.tol, "tracking": plan.tracking}
    given |= {"gradient": gradient, "fine": fine, "method": options.get("method")}
    given["constraint_tol"] = plan.constraint_tol
    given["optimizer"] = "lbfgs" if plan.is_lbfgs else "optax"  # else ranks would wait for ever
    given["learning"] = None if plan.learning is None else plan.learning.stated
    require_same_arguments(comm.control, given)
    options = options | {"fine": with_gradient(fine, gradient)}
    paraopt = _paraopt_of(options)
    problem = state_control_problem(field, u0, edges, cost, control, args, options, comm)
    if paraopt is not None:
        check_paraopt(problem, plan, control)
    return Task(problem, plan, paraopt, control, args)


def _paraopt_of(options: dict[str, Any]) -> ParaOpt | None:
    """The options of ParaOpt if that is the method; `options` then get that of the fallback."""
    method = options.get("method")
    if not isinstance(method, ParaOpt) and method != "paraopt":
        return None
    options["method"] = "serial" if options.get("coarse") is None else "parareal"
    if isinstance(method, ParaOpt):
        return method
    n_steps = getattr(options["fine"], "n_steps", None)
    if n_steps is None:
        raise ProblemError("ParaOpt needs `fine` with a fixed number of steps, `FixedSteps`.")
    return ParaOpt(n_steps)


def _by_paraopt(problem: Steered, found: ParaOptSolution, args: PyTree) -> Controlled:
    control, none = control_of(found), jnp.zeros((0,))
    states = jax.vmap(problem.field.unravel)(jnp.asarray(found.states))
    return Controlled(
        control, args, float(found.cost), none, found.costs.tolist(), [], problem.edges, states,
        _controls(problem, control, states), jnp.asarray(found.multipliers), found.reason,
        found.sweeps + 1, [found.sweeps],
    )  # fmt: skip


def _controlled(
    problem: Steered, run: Iterations, control: Any, model: PyTree, status: str, solution: Solution
) -> Controlled:
    interface = solution.interface
    assert isinstance(interface, jax.Array)  # states are rows of numbers here
    cost, gap = problem.value(interface[-1])
    if solution.status is Status.NON_FINITE:
        status = f"{status}; the trajectory of this control is not finite"
    elif solution.status is not Status.CONVERGED:
        status = f"{status}; its trajectory: {solution.status.value}"
    states = problem.states(interface)
    multipliers = None
    if not problem.is_batch and problem.options.get("noise") is None:
        multipliers = eqx.filter_jit(problem.multipliers)(control, model, interface)
    return Controlled(
        control, model, float(cost), gap, run.costs, run.losses, problem.edges, states,
        _controls(problem, control, states), multipliers, status, run.n_evaluations, run.sweeps,
    )  # fmt: skip


def _controls(problem: Steered, control: Any, states: PyTree) -> Array:
    """The control at all edges, at the last one what comes before it."""
    over = jax.vmap(control)
    if problem.is_batch:
        over = jax.vmap(jax.vmap(control, in_axes=(None, 0)))
    # A control that jumps at the end of the horizon is not felt there.
    times = problem.edges.copy()
    times[-1] = np.nextafter(times[-1], times[0])
    return over(jnp.asarray(times), states)


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise ProblemError(
                f"`control` takes no option `{name}`{hint(name, [*_OPTIONS, 'fine', 'args'])}"
            )
