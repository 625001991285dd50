"""A controlled equation as one of states alone: the control among the arguments, the running cost
as one more component of the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from nodepint_mpi.core.costs import Cost
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.problem import floats_as_arrays
from nodepint_mpi.parallel.solution import Solution


class SteeredField(NamedTuple):
    """`field(t, u, c, args)` as a field of states, one row of numbers, given (control, args).

    With a `running` cost its integral is the last number of the state.
    """

    field: Callable
    running: Callable | None
    unravel: Callable

    def __call__(self, t: Array, state: Array, given: Any) -> Array:
        control, args = given
        u = self.unravel(state if self.running is None else state[:-1])
        c = control(t, u)
        change, _ = ravel_pytree(self.field(t, u, c, args))
        change = change.astype(state.dtype)
        if self.running is None:
            return change
        rate = jnp.asarray(self.running(t, u, c), state.dtype)
        return jnp.concatenate([change, rate.reshape(1)])


class SteeredDiffusion(NamedTuple):
    """`diffusion(t, u, args)` as one of these states; the cost has no noise of its own."""

    diffusion: Callable
    with_cost: bool
    unravel: Callable
    is_matrix: bool

    def __call__(self, t: Array, state: Array, given: Any) -> Array:
        u = self.unravel(state[:-1] if self.with_cost else state)
        found = self.diffusion(t, u, given[1])
        if self.is_matrix:
            found = jnp.asarray(found, state.dtype)
            return jnp.pad(found, ((0, 1), (0, 0))) if self.with_cost else found
        found = ravel_pytree(found)[0].astype(state.dtype)
        return jnp.pad(found, (0, 1)) if self.with_cost else found


class Steered(NamedTuple):
    """A control problem, checked: what is solved, what is minimized, and how.

    `initial` is (*samples, numbers), and `options` are those of `solve`.
    """

    field: SteeredField
    cost: Cost
    initial: Array
    edges: np.ndarray
    options: dict[str, Any]
    comm: TimeComm

    @property
    def is_batch(self) -> bool:
        """Whether there are several samples or paths. Local."""
        return self.options.get("in_axes") is not None or _n_paths(self.options) is not None

    def solve(self, control: Any, args: Any, **others: Any) -> Solution:
        """The trajectory under a control. Collective over `comm`."""
        return solve(
            self.field, self.initial, self.edges, args=(control, args), comm=self.comm,
            **self.options | others,
        )  # fmt: skip

    def value(self, end: Array) -> tuple[Array, Array]:
        """The cost of states at the end, and what the constraint leaves, means over samples. Local.

        Args:
            end: (*samples, numbers).
        """

        def of_one(end: Array) -> tuple[Array, Array]:
            running = self.field.running
            u = self.field.unravel(end if running is None else end[:-1])
            total = jnp.zeros((), end.dtype) if running is None else end[-1]
            if self.cost.terminal is not None:
                total = total + jnp.asarray(self.cost.terminal(u), end.dtype).reshape(())
            gap = jnp.zeros((0,), end.dtype)
            if self.cost.constraint is not None:
                gap = jnp.ravel(jnp.asarray(self.cost.constraint(u), end.dtype))
            return total, gap

        if not self.is_batch:
            return of_one(end)
        costs, gaps = jax.vmap(of_one)(end)
        return jnp.mean(costs), jnp.mean(gaps, axis=0)

    def states(self, interface: Array) -> PyTree:
        """The user's states, (edges, *samples, *state), without the cost. Local."""
        split = self.field.unravel
        rows = interface if self.field.running is None else interface[..., :-1]
        for _ in range(interface.ndim - 1):
            split = jax.vmap(split)
        return split(rows)

    def multipliers(self, control: Any, args: Any, interface: Array) -> Float[Array, "edges state"]:
        """Derivatives of the cost with respect to the states at the edges, (edges, numbers).

        Local: from right to left, slice by slice, on every rank alike. For one sample without
        noise. The number of the running cost is left out; constraints are not counted.
        """
        fine = Propagator(self.field, self.options["fine"])
        given, lefts = (control, floats_as_arrays(args)), jnp.asarray(self.edges[:-1])
        lengths = jnp.asarray(np.diff(self.edges))
        empty = jnp.zeros((0,), lefts.dtype)

        def back(right: Array, row: Any) -> tuple[Array, Array]:
            start, t0, length = row
            _, pull_back = jax.vjp(lambda u: fine(given, u, t0, length, empty).end, start)
            (left,) = pull_back(right)
            return left, left

        last = jax.grad(lambda end: self.value(end)[0])(interface[-1])
        _, others = jax.lax.scan(back, last, (interface[:-1], lefts, lengths), reverse=True)
        found = jnp.concatenate([others, last[None]])
        return found if self.field.running is None else found[:, :-1]


