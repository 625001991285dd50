"""The compiled solve of `parallel.ivp`: replicated numbers in, replicated numbers out.

Its derivative is the transposed solve; nothing here is differentiated through messages.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, PyTree

from nodepint_mpi.core.each_sample import EachSample, GivenField, SampleField
from nodepint_mpi.core.galerkin import Galerkin
from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.scopes import FINE_FORWARD
from nodepint_mpi.core.stochastic import through
from nodepint_mpi.core.sweeps import propagate_block, slices_finite
from nodepint_mpi.core.types import Field, Params, State
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, counting, work
from nodepint_mpi.parallel.differentiate import linearize_at
from nodepint_mpi.parallel.exchange import (
    bcast_from,
    gather_slices,
    max_over_ranks,
    same_in_cell,
    sum_over_ranks,
)
from nodepint_mpi.parallel.failure import or_adjoint_failure, warn_of_drift
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.judge import SweepRecord, empty_record, first_bad_entries
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import ENDS, Carry
from nodepint_mpi.parallel.saved_times import SavedTimes, states_before
from nodepint_mpi.parallel.solve import Interface, solve_interface
from nodepint_mpi.parallel.warm_start import Begun, Misfits, follow_back, follow_forward


class Program(NamedTuple):
    """What a compiled solve is made of; nothing of it is traced."""

    comm: TimeComm
    solver: TimeSolver
    static: PyTree
    owned: OwnedSlices
    saved: SavedTimes | None
    ts: tuple[float, ...]
    throw: bool

    def line(self, params: Params) -> Line:
        """The line, with these parameters of the vector field. Local."""
        return Line(self.comm, self.owned, params)

    def with_arrays(self, arrays: PyTree) -> TimeSolver:
        """The solver, given the arrays of `args` and of itself that have no derivative. Local."""
        without_derivative, parts = arrays
        whole_solver = eqx.combine(parts, self.solver)
        others = eqx.combine(without_derivative, self.static)
        return jax.tree.map(lambda part: _given(part, others), whole_solver, is_leaf=_has_field)

    def read(self, initial: State, ends: Array, saves: Array | None) -> tuple[Array, Array | None]:
        """States at all edges and at all saved times, from the owned slices. Collective."""
        ends = same_in_cell(self.comm, ends)
        whole = gather_slices(self.comm, ends, self.owned.n_slices)
        interface = jnp.concatenate([initial[None], whole])
        if self.saved is None or saves is None:
            return interface, None
        saves = same_in_cell(self.comm, saves)
        return interface, self.saved.read(self.comm, initial, SliceResult(saves, ends))

    def sources(self, interface_bar: Array, ys_bar: Array | None) -> tuple[SliceResult, Array]:
        """Cotangents of what is read, for the owned slices and for the initial state. Local."""
        ends = interface_bar[self.owned.indices + 1]
        saves = jnp.zeros((*self.owned.ts.shape, *ends.shape[1:]), ends.dtype)
        if self.saved is None or ys_bar is None:
            return SliceResult(saves, ends), interface_bar[0]
        read, of_initial = self.saved.pull_back(ys_bar, SliceResult(saves, ends))
        return read._replace(end=read.end + ends), interface_bar[0] + of_initial


class Replicated(NamedTuple):
    """What a compiled solve returns: equal on all ranks."""

    interface: Inexact[Array, "edges *state"]
    ys: Inexact[Array, "times *state"] | None
    record: SweepRecord
    counts: Array


class Slot(NamedTuple):
    """Zeros, of which the derivative is what a tracked solve leaves. All floating-point numbers:
    whole ones have no derivative."""

    carry: Carry
    misfits: Misfits


def solve_replicated(
    program: Program, arrays: PyTree, params: Params, initial: State, guess: Array | None
) -> Replicated:
    """Solve, with the transposed solve as derivative. Collective, inside jit.

    `arrays` are those of `args` and of the solver that have no derivative. The custom derivative
    gets them as arguments, since it must not close over what is traced.
    """
    comm, owned = program.comm, program.owned

    def whole(arrays, params, initial, guess):
        with counting() as ledger:
            line, solver = program.line(params), program.with_arrays(arrays)
            carry = None if guess is None else Carry({ENDS: guess[1:][owned.indices]}, {})
            solved = solve_interface(line, solver, initial, carry)
            saves = _read_inside(program, line, solver, solved)
            interface, ys = program.read(initial, solved.states.ends, saves)
        counts = max_over_ranks(comm, ledger.tally.as_array())
        if ys is not None:
            ys = states_before(ys, np.asarray(program.ts), owned.all_edges, solved.record.broken)
        return Replicated(interface, ys, solved.record, counts), solved.memory

    @jax.custom_vjp
    def run(arrays, params, initial, guess):
        return whole(arrays, params, initial, guess)[0]

    def forward(arrays, params, initial, guess):
        found, memory = whole(arrays, params, initial, guess)
        return found, (arrays, params, found.interface, memory, found.record.finite)

    def backward(residuals, bars):
        arrays, params, interface, memory, solved = residuals
        line, solver = program.line(params), program.with_arrays(arrays)
        at = linearize_at(line, solver, interface[owned.indices], memory)
        warn_of_drift(line, solver.fine, at.states.starts, at.result.end)
        sources, initial_bar = program.sources(bars.interface, bars.ys)
        gradient = at.pull_back(sources)
        of_first = bcast_from(comm, same_in_cell(comm, gradient.initial), 0)
        initial_bar = of_first + initial_bar
        bars = sum_over_ranks(comm, gradient.params), initial_bar
        bars = or_adjoint_failure(bars, solved & gradient.record.finite, program.throw)
        return None, *bars, None

    run.defvjp(forward, backward)
    return run(arrays, params, initial, guess)


def solve_tracked(
    program: Program,
    arrays: PyTree,
    params: Params,
    initial: State,
    carry: Carry,
    slot: Slot | None,
) -> Replicated:
    """One sweep from what is carried, with one sweep back as derivative. Collective, inside jit.

    The cotangent of `slot` is what the two sweeps leave for the next solve.
    """
    comm, owned = program.comm, program.owned

    def whole(arrays, params, initial, carry) -> tuple[Replicated, Begun]:
        with counting() as ledger:
            line, solver = program.line(params), program.with_arrays(arrays)
            begun = follow_forward(line, solver, initial, carry)
            interface, ys = program.read(initial, begun.result.end, begun.result.saves)
        record = _tracked_record(interface, owned)
        return Replicated(interface, ys, record, ledger.tally.as_array()), begun

    @jax.custom_vjp
    def run(arrays, params, initial, carry, slot):
        del slot
        return whole(arrays, params, initial, carry)[0]

    def forward(arrays, params, initial, carry, slot):
        found, begun = whole(arrays, params, initial, carry)
        return found, (arrays, params, initial, carry, slot, begun)

    def backward(residuals, bars):
        arrays, params, initial, carry, slot, begun = residuals
        line, solver = program.line(params), program.with_arrays(arrays)
        sources, initial_bar = program.sources(bars.interface, bars.ys)
        followed = follow_back(line, solver, initial, carry, begun, sources)
        # The first rank alone has the cotangent of the initial state: one sum does for all.
        first = followed.initial if comm.rank == 0 else jnp.zeros_like(followed.initial)
        of_params, first, misfits = sum_over_ranks(comm, (followed.params, first, followed.misfits))
        left = Slot(followed.carry, misfits)
        if jax.tree.structure(left) != jax.tree.structure(slot):
            raise ProblemError(
                "The carry is not one that this solve leaves: it holds "
                f"{sorted(carry.rows) + sorted(carry.replicated)}. Begin with `nm.SolveCarry()` "
                "whenever the method changes."
            )
        left = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), left, slot)
        return None, of_params, first + initial_bar, None, left

    run.defvjp(forward, backward)
    return run(arrays, params, initial, carry, slot)


def shape_of_carry(
    program: Program, arrays: PyTree, params: Params, initial: State, carry: Carry
) -> Carry:
    """Shapes of what a tracked solve leaves. Local: nothing runs."""

    def track(arrays, params, initial, carry):
        line, solver = program.line(params), program.with_arrays(arrays)
        begun = follow_forward(line, solver, initial, carry)
        sources = jax.tree.map(jnp.zeros_like, begun.result)
        return follow_back(line, solver, initial, carry, begun, sources).carry

    return jax.eval_shape(track, arrays, params, initial, carry)


def _read_inside(
    program: Program, line: Line, solver: TimeSolver, solved: Interface
) -> Array | None:
    """States at the saved times inside the owned slices: one more fine solve, if there are any."""
    owned, starts = line.owned, solved.states.starts
    if program.saved is None:
        return None
    if solved.saves is not None:
        return solved.saves
    if owned.ts.shape[1] == 0:
        return jnp.zeros((owned.n_owned, 0, *starts.shape[1:]), starts.dtype)
    with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
        return propagate_block(
            solver.fine, line.params, starts, owned, at_once=solver.slices_at_once
        ).saves


def _tracked_record(interface: Array, owned: OwnedSlices) -> SweepRecord:
    """What is known of one sweep: which slice was the first to fail. Local."""
    ends = interface[1:]
    bad = ~slices_finite(ends)
    broken = jnp.where(jnp.any(bad), jnp.argmax(bad), owned.n_slices)
    entry = first_bad_entries(ends)[jnp.minimum(broken, owned.n_slices - 1)]
    return empty_record(1, interface.dtype, owned.n_slices)._replace(
        n_sweeps=jnp.array(1), finite=~jnp.any(bad), broken=broken, broken_entry=entry
    )


def _has_field(part: Any) -> bool:
    return isinstance(part, (Propagator, Galerkin))


def _given(part: Any, static: PyTree) -> Any:
    """The same propagator or reduction, given only the args that have derivatives."""

    def with_static(field: Field) -> Field:
        if isinstance(field, SampleField):
            return GivenField(field.alone, field.axes, static)

        def given(function):
            return lambda t, u, params: function(t, u, eqx.combine(params, static))

        return through(field, given)

    if isinstance(part, EachSample):
        return EachSample(with_static(part.field), part.integrator)
    if isinstance(part, Propagator):
        return Propagator(with_static(part.field), part.integrator)
    return Galerkin(with_static(part.full)) if isinstance(part, Galerkin) else part
