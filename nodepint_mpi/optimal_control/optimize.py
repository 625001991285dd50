"""Optimizers of a control: SciPy's L-BFGS for small deterministic problems, and optax's.

Ranks must take the same steps to the last bit, or they wait for each other in different solves. So
L-BFGS runs on the first rank, which sends the others each point to evaluate; and the update of
optax is a compiled program of its own, in which no communicator takes part.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree
from mpi4py import MPI
from scipy.optimize import minimize

Evaluate = Callable[[PyTree], tuple[Array, PyTree]]
"""Value and gradient of a tree of arrays; collective, equal on all ranks."""
Report = Callable[[float, PyTree, Any, Any], bool]
"""Told after each iteration, on every rank, the value it found and what the next one begins with:
variables, and of optax the state and the carry. True, on all ranks alike, ends the iterations."""

STOPPED = "stopped as asked to"
"""The status of what a `Report` has ended."""

NOT_FINITE = "ended: cost or gradient were not finite"
NO_STEPS_LEFT = "not converged: the largest number of steps was taken"

_HISTORY = 20
_TOO_HIGH = 1e3


class Minimum(NamedTuple):
    """What an optimizer ends with: the best variables, the value after each iteration, and why.

    `slope` is the largest entry of the first gradient, which L-BFGS compares later ones with.
    """

    variables: PyTree
    values: list[float]
    status: str
    n_evaluations: int
    slope: float = math.nan


def minimize_lbfgs(
    evaluate: Evaluate,
    start: PyTree,
    *,
    steps: int,
    tol: float,
    comm: MPI.Intracomm,
    slope: float = math.nan,
    report: Report | None = None,
) -> Minimum:
    """L-BFGS with a line search, by SciPy, in double precision. Collective over `comm`.

    A point whose value is not finite counts as much too high, so the line search steps back.

    Args:
        evaluate: Value and gradient.
        start: Variables to start from; finite there.
        steps: The most iterations.
        tol: Done when the largest entry of the gradient is so small relative to the first one.
        comm: The ranks that evaluate together, outside of jitted code.
        slope: Largest entry of the first gradient of a minimization that goes on here, with a
            history of gradients that begins anew; NaN for one that begins.
        report: Called on every rank after each iteration.

    Reference:
        Liu, Nocedal (1989), Math. Program. 45, 503-528.
    """
    flat, unravel = ravel_pytree(start)
    asked = _Asked(evaluate, unravel, flat.dtype)
    first, gradient = asked(np.asarray(flat, np.float64))
    values = [first]
    if not math.isfinite(first) or not np.all(np.isfinite(gradient)):
        return Minimum(start, values, "the cost is not finite at the start", 1)
    if math.isnan(slope):
        slope = float(np.max(np.abs(gradient), initial=0.0))
    if slope == 0:
        return Minimum(start, values, "converged: the gradient is zero at the start", 1, slope)

    def tell(value: float, x: np.ndarray) -> bool:
        values.append(value)
        return report is not None and report(value, unravel(jnp.asarray(x, flat.dtype)), None, None)

    if comm.rank == 0:
        status = _lead(asked, np.asarray(flat, np.float64), tell, steps, tol * slope, comm)
    else:
        status = _follow(asked, tell, comm)
    best = unravel(jnp.asarray(asked.best_x, flat.dtype))
    return Minimum(best, values, status, asked.n, slope)


class _Asked:
    """Value and gradient at points of SciPy's, and the best of them."""

    def __init__(self, evaluate: Evaluate, unravel: Callable, dtype: Any):
        self.evaluate, self.unravel, self.dtype = evaluate, unravel, dtype
        self.n, self.best, self.best_x = 0, math.inf, None
        self.last = None

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = self.evaluate(self.unravel(jnp.asarray(x, self.dtype)))
        f, g = float(value), np.asarray(ravel_pytree(gradient)[0], np.float64)
        self.n += 1
        if math.isfinite(f) and np.all(np.isfinite(g)):
            if f < self.best or self.best_x is None:
                self.best, self.best_x = f, x.copy()
            self.last = g
        elif self.last is not None:
            # Uphill along the direction of the search, for the gradient there went downhill.
            return self.best + _TOO_HIGH * (1 + abs(self.best)), -self.last
        return f, g


