"""Solve one initial-value problem in parallel in time: the library call `nodepint_mpi.solve`."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Inexact, PyTree

from nodepint_mpi.core.methods import AbstractMethod, Parareal, Picard, Serial
from nodepint_mpi.core.partition import check_edges, check_layout, own_slices
from nodepint_mpi.core.propagators import AbstractIntegrator, Propagator, SliceResult
from nodepint_mpi.core.stopping import AbstractStopping, JumpTolerance
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import NonFiniteError, ProblemError
from nodepint_mpi.parallel.comms import TimeComm, world_time_comm
from nodepint_mpi.parallel.differentiate import TimeSolver, linearise_at
from nodepint_mpi.parallel.exchange import bcast_from, gather_slices, sum_over_ranks
from nodepint_mpi.parallel.solve import SweepRecord, solve_interface


class Status(enum.StrEnum):
    """How a solve ended; the value says what that means."""

    CONVERGED = "converged: every slice is solved"
    MAX_SWEEPS = (
        "not converged: the largest number of sweeps was done before every slice was solved. "
        "Allow more sweeps, loosen the tolerance, or use a better coarse propagator."
    )
    NON_FINITE = (
        "not finite: the fine propagator returned NaN or infinity from an exact start, or ran "
        "out of steps. Check the field, take smaller steps, or raise `max_steps`."
    )


class Solution(eqx.Module):
    """Interface states of a time-parallel solve, equal on all ranks.

    `interface` has one state per slice boundary, (n_slices + 1, *state), the initial state first.
    The other properties read the record of the iteration and so need concrete values: use them
    outside jit.
    """

    interface: PyTree[Inexact[Array, "edges ..."]]
    record: SweepRecord

    @property
    def sweeps(self) -> int:
        """Correction sweeps done, the published K."""
        return int(self.record.n_sweeps)

    @property
    def jumps(self) -> np.ndarray:
        """Largest jump of each iterate, starting with iteration 0, where it was evaluated."""
        jumps = np.asarray(self.record.jumps)[: self.sweeps + 1]
        return jumps[~np.isnan(jumps)]

    @property
    def updates(self) -> np.ndarray:
        """Largest change of the interface by each sweep, (sweeps,)."""
        return np.asarray(self.record.updates)[1 : self.sweeps + 1]

    @property
    def fronts(self) -> np.ndarray:
        """Number of frozen slices after each sweep, (sweeps,)."""
        return np.asarray(self.record.fronts)[1 : self.sweeps + 1]

    @property
    def status(self) -> Status:
        """Converged, out of sweeps, or not finite."""
        if not bool(self.record.finite):
            return Status.NON_FINITE
        n_slices = jax.tree.leaves(self.interface)[0].shape[0] - 1
        front = int(self.record.fronts[self.record.n_sweeps])
        return Status.CONVERGED if front >= n_slices else Status.MAX_SWEEPS


def solve(
    field: Field,
    u0: PyTree,
    edges: Any,
    *,
    fine: AbstractIntegrator,
    coarse: AbstractIntegrator | Propagator | None = None,
    method: str = "parareal",
    stopping: AbstractStopping | None = None,
    args: PyTree = None,
    guess: PyTree = None,
    adjoint_tol: float = 1e-10,
    comm: TimeComm | None = None,
) -> Solution:
    """Solve du/dt = field(t, u, args), u(edges[0]) = u0, on all time slices at once.

    Collective over `comm`; every rank must pass equal arguments, and gets the whole solution.

    Iterates  U[n+1] <- F(U_old[n]) + G(U[n]) - G(U_old[n])  from the coarse solution until
    `stopping` calls every slice solved. The result is the same, to round-off, on any number of
    ranks. Differentiable in reverse mode with respect to `u0` and the floating-point leaves of
    `args`, by the transposed iteration: compute the same loss on every rank and every rank gets
    the whole gradient. Not under `vmap`, `jvp` or `jax.checkpoint`.

    Args:
        field: Vector field `f(t, u, args)`, returning something of `u`'s structure and shapes.
        u0: Initial state: an array or a tree of arrays, real floating point.
        edges: Slice boundaries, (n_slices + 1,), strictly increasing, in the unit of time.
        fine: Steps of the fine propagator F over one slice.
        coarse: Steps of the coarse propagator G over one slice, or a whole `Propagator` with
            another field. Needed by `"parareal"` alone.
        method: `"parareal"`, `"picard"` or `"serial"`.
        stopping: `JumpTolerance` (default, 1e-8 in the state's units), `FixedSweeps` or
            `FreezeSlices`.
        args: Anything the field needs.
        guess: Interface states to start from, shaped like `Solution.interface`, for instance
            those of a nearby problem.
        adjoint_tol: Bound on the relative residual of the cotangents, for derivatives.
        comm: A line of ranks; the whole world unless given.

    Returns:
        Interface states, sweeps, jumps and updates per sweep, frozen front per sweep, status.
        Not reaching the tolerance is no error: see `Solution.status`. States are finite.

    Raises:
        ProblemError: on all ranks, if field, state, edges and options do not fit together.
        LayoutError: on all ranks, if there are more ranks than slices.
        NonFiniteError: on all ranks, if `u0` holds NaN or infinity.

    Reference:
        Lions, Maday, Turinici (2001), C. R. Acad. Sci. 332, 661-668.
    """
    comm = world_time_comm() if comm is None else comm
    edges = check_edges(edges)
    initial, unravel, flat_field = _as_array(field, u0)
    _check_problem(flat_field, initial, edges, args)
    flat_guess = None if guess is None else _flat_guess(guess, u0, initial, len(edges))
    solver = TimeSolver(
        fine=Propagator(flat_field, fine),
        method=_make_method(method, flat_field, coarse),
        stopping=JumpTolerance(1e-8) if stopping is None else stopping,
        adjoint_tol=adjoint_tol,
    )
    check_layout(len(edges) - 1, comm.size)
    params, static = eqx.partition(args, eqx.is_inexact_array)
    interface, record = _solve_replicated(
        comm, solver, tuple(edges.tolist()), static, params, initial, flat_guess
    )
    return Solution(interface if unravel is None else jax.vmap(unravel)(interface), record)


def _as_array(field: Field, u0: PyTree) -> tuple[Array, Callable | None, Field]:
    """The state as one array, the way back for a tree, and the field of the array."""
    if isinstance(u0, (list, tuple)) and all(np.isscalar(entry) for entry in u0):
        u0 = np.asarray(u0)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(u0)]
    if not leaves or sum(leaf.size for leaf in leaves) == 0:
        raise ProblemError("`u0` is empty; the state needs at least one number.")
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        raise ProblemError("`u0` is complex; solve for its real and imaginary parts instead.")
    if jax.tree.structure(u0) == jax.tree.structure(0):
        (leaf,) = leaves
        dtype = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.zeros(()).dtype
        return leaf.astype(dtype), None, field
    flat, unravel = ravel_pytree(u0)
    return flat, unravel, _FlatField(field, unravel)


@dataclass(frozen=True)
class _FlatField:
    """A field of trees as a field of one vector."""

    field: Field
    unravel: Callable

    def __call__(self, t, u, args):
        return ravel_pytree(self.field(t, self.unravel(u), args))[0]


def _flat_guess(guess: PyTree, u0: PyTree, initial: Array, n_edges: int) -> Array:
    """A guess of the interface as one array."""
    if jax.tree.structure(guess) != jax.tree.structure(u0):
        flat = jnp.asarray(guess, dtype=initial.dtype)
    elif jax.tree.structure(u0) == jax.tree.structure(0):
        flat = jnp.asarray(guess, dtype=initial.dtype)
    else:
        flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(guess)
    if flat.shape != (n_edges, *initial.shape):
        raise ProblemError(
            f"`guess` has shape {flat.shape}; it needs one state per slice boundary, "
            f"{(n_edges, *initial.shape)}."
        )
    if _is_concrete(flat) and not bool(jnp.all(jnp.isfinite(flat))):
        raise NonFiniteError("`guess` holds NaN or infinity; leave it out or repair it.")
    return flat


def _check_problem(field: Field, initial: Array, edges: np.ndarray, args: PyTree) -> None:
    """The field must return what the state is made of."""
    t0 = jnp.asarray(edges[0], dtype=initial.dtype)
    slope = eqx.filter_eval_shape(field, t0, initial, args)
    shape = getattr(slope, "shape", None)
    if shape != initial.shape:
        given = f"shape {shape}" if shape is not None else f"a {type(slope).__name__}"
        raise ProblemError(
            f"The field returned {given} for a state of shape {initial.shape}; du/dt must have "
            "the shape of u."
        )
    if jnp.issubdtype(slope.dtype, jnp.complexfloating):
        raise ProblemError("The field returned complex numbers for a real state.")
    if _is_concrete(initial) and not bool(jnp.all(jnp.isfinite(initial))):
        raise NonFiniteError("`u0` holds NaN or infinity.")


def _make_method(name: str, field: Field, coarse) -> AbstractMethod:
    if name == "serial":
        return Serial()
    if name == "picard":
        return Picard()
    if name != "parareal":
        raise ProblemError(f"`method` is {name!r}; choose 'parareal', 'picard' or 'serial'.")
    if coarse is None:
        raise ProblemError(
            "`method='parareal'` needs `coarse`, the steps of the coarse propagator; "
            "'picard' does without."
        )
    return Parareal(coarse if isinstance(coarse, Propagator) else Propagator(field, coarse))


def _is_concrete(array: Array) -> bool:
    return not isinstance(array, Tracer)


@eqx.filter_jit
def _solve_replicated(comm, solver, edges, static, params, initial, guess):
    """Replicated numbers in, replicated numbers out, with the transposed solve as derivative."""
    owned = own_slices(np.asarray(edges), comm.size, comm.rank)
    solver = eqx.tree_at(_propagators, solver, replace_fn=lambda g: _with_static_args(g, static))
    guess = None if guess is None else jax.lax.stop_gradient(guess[1:][owned.indices])

    @jax.custom_vjp
    def run(params, initial):
        interface = solve_interface(
            comm, params, initial, guess,
            fine=solver.fine, method=solver.method, stopping=solver.stopping, owned=owned,
        )  # fmt: skip
        ends = gather_slices(comm, interface.states.ends, owned.n_slices)
        return jnp.concatenate([initial[None], ends]), interface.record

    def forward(params, initial):
        interface, record = run(params, initial)
        return (interface, record), (params, interface)

    def backward(residuals, bars):
        params, interface = residuals
        interface_bar, _ = bars
        line = linearise_at(comm, solver, params, interface[owned.indices], owned)
        sources = SliceResult(jnp.zeros_like(line.result.saves), interface_bar[owned.indices + 1])
        gradient = line.pull_back(sources, None)
        initial_bar = bcast_from(comm, gradient.initial, 0) + interface_bar[0]
        return sum_over_ranks(comm, gradient.params), initial_bar

    run.defvjp(forward, backward)
    return run(params, initial)


def _propagators(solver: TimeSolver) -> list[Propagator]:
    coarse = [solver.method.coarse] if isinstance(solver.method, Parareal) else []
    return [solver.fine, *coarse]


def _with_static_args(propagator: Propagator, static: PyTree) -> Propagator:
    """The same propagator, given only the args that have derivatives."""

    def field(t, u, params):
        return propagator.field(t, u, eqx.combine(params, static))

    return Propagator(field, propagator.integrator)
