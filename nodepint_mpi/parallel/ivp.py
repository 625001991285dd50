"""Solve one initial-value problem in parallel in time: the library call `nodepint_mpi.solve`."""

import enum
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Inexact, PyTree

from nodepint_mpi.core.galerkin import Galerkin
from nodepint_mpi.core.partition import check_edges, check_layout, own_slices
from nodepint_mpi.core.propagators import AbstractIntegrator, Propagator, SliceResult
from nodepint_mpi.core.resolution import check_field_resolution
from nodepint_mpi.core.stopping import AbstractStopping
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, counting
from nodepint_mpi.parallel.differentiate import linearize_at
from nodepint_mpi.parallel.exchange import (
    bcast_from,
    gather_slices,
    max_over_ranks,
    sum_over_ranks,
)
from nodepint_mpi.parallel.failure import or_adjoint_failure, require_solved, warn_of_drift
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.judge import SweepRecord
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.method_options import (
    MethodOptions,
    Numbers,
    check_batch_axes,
    check_comm,
    check_method_options,
    check_numbers,
    default_stopping,
    make_method,
)
from nodepint_mpi.parallel.methods.base import ENDS, AbstractMethod, Carry
from nodepint_mpi.parallel.problem import (
    as_field,
    check_field,
    floats_as_arrays,
    lay_out,
    lay_out_guess,
)
from nodepint_mpi.parallel.programs import static_key
from nodepint_mpi.parallel.same_arguments import is_traced, require_same_arguments, value_of
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.parallel.solve import solve_interface