def _lead(
    asked: _Asked,
    x: np.ndarray,
    tell: Callable[[float, np.ndarray], bool],
    steps: int,
    gtol: float,
    comm: MPI.Intracomm,
) -> str:
    """The first rank: run SciPy, and send each point before it is evaluated."""

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        jax.effects_barrier()
        comm.bcast(("evaluate", x))
        return asked(x)

    def callback(intermediate_result: Any) -> None:
        iterated = float(intermediate_result.fun), np.array(intermediate_result.x)
        comm.bcast(("iterated", iterated))
        if tell(*iterated):
            raise StopIteration  # SciPy then ends

    options = {
        "maxiter": steps, "maxfun": 20 * steps + 20, "maxcor": _HISTORY, "gtol": gtol,
        "ftol": 1e-15, "maxls": 40,
    }  # fmt: skip
    status = "not finished"
    try:
        found = minimize(fun, x, jac=True, method="L-BFGS-B", callback=callback, options=options)
        status = _words(found)
    finally:
        jax.effects_barrier()
        comm.bcast(("done", status))
    return status


def _follow(asked: _Asked, tell: Callable[[float, np.ndarray], bool], comm: MPI.Intracomm) -> str:
    """Another rank: evaluate what the first one sends."""
    while True:
        jax.effects_barrier()
        what, content = comm.bcast(None)
        if what == "done":
            return content
        if what == "iterated":
            tell(*content)  # if that is to end it, the first rank says so
        else:
            asked(content)


def _words(found: Any) -> str:
    message = str(found.message)
    if "CALLBACK" in message.upper() or "STOPITERATION" in message.upper():
        return STOPPED
    if found.status == 1:
        return NO_STEPS_LEFT
    if "PROJECTED GRADIENT" in message or "PGTOL" in message:
        return "converged: the gradient is small"
    if "REDUCTION" in message:
        return "converged: the cost no longer falls"
    return f"ended by the line search, which found no lower cost ({message.strip().lower()})"


def minimize_optax(
    evaluate: Callable[[PyTree, Any], tuple[Array, PyTree, Any]],
    start: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    carry: Any = None,
    state: Any = None,
    report: Report | None = None,
) -> tuple[Minimum, Any, Any]:
    """Take `steps` steps of an optax optimizer. Collective as `evaluate` is.

    Args:
        evaluate: `(variables, carry) -> (value, gradient, carry)`.
        start: Variables to start from.
        optimizer: Any that needs no more than gradient and parameters.
        steps: How many.
        carry: Handed from step to step.
        state: Of the optimizer, that of `optimizer.init` unless given.
        report: Called after each step, with variables, optimizer state and carry.

    Returns:
        The last variables, or those before the first step whose value or gradient was not finite;
        the optimizer's state; and the carry.
    """
    update = _compiled_update(optimizer)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(start) if state is None else state
    variables, values, status = start, [], f"{steps} steps taken"
    for step in range(steps):
        value, gradient, carry = evaluate(variables, carry)
        cost = float(value)
        finite = math.isfinite(cost) and bool(_all_finite(gradient))
        if not finite:
            status = f"{NOT_FINITE} in step {step + 1}"
            break
        values.append(cost)
        variables, state = update(gradient, state, variables)
        if report is not None and report(cost, variables, state, carry):
            status = STOPPED
            break
    return Minimum(variables, values, status, len(values)), state, carry


@functools.lru_cache(maxsize=16)  # learning and control in turns compile once
def _compiled_update(optimizer: optax.GradientTransformation) -> Callable:
    @eqx.filter_jit
    def update(gradient: PyTree, state: Any, variables: PyTree) -> tuple[PyTree, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by its integer count
            updates, state = optimizer.update(gradient, state, variables)
            return optax.apply_updates(variables, updates), state

    return update


@jax.jit
def _all_finite(tree: PyTree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
