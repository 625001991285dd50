"""`nodepint_mpi.control` by ParaOpt: the problem as one of states and multipliers."""

import logging
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from nodepint_mpi.core.controls import PiecewiseConstant
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.optimal_control.paraopt import solve_paraopt
from nodepint_mpi.optimal_control.paraopt_options import ParaOpt, ParaOptSolution, ParaOptStatus
from nodepint_mpi.optimal_control.steered import Steered

_log = logging.getLogger(__name__)


def check_paraopt(problem: Steered, plan: Any, control: Any) -> None:
    """Refuse what ParaOpt cannot do. Local.

    Raises:
        ProblemError: with what it is and what to do instead.
    """
    unfit = {
        "several samples (`in_axes`)": problem.is_batch,
        "noise": problem.options.get("noise") is not None,
        "a constraint at the end: give the target a `terminal` weight": (
            problem.cost.constraint is not None
        ),
        "a `running` cost that is missing: the control needs a weight": problem.cost.running
        is None,
        "`learning`: learn first, or leave `method` to the adjoint": plan.learning is not None,
        "`tracking`": plan.tracking,
    }
    for what, is_so in unfit.items():
        if is_so:
            raise ProblemError(f"ParaOpt does not take {what}.")
    if not isinstance(control, PiecewiseConstant):
        raise ProblemError(
            f"ParaOpt finds a control of its own for each fine step, and falls back to `control`: "
            f"pass a `PiecewiseConstant`, not a {type(control).__name__}."
        )


def steer_by_paraopt(
    problem: Steered,
    options: ParaOpt,
    control: PiecewiseConstant,
    args: PyTree,
    target: Any,
    report: Callable[[dict[str, Any]], None] | None,
) -> ParaOptSolution:
    """Solve the optimality system. Collective over the problem's line.

    The estimated contraction is logged, and reported, before the first sweep.
    """
    running, terminal, field = problem.cost.running, problem.cost.terminal, problem.field
    assert running is not None  # checked
    unravel = field.unravel

    def rate(t: Array, u: Array, c: Array, args: PyTree) -> Array:
        return ravel_pytree(field.field(t, unravel(u), c, args))[0]

    def at_end(u: Array) -> Array:
        return jnp.zeros((), u.dtype) if terminal is None else jnp.reshape(terminal(unravel(u)), ())

    def estimated(contraction: float) -> None:
        if problem.comm.rank == 0:
            _log.info("ParaOpt: a sweep is expected to reduce errors to %.2g of them", contraction)
        if report is not None:
            report({"stage": "paraopt", "iteration": 0, "contraction": contraction})

    def swept(sweep: int, update: float, cost: float) -> None:
        if report is not None:
            told = {"stage": "paraopt", "iteration": sweep, "cost": cost, "update": update}
            report(told)

    u0 = problem.initial[:-1]
    return solve_paraopt(
        rate, u0, problem.edges, n_controls=control.values.shape[1], options=options, args=args,
        running=lambda t, u, c: jnp.reshape(running(t, unravel(u), c), ()), terminal=at_end,
        target=None if target is None else jnp.asarray(target, u0.dtype), comm=problem.comm,
        on_estimate=estimated, on_sweep=swept,
    )  # fmt: skip


def control_of(solution: ParaOptSolution) -> PiecewiseConstant:
    """The control of every fine step as a module. Local."""
    return PiecewiseConstant(np.asarray(solution.times)[:-1], jnp.asarray(solution.controls))


def has_failed(solution: ParaOptSolution) -> bool:
    """Whether to fall back. Local; equal on all ranks."""
    return solution.status is ParaOptStatus.DIVERGED or not np.isfinite(solution.cost)
