"""A time-parallel solve and its pull-back as one pair, for every method.

The training step calls the pair by hand; `parallel.ivp` wraps it in a custom derivative. Both
linearize the fine propagator once, at the states the forward solve ended with.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.scopes import FINE_FORWARD
from nodepint_mpi.core.stopping import AbstractStopping
from nodepint_mpi.core.sweeps import BlockStates, propagate_block
from nodepint_mpi.core.transposed import linearise_block
from nodepint_mpi.core.types import Block, Params, State
from nodepint_mpi.parallel.adjoint import (
    Gradient,
    linearise_serially,
    pull_back_serially,
    solve_adjoint,
)
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, work
from nodepint_mpi.parallel.failure import warn_of_drift
from nodepint_mpi.parallel.methods import AbstractMethod, AbstractSweeps, Memory, Serial
from nodepint_mpi.parallel.solve import (
    Interface,
    SweepRecord,
    largest_jump,
    serial_record,
    solve_interface,
)


class TimeSolver(eqx.Module):
    """Everything that fixes a time-parallel solve but the numbers: F, method, tolerances.

    `adjoint_tol` bounds the residual of the cotangents relative to the largest of them;
    `adjoint_max_sweeps` the number of adjoint sweeps. `slices_at_once` is the number of slices a
    rank propagates as one batch, all its own if None: few where a core is busy with one, so that
    finished slices are passed over; many on a GPU. `n_batch_axes` leading axes of a state count
    samples, whose sweeps are recorded one by one.
    """

    fine: Propagator
    method: AbstractMethod
    stopping: AbstractStopping
    adjoint_tol: float = eqx.field(static=True)
    adjoint_max_sweeps: int | None = eqx.field(static=True, default=None)
    slices_at_once: int | None = eqx.field(static=True, default=None)
    n_batch_axes: int = eqx.field(static=True, default=0)


class Linearised(NamedTuple):
    """What the owned slices give at their final states, and how to pull it back.

    `result` holds, for every owned slice, the states at the observation times inside it and the
    fine state at its end. `pull_back(sources, guess)` takes the cotangents of that, and
    optionally cotangents at the left edges to start from; it is collective.
    """

    states: BlockStates
    result: SliceResult
    pull_back: Callable[[SliceResult, Block | None], Gradient]


class LinearisedSolve(NamedTuple):
    """A forward solve ready to be pulled back; `jump` is the largest jump that is left.

    `memory` is what its method may start the next solve with.
    """

    line: Linearised
    record: SweepRecord
    jump: Float[Array, ""]
    memory: Memory


def linearise_solve(
    comm: TimeComm,
    solver: TimeSolver,
    params: Params,
    initial: State,
    guess: Block | None,
    owned: OwnedSlices,
    memory: Memory | None = None,
) -> LinearisedSolve:
    """Solve in parallel, then linearize at the solution. Collective over `comm`, inside jit.

    A horizon of one slice needs no iteration: it is the serial solve, at the serial price.

    Args:
        comm: Line of ranks along time.
        solver: Propagators, method, tolerances.
        params: Parameters of the vector field, floating-point arrays only, replicated.
        initial: State at the first edge, (*state). Read on the first rank only.
        guess: Ends of the owned slices to start from, or None.
        owned: The slices of this rank.
        memory: What an earlier solve ended with, or None.
    """

    def warn(line: Linearised) -> None:
        ends = line.result.end
        warn_of_drift(comm, solver.fine, params, line.states.starts, ends, owned, again=False)

    if is_serial(solver, owned):
        line = _linearise_serially(comm, solver, params, initial, owned)
        warn(line)
        record = serial_record(comm, line.result.end, owned)
        return LinearisedSolve(line, record, jnp.zeros((), record.jumps.dtype), None)
    states, record, memory = iterate(comm, solver, params, initial, guess, owned, memory)
    line = linearise_at(comm, solver, params, states.starts, owned, memory)
    warn(line)
    return LinearisedSolve(line, record, largest_jump(comm, line.result, states), memory)


def iterate(
    comm: TimeComm,
    solver: TimeSolver,
    params: Params,
    initial: State,
    guess: Block | None,
    owned: OwnedSlices,
    memory: Memory | None = None,
) -> Interface:
    """Solve for the interface states alone. Collective over `comm`; see `solve_interface`."""
    return solve_interface(
        comm,
        params,
        initial,
        guess,
        memory,
        fine=solver.fine,
        method=solver.method,
        stopping=solver.stopping,
        owned=owned,
        slices_at_once=solver.slices_at_once,
        n_batch_axes=solver.n_batch_axes,
    )


def solve_block(
    comm: TimeComm, solver: TimeSolver, params: Params, initial: State, owned: OwnedSlices
) -> SliceResult:
    """Solve in parallel and read the owned slices, without a derivative. Collective, inside jit."""
    if is_serial(solver, owned):
        return _linearise_serially(comm, solver, params, initial, owned).result
    states = iterate(comm, solver, params, initial, None, owned).states
    with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
        return propagate_block(
            solver.fine, params, states.starts, owned, at_once=solver.slices_at_once
        )


def linearise_at(
    comm: TimeComm,
    solver: TimeSolver,
    params: Params,
    starts: Block,
    owned: OwnedSlices,
    memory: Memory | None,
) -> Linearised:
    """Linearize the fine propagator at given starts of the slices. Collective, inside jit.

    For the serial method only the very first start counts. `memory` is the forward solve's.
    """
    if is_serial(solver, owned):
        return _linearise_serially(comm, solver, params, starts[0], owned)
    method = solver.method
    assert isinstance(method, AbstractSweeps)  # the serial one has been dealt with
    with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
        result, pull_back = linearise_block(
            solver.fine, params, starts, owned, at_once=solver.slices_at_once
        )

    def solve_cotangents(sources: SliceResult, guess: Block | None) -> Gradient:
        return solve_adjoint(
            comm,
            params,
            starts,
            sources,
            guess,
            memory,
            pull_back=pull_back,
            method=method,
            tol=solver.adjoint_tol,
            max_sweeps=solver.adjoint_max_sweeps,
            owned=owned,
        )

    return Linearised(BlockStates(starts, result.end), result, solve_cotangents)


def is_serial(solver: TimeSolver, owned: OwnedSlices) -> bool:
    """Whether there is nothing to iterate over. Local; equal on all ranks."""
    return isinstance(solver.method, Serial) or owned.n_slices == 1


def _linearise_serially(comm, solver, params, initial, owned) -> Linearised:
    line = linearise_serially(comm, solver.fine, params, initial, owned)
    return Linearised(
        line.states, line.result, lambda sources, guess: pull_back_serially(comm, line, sources)
    )