class Status(enum.StrEnum):
    """How a solve ended; the value says what that means."""

    CONVERGED = "converged: every slice is solved"
    MAX_SWEEPS = (
        "not converged: the largest number of sweeps was done before every slice was solved. "
        "Allow more sweeps, loosen the tolerance, or use a better coarse propagator."
    )
    NON_FINITE = (
        "not finite: the fine propagator returned NaN or infinity from an exact start, or ran "
        "out of steps; states are NaN from there on. Check the field, use smaller steps, or "
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
    def sample_sweeps(self) -> np.ndarray | None:
        """Sweeps after which each sample was solved, (*samples); None without `n_batch_axes`.

        All samples take the sweeps of the slowest: one stiff sample shows here.
        """
        of_samples = self.record.sample_sweeps
        return None if of_samples is None else np.minimum(np.asarray(of_samples), self.sweeps)

    @property
    def meaning(self) -> str:
        """The status in words, with the samples that are not solved where these are known."""
        text, of_samples = self.status.value, self.sample_sweeps
        if self.status is not Status.MAX_SWEEPS or of_samples is None:
            return text
        late = [tuple(map(int, index)) for index in np.argwhere(of_samples >= self.sweeps)]
        names = ", ".join(str(index[0] if len(index) == 1 else index) for index in late[:8])
        return f"{text} Not solved: samples {names}{' and more' if len(late) > 8 else ''}."

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
    method: str | AbstractMethod = "parareal",
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
    n_batch_axes: int = 0,
    comm: TimeComm | None = None,
    throw: bool = True,
    check_ranks: bool = True,
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
    gradient. What the field closes over has no derivative. Not under `vmap`, `jvp` or
    `jax.checkpoint`.

    Args:
        field: Vector field `f(t, u, args)`, returning something of `u`'s structure, shapes and
            type. Whole numbers in it are converted.
        u0: Initial state: an array or a tree of arrays of real numbers, all of one floating-point
            type. Whole numbers and Python's numbers take the type of the others, or JAX's default.
        edges: Slice boundaries, (n_slices + 1,), strictly increasing, in the unit of time.
        fine: Steps of the fine propagator F over one slice.
        coarse: Steps of the coarse propagator G over one slice, or a whole `Propagator` with
            another field. Needed by `"parareal"` and `"reduced"`; `"tangent"` takes iteration 0
            from it, and falls back to parareal with it.
        method: `"parareal"`, `"tangent"`, `"reduced"`, `"picard"` or `"serial"`, which take the
            options below; or a method, such as `Tangent(basis, Propagator(field, steps))` or one of
            your own, which has its own.
        stopping: `JumpTolerance` (default, 1e-8 in the state's units), `FixedSweeps` or
            `FreezeSlices`.
        args: Anything the field needs. Arrays and floating-point numbers are traced, so other
            values of them do not compile again; whole numbers, booleans and texts are known to
            the field while it compiles, and so each makes a program of its own.
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
        n_batch_axes: Leading axes of the state that count samples. All samples take the same
            sweeps; `Solution.sample_sweeps` says which of them need how many, and messages name
            the sample. For a state that is one array.
        comm: A line of ranks; the whole world unless given.
        throw: Raise where the fine solve of a slice fails. Else the states from the end of that
            slice on are NaN, the status says so, and a derivative is NaN.
        check_ranks: Compare all arguments over the ranks first, bit for bit, the field by its code
            and what that reads. About 0.3 ms and 0.1 ms for each MB of arrays, plus one reduction
            of 16 bytes. Inside `jax.jit`, `vmap` or `scan` nothing is compared: values cannot be
            seen, and a rank that has compiled already would not take part. `jax.grad` alone is
            no hindrance. Whether a call is traced must be the same on all ranks.

    Returns:
        Interface states, sweeps, jumps and updates per sweep, frozen front per sweep, status.
        Not reaching the tolerance is not an error: see `Solution.status`.

    Raises:
        ProblemError: on all ranks, if field, state, edges and options do not fit together.
        AgreementError: on all ranks, if they do not pass equal arguments.
        LayoutError: on all ranks, if there are more ranks than slices.
        NonFiniteError: on all ranks, if `u0` holds NaN or infinity; if `throw` and the fine solve
            of a slice fails, with slice, time and entry of the state. Under `jax.jit` and in a
            derivative it arrives as a `JaxRuntimeError` with that message.

    Reference:
        Lions, Maday, Turinici (2001), C. R. Acad. Sci. 332, 661-668.
    """
    comm = check_comm(comm)
    options = MethodOptions(
        method, fine, coarse, tangents, basis, complement, recycle, precision, trust
    )
    numbers = Numbers(stopping, adjoint_tol, slices_at_once, throw, n_batch_axes)
    traced = is_traced(u0, edges, args, guess, options, numbers)
    if check_ranks and not traced:
        arguments = dict(field=field, u0=u0, edges=edges, args=args, guess=guess)
        require_same_arguments(comm.control, arguments | options._asdict() | numbers._asdict())
    if isinstance(value_of(edges), Tracer):
        raise ProblemError("`edges` is traced; times must be known outside of `jax.jit`.")
    edges = check_edges(value_of(edges))
    check_method_options(options)
    check_numbers(numbers)
    check_layout(len(edges) - 1, comm.size)
    initial, layout = lay_out(u0)
    check_batch_axes(n_batch_axes, layout.is_tree, initial.ndim)
    args = floats_as_arrays(args)
    flat_guess = None if guess is None else lay_out_guess(guess, layout, len(edges))
    flat_field = as_field(field, layout)
    check_field(flat_field, edges[0], args)
    propagator, method = (
        Propagator(flat_field, fine),
        make_method(options, flat_field, edges[0], args),
    )
    for part in jax.tree.leaves((propagator, method), is_leaf=_is_propagator):
        if _is_propagator(part):
            check_field_resolution(part.field, args, initial, edges, [part.integrator])
    solver = TimeSolver(
        fine=propagator,
        method=method,
        stopping=default_stopping(stopping),
        adjoint_tol=adjoint_tol,
        slices_at_once=slices_at_once,
        n_batch_axes=n_batch_axes,
    )
    params, others = eqx.partition(args, eqx.is_inexact_array)
    others, static = eqx.partition(others, eqx.is_array)
    parts, solver = eqx.partition(solver, eqx.is_array)
    numbers_in, structure = jax.tree.flatten(((others, parts), params, initial, flat_guess))
    key, make = _program(comm, tuple(edges.tolist()), solver, static, throw, structure)
    # In a trace the code that is being traced keeps it.
    program = make() if traced else comm.programs.get(key, make)
    interface, record, counts = program(numbers_in)
    if throw:
        interface = require_solved(interface, record, edges, u0, n_batch_axes=n_batch_axes)
    interface = jax.vmap(layout.split)(interface) if layout.is_tree else interface
    return Solution(interface, record, Tally(*counts))


def _program(
    comm: TimeComm,
    edges: tuple[float, ...],
    solver: TimeSolver,
    static: PyTree,
    throw: bool,
    structure: Any,
) -> tuple[Hashable, Callable[[], Callable]]:
    """The key of the compiled solve of these static parts, and what makes it.

    The program takes the leaves of a tree of that structure: JAX remembers the structures that
    compiled functions were called with, and with them the functions inside, long after these went.
    """
    leaves, statics = jax.tree.flatten((solver, static))
    key = edges, throw, structure, statics, tuple(map(static_key, leaves))
    try:
        hash(key)
    except TypeError as error:
        raise ProblemError(
            f"The options or `args` hold something that cannot be hashed ({error}); make static "
            "fields of your classes tuples and other hashable values."
        ) from None

    def solve_leaves(leaves):
        tree = jax.tree.unflatten(structure, leaves)
        return _solve_replicated(comm, solver, edges, static, throw, *tree)

    return key, lambda: jax.jit(solve_leaves)


def _solve_replicated(comm, solver, edges, static, throw, arrays, params, initial, guess):
    """Replicated numbers in, replicated numbers out, with the transposed solve as derivative.

    `arrays` are those of `args` and of the solver that have no derivative. The custom derivative
    gets them as arguments, since it must not close over what is traced.
    """
    owned = own_slices(np.asarray(edges), comm.size, comm.rank)

    def with_arrays(arrays):
        without_derivative, parts = arrays
        whole_solver = eqx.combine(parts, solver)
        others = eqx.combine(without_derivative, static)
        return jax.tree.map(lambda part: _given(part, others), whole_solver, is_leaf=_has_field)

    def whole(arrays, params, initial, guess):
        with counting() as ledger:
            line, solver = Line(comm, owned, params), with_arrays(arrays)
            carry = None if guess is None else Carry({ENDS: guess[1:][owned.indices]}, {})
            solved = solve_interface(line, solver, initial, carry)
            ends = gather_slices(comm, solved.states.ends, owned.n_slices)
        counts = max_over_ranks(comm, ledger.tally.as_array())
        return jnp.concatenate([initial[None], ends]), solved.record, counts, solved.memory

    @jax.custom_vjp
    def run(arrays, params, initial, guess):
        return whole(arrays, params, initial, guess)[:3]

    def forward(arrays, params, initial, guess):
        interface, record, counts, memory = whole(arrays, params, initial, guess)
        return (interface, record, counts), (arrays, params, interface, memory, record.finite)

    def backward(residuals, bars):
        arrays, params, interface, memory, solved = residuals
        interface_bar, *_ = bars
        line, solver = Line(comm, owned, params), with_arrays(arrays)
        at = linearize_at(line, solver, interface[owned.indices], memory)
        warn_of_drift(line, solver.fine, at.states.starts, at.result.end)
        sources = SliceResult(jnp.zeros_like(at.result.saves), interface_bar[owned.indices + 1])
        gradient = at.pull_back(sources)
        initial_bar = bcast_from(comm, gradient.initial, 0) + interface_bar[0]
        bars = sum_over_ranks(comm, gradient.params), initial_bar
        bars = or_adjoint_failure(bars, solved & gradient.record.finite, throw)
        return None, *bars, None

    run.defvjp(forward, backward)
    return run(arrays, params, initial, guess)


def _is_propagator(part: Any) -> bool:
    return isinstance(part, Propagator)


def _has_field(part: Any) -> bool:
    return isinstance(part, (Propagator, Galerkin))


def _given(part: Any, static: PyTree) -> Any:
    """The same propagator or reduction, given only the args that have derivatives."""

    def with_static(field: Field) -> Field:
        return lambda t, u, params: field(t, u, eqx.combine(params, static))

    if isinstance(part, Propagator):
        return Propagator(with_static(part.field), part.integrator)
    return Galerkin(with_static(part.full)) if isinstance(part, Galerkin) else part
