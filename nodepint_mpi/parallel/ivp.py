"""Solve one initial-value problem in parallel in time: the library call `nodepint_mpi.solve`."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Inexact, PyTree

from nodepint_mpi.core.galerkin import Galerkin
from nodepint_mpi.core.partition import check_edges, check_layout, own_slices
from nodepint_mpi.core.propagators import AbstractIntegrator, Propagator, SliceResult
from nodepint_mpi.core.resolution import check_field_resolution
from nodepint_mpi.core.stopping import AbstractStopping, JumpTolerance
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import NonFiniteError, ProblemError
from nodepint_mpi.parallel.comms import TimeComm, world_time_comm
from nodepint_mpi.parallel.differentiate import TimeSolver, iterate, linearise_at
from nodepint_mpi.parallel.exchange import (
    bcast_from,
    gather_slices,
    max_over_ranks,
    sum_over_ranks,
)
from nodepint_mpi.parallel.failure import or_adjoint_failure, require_solved
from nodepint_mpi.parallel.methods import AbstractMethod, Parareal, Picard, Serial
from nodepint_mpi.parallel.reduced import Reduced
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.parallel.solve import SweepRecord
from nodepint_mpi.parallel.tally import Tally, counting
from nodepint_mpi.parallel.tangent import Tangent


class Status(enum.StrEnum):
    """How a solve ended; the value says what that means."""

    CONVERGED = "converged: every slice is solved"
    MAX_SWEEPS = (
        "not converged: the largest number of sweeps was done before every slice was solved. "
        "Allow more sweeps, loosen the tolerance, or use a better coarse propagator."
    )
    NON_FINITE = (
        "not finite: the fine propagator returned NaN or infinity from an exact start, or ran "
        "out of steps; states are NaN from there on. Check the field, take smaller steps, or "
        "raise `max_steps`."
    )


class Solution(eqx.Module):
    """Interface states of a time-parallel solve, equal on all ranks.

    `interface` has one state per slice boundary, (n_slices + 1, *state), the initial state first.
    `work` has the largest count of any rank. The other properties read the record of the iteration
    and so need concrete values: use them outside jit.
    """

    interface: PyTree[Inexact[Array, "edges ..."]]
    record: SweepRecord
    work: Tally

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
    basis: SharedBasis | None = None,
    tangents: AbstractIntegrator | Propagator | None = None,
    complement: bool = False,
    recycle: bool = True,
    precision: str | None = None,
    trust: float | None = 0.5,
    adjoint_tol: float = 1e-10,
    slices_at_once: int | None = None,
    comm: TimeComm | None = None,
    throw: bool = True,
) -> Solution:
    """Solve du/dt = field(t, u, args), u(edges[0]) = u0, on all time slices at once.

    Collective over `comm`; every rank must pass equal arguments, and gets the whole solution.

    Iterates  U[n+1] <- F(U_old[n]) + C(U[n]) - C(U_old[n])  from the coarse solution until
    `stopping` calls every slice solved. The correction C is the coarse propagator (`"parareal"`),
    the derivative of F along a shared basis (`"tangent"`), the flow of the field projected on that
    basis (`"reduced"`), or nothing (`"picard"`). The result is the same, to round-off, on any
    number of ranks.

    Differentiable in reverse mode with respect to `u0` and the floating-point leaves of `args`, by
    the transposed iteration: compute the same loss on every rank and every rank gets the whole
    gradient. Not under `vmap`, `jvp` or `jax.checkpoint`.

    Args:
        field: Vector field `f(t, u, args)`, returning something of `u`'s structure and shapes.
        u0: Initial state: an array or a tree of arrays, real floating point.
        edges: Slice boundaries, (n_slices + 1,), strictly increasing, in the unit of time.
        fine: Steps of the fine propagator F over one slice.
        coarse: Steps of the coarse propagator G over one slice, or a whole `Propagator` with
            another field. Needed by `"parareal"` and `"reduced"`; `"tangent"` takes iteration 0
            from it, and falls back to parareal with it.
        method: `"parareal"`, `"tangent"`, `"reduced"`, `"picard"` or `"serial"`.
        stopping: `JumpTolerance` (default, 1e-8 in the state's units), `FixedSweeps` or
            `FreezeSlices`.
        args: Anything the field needs.
        guess: Interface states to start from, shaped like `Solution.interface`, for instance
            those of a nearby problem.
        basis: The basis of `"tangent"` and `"reduced"`.
        tangents: Steps of the propagator whose derivative `"tangent"` takes, or a `Propagator`;
            `fine` unless given.
        complement: `"tangent"` and `"reduced"`: use `coarse` on what lies outside the basis.
        recycle: `"tangent"`: keep the tangents of earlier sweeps, take only new ones.
        precision: `"tangent"`: type to compute tangents in, such as "float32".
        trust: `"tangent"`: longest correction along the basis relative to the longest state; what
            is longer is cut. None for no bound.
        adjoint_tol: Bound on the relative residual of the cotangents, for derivatives.
        slices_at_once: Slices a rank propagates as one batch, all its own unless given.
        comm: A line of ranks; the whole world unless given.
        throw: Raise where the fine solve of a slice fails. Else the states from the end of that
            slice on are NaN, the status says so, and a derivative is NaN.

    Returns:
        Interface states, sweeps, jumps and updates per sweep, frozen front per sweep, status.
        Not reaching the tolerance is not an error: see `Solution.status`.

    Raises:
        ProblemError: on all ranks, if field, state, edges and options do not fit together.
        LayoutError: on all ranks, if there are more ranks than slices.
        NonFiniteError: on all ranks, if `u0` holds NaN or infinity; if `throw` and the fine solve
            of a slice fails, with slice, time and entry of the state. Under `jax.jit` and in a
            derivative it arrives as a `JaxRuntimeError` with that message.

    Reference:
        Lions, Maday, Turinici (2001), C. R. Acad. Sci. 332, 661-668.
    """
    comm = world_time_comm() if comm is None else comm
    edges = check_edges(edges)
    initial, unravel, flat_field = _as_array(field, u0)
    _check_problem(flat_field, initial, edges, args)
    steps = [part for part in (fine, coarse, tangents) if isinstance(part, AbstractIntegrator)]
    check_field_resolution(flat_field, args, initial, edges, steps)
    flat_guess = None if guess is None else _flat_guess(guess, u0, initial, len(edges))
    if basis is not None:
        if unravel is not None and basis.n_batch_axes:
            raise ProblemError("A state that is a tree of arrays has no batch axes to share.")
        basis.sample_shape(initial.shape)
    options = _MethodOptions(basis, coarse, tangents, complement, recycle, precision, trust)
    solver = TimeSolver(
        fine=Propagator(flat_field, fine),
        method=_make_method(method, flat_field, fine, options),
        stopping=JumpTolerance(1e-8) if stopping is None else stopping,
        adjoint_tol=adjoint_tol,
        slices_at_once=slices_at_once,
    )
    check_layout(len(edges) - 1, comm.size)
    params, static = eqx.partition(args, eqx.is_inexact_array)
    interface, record, counts = _solve_replicated(
        comm, solver, tuple(edges.tolist()), static, params, initial, flat_guess, throw
    )
    if throw:
        interface = require_solved(interface, record, edges, u0)
    interface = interface if unravel is None else jax.vmap(unravel)(interface)
    return Solution(interface, record, Tally(*counts))


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


class _MethodOptions(NamedTuple):
    """What the caller of `solve` said about the method."""

    basis: SharedBasis | None
    coarse: AbstractIntegrator | Propagator | None
    tangents: AbstractIntegrator | Propagator | None
    complement: bool
    recycle: bool
    precision: str | None
    trust: float | None


def _make_method(
    name: str, field: Field, fine: AbstractIntegrator, options: _MethodOptions
) -> AbstractMethod:
    coarse = None if options.coarse is None else _as_propagator(field, options.coarse)
    if name == "serial":
        return Serial()
    if name == "picard":
        return Picard()
    basis = options.basis
    if name in ("tangent", "reduced") and basis is None:
        raise ProblemError(
            f"`method={name!r}` needs `basis`, for instance `SharedBasis('pod', rank=8, n_new=2)`."
        )
    if name == "tangent":
        assert basis is not None
        return Tangent(
            basis=basis,
            propagator=_as_propagator(field, options.tangents or fine),
            coarse=coarse,
            use_complement=options.complement,
            recycle=options.recycle,
            precision=options.precision,
            trust=options.trust,
        )
    if name not in ("parareal", "reduced"):
        raise ProblemError(
            f"`method` is {name!r}; choose 'parareal', 'tangent', 'reduced', 'picard' or 'serial'."
        )
    if coarse is None:
        raise ProblemError(
            f"`method={name!r}` needs `coarse`, the steps of the coarse propagator; "
            "'picard' and 'tangent' do without."
        )
    if name == "parareal":
        return Parareal(coarse)
    assert basis is not None
    return Reduced(basis, Galerkin(coarse.field), coarse.integrator, coarse, options.complement)


def _as_propagator(field: Field, steps: AbstractIntegrator | Propagator) -> Propagator:
    return steps if isinstance(steps, Propagator) else Propagator(field, steps)


def _is_concrete(array: Array) -> bool:
    return not isinstance(array, Tracer)


@eqx.filter_jit
def _solve_replicated(comm, solver, edges, static, params, initial, guess, throw):
    """Replicated numbers in, replicated numbers out, with the transposed solve as derivative."""
    owned = own_slices(np.asarray(edges), comm.size, comm.rank)
    solver = jax.tree.map(lambda part: _given(part, static), solver, is_leaf=_has_field)
    guess = None if guess is None else jax.lax.stop_gradient(guess[1:][owned.indices])

    def whole(params, initial):
        with counting() as ledger:
            states, record, memory = iterate(comm, solver, params, initial, guess, owned)
            ends = gather_slices(comm, states.ends, owned.n_slices)
        counts = max_over_ranks(comm, ledger.tally.as_array())
        return jnp.concatenate([initial[None], ends]), record, counts, memory

    @jax.custom_vjp
    def run(params, initial):
        return whole(params, initial)[:3]

    def forward(params, initial):
        interface, record, counts, memory = whole(params, initial)
        return (interface, record, counts), (params, interface, memory, record.finite)

    def backward(residuals, bars):
        params, interface, memory, solved = residuals
        interface_bar, *_ = bars
        line = linearise_at(comm, solver, params, interface[owned.indices], owned, memory)
        sources = SliceResult(jnp.zeros_like(line.result.saves), interface_bar[owned.indices + 1])
        gradient = line.pull_back(sources, None)
        initial_bar = bcast_from(comm, gradient.initial, 0) + interface_bar[0]
        bars = sum_over_ranks(comm, gradient.params), initial_bar
        return or_adjoint_failure(bars, solved & gradient.record.finite, throw)

    run.defvjp(forward, backward)
    return run(params, initial)


def _has_field(part: Any) -> bool:
    return isinstance(part, (Propagator, Galerkin))


def _given(part: Any, static: PyTree) -> Any:
    """The same propagator or reduction, given only the args that have derivatives."""

    def with_static(field: Field) -> Field:
        return lambda t, u, params: field(t, u, eqx.combine(params, static))

    if isinstance(part, Propagator):
        return Propagator(with_static(part.field), part.integrator)
    return Galerkin(with_static(part.full)) if isinstance(part, Galerkin) else part