def state_control_problem(
    field: Any,
    u0: PyTree,
    edges: Any,
    cost: Any,
    control: Any,
    args: Any,
    options: dict[str, Any],
    comm: TimeComm,
) -> Steered:
    """Check that field, control and cost fit together. Local.

    Args:
        field: `field(t, u, c, args)`.
        u0: Initial state; a batch of them where `in_axes` of the options says so.
        edges: Slice boundaries, checked.
        cost: A `Cost`.
        control: A module `control(t, u)`.
        args: What else the field gets.
        options: Of `solve`.
        comm: The line.

    Raises:
        ProblemError: with what does not fit.
    """
    for name, value in {"field": field, "control": control}.items():
        if not callable(value):
            raise ProblemError(f"`{name}` is a {type(value).__name__}; expected something to call.")
    if not isinstance(cost, Cost):
        raise ProblemError(
            f"`cost` is a {type(cost).__name__}; pass `nm.Cost(...)` or `nm.quadratic_cost(...)`."
        )
    in_axes = options.get("in_axes")
    if in_axes is not None:
        if (
            not isinstance(in_axes, (tuple, list))
            or len(in_axes) != 2
            or in_axes[0] not in (0, None)
        ):
            raise ProblemError(
                "`in_axes` of a control problem is (0, axes of args) or (None, axes of args): "
                "initial states have their samples in front."
            )
        options = options | {"in_axes": (in_axes[0], (None, in_axes[1]))}
    batched = in_axes is not None and in_axes[0] == 0
    u0 = _as_floats(u0)
    one = jax.tree.map(lambda leaf: leaf[0], u0) if batched else u0
    flat, unravel = ravel_pytree(one)
    rows = jax.vmap(lambda u: ravel_pytree(u)[0])(u0) if batched else flat
    if cost.running is not None:
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, 1)])
    steered = SteeredField(field, cost.running, _Unravel(unravel))
    if options.get("diffusion") is not None:
        noise = options.get("noise")
        is_matrix = getattr(noise, "kind", None) == "general"
        diffusion = SteeredDiffusion(
            options["diffusion"], cost.running is not None, steered.unravel, is_matrix
        )
        options = options | {"diffusion": diffusion}
    _check_shapes(steered, cost, one, float(edges[0]), control, args, in_axes)
    return Steered(steered, cost, rows, edges, options, comm)


class _Unravel:
    """The user's state from a row of numbers; equal to itself alone, and so to be hashed."""

    def __init__(self, unravel: Callable):
        self.unravel = unravel

    def __call__(self, row: Array) -> PyTree:
        return self.unravel(row)


def _as_floats(u0: PyTree) -> PyTree:
    if isinstance(u0, (list, tuple)) and u0 and all(np.isscalar(entry) for entry in u0):
        u0 = np.asarray(u0)
    default = jnp.zeros(()).dtype

    def as_float(leaf: Any) -> Array:
        array = jnp.asarray(leaf)
        return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(default)

    return jax.tree.map(as_float, u0)


def _check_shapes(
    steered: SteeredField, cost: Cost, u: Any, t0: float, control: Any, args: Any, in_axes: Any
) -> None:
    """Call everything once on shapes."""
    t = jnp.asarray(t0, float)
    try:
        c = eqx.filter_eval_shape(control, t, u)
    except Exception as error:
        raise ProblemError(
            f"`control(t, u)` failed for one time and one state: {type(error).__name__}: {error}"
        ) from error
    row = hasattr(c, "shape") and len(c.shape) == 1
    if not row or not jnp.issubdtype(c.dtype, jnp.floating):
        raise ProblemError(
            f"`control(t, u)` returned {c}; expected a row of numbers, (n_controls,)."
        )
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(u))
    if in_axes is None or in_axes[1] is None:
        try:
            change = eqx.filter_eval_shape(
                lambda t, u, c, args: ravel_pytree(steered.field(t, u, c, args))[0], t, u, c,
                floats_as_arrays(args),
            )  # fmt: skip
        except Exception as error:
            raise ProblemError(
                f"`field(t, u, c, args)` failed for one state and a control of shape {c.shape}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if change.shape != (size,):
            raise ProblemError(
                f"`field(t, u, c, args)` returned {change.shape[0]} numbers for a state of {size}."
            )
    for name, inputs in (("running", (t, u, c)), ("terminal", (u,))):
        function = getattr(cost, name)
        found = None if function is None else eqx.filter_eval_shape(function, *inputs)
        if found is not None and np.prod(jnp.shape(found)) != 1:
            raise ProblemError(f"`{name}` of the cost returned shape {found.shape}, not a number.")


def _n_paths(options: dict[str, Any]) -> int | None:
    noise = options.get("noise")
    return None if noise is None else noise.n_paths
