"""Solve one initial-value problem in parallel in time: the library call `nodepint_mpi.solve`."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from diffrax import AbstractTerm
from jax.core import Tracer
from jaxtyping import PyTree

from nodepint_mpi.core.partition import check_edges, check_layout, own_slices
from nodepint_mpi.core.propagators import AbstractIntegrator, Propagator
from nodepint_mpi.core.resolution import check_field_resolution
from nodepint_mpi.core.stopping import AbstractStopping
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.parallel.failure import require_solved
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.method_options import (
    MethodOptions,
    Numbers,
    check_basis_ranks,
    check_comm,
    check_method_options,
    check_numbers,
    check_tracked,
    default_stopping,
    make_method,
)
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.noise import Noise
from nodepint_mpi.parallel.problem import lay_out_guess
from nodepint_mpi.parallel.programs import static_key
from nodepint_mpi.parallel.replicated import (
    Program,
    shape_of_carry,
    solve_replicated,
    solve_tracked,
)
from nodepint_mpi.parallel.same_arguments import is_traced, require_same_arguments, value_of
from nodepint_mpi.parallel.saved_times import check_saved_times, place_saved_times
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.parallel.solution import Solution
from nodepint_mpi.parallel.stated import Equation, state_equation
from nodepint_mpi.parallel.tracking import LentCarry


def solve(
    field: Field | AbstractTerm,
    u0: PyTree,
    edges: Any,
    *,
    fine: AbstractIntegrator,
    coarse: AbstractIntegrator | Propagator | None = None,
    method: str | AbstractMethod = "parareal",
    stopping: AbstractStopping | None = None,
    args: PyTree = None,
    diffusion: Any = None,
    noise: Noise | None = None,
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
    ts: Any = None,
    in_axes: Any = None,
    carry: LentCarry | None = None,
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
            type. Whole numbers in it are converted. Or a `diffrax.ODETerm` of such a function, also
            one made by `ControlTerm(f, control).to_ode()`; arrays in it have no derivative.
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
        diffusion: `g(t, u, args)` of a stochastic equation du = field dt + g dW, with `noise`. Of
            the shape of `u`, or (*u, m) for general noise.
        noise: Its Brownian motion, `Noise(seed, paths)`: which paths, how many dimensions, and in
            which sense. Steps are fixed, by diffrax's stochastic solvers, and states and gradient
            are those of the serial path.
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
            the sample. For a state that is one array, and a field of the whole batch.
        ts: Times to save states at, strictly increasing, anywhere from `edges[0]` to `edges[-1]`,
            as in diffrax's `SaveAt(ts=...)`: `Solution.ys`, on all ranks. No step is cut: a state
            inside a step is the solver's interpolation, one within rounding of a slice boundary is
            that of the boundary. Times inside slices cost one more fine solve of all slices, at
            once; those on boundaries nothing. `interface` is the same with and without.
        in_axes: Axes of `(u0, args)` that count samples, as `jax.vmap` takes them: `(0, None)` for
            a batch of initial states, `(0, {"rate": 0, "model": None})` for samples with arguments
            of their own, an axis for both. `field`, and that of every `Propagator`, is then the one
            of a single sample, and every sample takes its own steps, as in `jax.vmap` of a serial
            solve. All samples take the sweeps of the slowest, see `Solution.sample_sweeps`.
        carry: What `nodepint_mpi.value_and_grad` hands to a loss: one sweep each way from what the
            last step left, instead of a solve from scratch. Then `guess` and `stopping` are
            refused, nothing is thrown where numbers are not finite, and `interface` and `ys` are
            what the fine propagator gives from the states carried.
        comm: A line of ranks; the whole world unless given. With `method="tangent"` it may be one
            where several ranks share the tangents of a slice: `make_time_comm(mpi, n_basis=2)`.
        throw: Raise where the fine solve of a slice fails. Else the states from the end of that
            slice on are NaN, the status says so, and a derivative is NaN.
        check_ranks: Compare all arguments over the ranks first, bit for bit, the field by its code
            and what that reads. About 0.3 ms and 0.1 ms for each MB of arrays, plus one reduction
            of 16 bytes. Inside `jax.jit`, `vmap` or `scan` nothing is compared: values cannot be
            seen, and a rank that has compiled already would not take part. `jax.grad` alone is
            no hindrance. Whether a call is traced must be the same on all ranks.

    Returns:
        Interface states and states at `ts`, sweeps, jumps and updates per sweep, frozen front per
        sweep, status.
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
    if carry is not None and not isinstance(carry, LentCarry):
        raise ProblemError(
            f"`carry` is a {type(carry).__name__}; pass the one that `nm.value_and_grad(loss)` "
            "hands to `loss(params, carry, ...)`."
        )
    options = MethodOptions(
        method, fine, coarse, tangents, basis, complement, recycle, precision, trust
    )
    numbers = Numbers(stopping, adjoint_tol, slices_at_once, throw, n_batch_axes)
    of_noise = vars(noise) if isinstance(noise, Noise) else noise
    traced = is_traced(u0, edges, args, of_noise, guess, ts, options, numbers)
    if check_ranks and not traced:
        arguments = dict(field=field, u0=u0, edges=edges, args=args, guess=guess)
        arguments |= {"diffusion": diffusion, "noise": of_noise}
        arguments |= {"ts": ts, "in_axes": in_axes} | options._asdict() | numbers._asdict()
        require_same_arguments(comm.control, arguments)
    if isinstance(value_of(edges), Tracer):
        raise ProblemError("`edges` is traced; times must be known outside of `jax.jit`.")
    edges = check_edges(value_of(edges))
    times = None if ts is None else check_saved_times(ts, edges)
    check_method_options(options)
    check_numbers(numbers)
    check_layout(len(edges) - 1, comm.size)
    equation = Equation(u0, args, diffusion, noise, in_axes, n_batch_axes)
    args, initial, fields, n_batch_axes = state_equation(equation, edges, options)
    layout, samples = fields.layout, fields.samples
    n_samples = None if samples is None else samples.n
    flat_guess = None if guess is None else lay_out_guess(guess, layout, len(edges), n_samples)
    flat_field = fields.bind(field)
    propagator = fields.propagator(flat_field, fine)
    method = make_method(options, fields, flat_field)
    check_basis_ranks(comm, method, fields.state)
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
    begin = flat_guess
    if carry is not None:
        check_tracked(numbers, guess, method, noise)
        begin = carry.take(len(own_slices(edges, comm.size, comm.rank).indices))
    params, others = eqx.partition(args, eqx.is_inexact_array)
    others, static = eqx.partition(others, eqx.is_array)
    parts, solver = eqx.partition(solver, eqx.is_array)
    numbers_in, structure = jax.tree.flatten(((others, parts), params, initial, begin))
    made_of = _MadeOf(
        tuple(edges.tolist()), None if times is None else tuple(times.tolist()), solver, static,
        throw, carry is not None, structure,
    )  # fmt: skip
    if carry is not None and carry.slot is None:
        tree = (others, parts), params, initial, carry.carry
        carry.found.append(shape_of_carry(made_of.program(comm), *tree))
    key, make = _program(comm, made_of)
    # In a trace the code that is being traced keeps it.
    program = make() if traced else comm.programs.get(key, make)
    interface, ys, record, counts = program(numbers_in)
    if throw and carry is None:
        interface, ys = require_solved(
            (interface, ys), record, edges, u0, by_sample=samples is not None,
            n_batch_axes=0 if samples is not None else n_batch_axes,
        )  # fmt: skip
    split = layout.split if samples is None else jax.vmap(layout.split)
    if layout.is_tree:
        interface, ys = jax.tree.map(jax.vmap(split), (interface, ys))
    held = (0, 0)
    if times is not None:
        held = place_saved_times(times, edges, comm.size, comm.rank).held
    return Solution(interface, record, Tally(*counts), times, ys, carry is not None, held)


class _MadeOf(NamedTuple):
    """What a compiled solve depends on besides numbers: times, the static parts, and the structure
    of the tree of its numbers."""

    edges: tuple[float, ...]
    ts: tuple[float, ...] | None
    solver: TimeSolver
    static: PyTree
    throw: bool
    tracked: bool
    structure: Any

    def program(self, comm: TimeComm) -> Program:
        """Where the numbers go. Local."""
        edges = np.asarray(self.edges)
        if self.ts is None:
            owned, saved = own_slices(edges, comm.size, comm.rank), None
        else:
            saved = place_saved_times(np.asarray(self.ts), edges, comm.size, comm.rank)
            owned = saved.here.owned
        return Program(comm, self.solver, self.static, owned, saved, self.ts or (), self.throw)


def _program(comm: TimeComm, made_of: _MadeOf) -> tuple[Hashable, Callable[[], Callable]]:
    """The key of the compiled solve of these static parts, and what makes it.

    The program takes the leaves of a tree of that structure: JAX remembers the structures that
    compiled functions were called with, and with them the functions inside, long after these went.
    """
    leaves, statics = jax.tree.flatten((made_of.solver, made_of.static))
    rest = made_of._replace(solver=None, static=None)
    key = rest, statics, tuple(map(static_key, leaves))
    try:
        hash(key)
    except TypeError as error:
        raise ProblemError(
            f"The options or `args` hold something that cannot be hashed ({error}); make static "
            "fields of your classes tuples and other hashable values."
        ) from None

    def solve_leaves(leaves):
        arrays, params, initial, begin = jax.tree.unflatten(made_of.structure, leaves)
        program = made_of.program(comm)
        if made_of.tracked:
            return solve_tracked(program, arrays, params, initial, *begin)
        return solve_replicated(program, arrays, params, initial, begin)

    return key, lambda: jax.jit(solve_leaves)


def _is_propagator(part: Any) -> bool:
    return isinstance(part, Propagator)
