"""A time-parallel solve and its pull-back as one pair, for every method.

The training step calls the pair by hand; `parallel.ivp` wraps it in a custom derivative. Both
linearize the fine propagator once, at the states the forward solve ended with.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.scopes import FINE_FORWARD, SWEEP, scope
from nodepint_mpi.core.sweeps import BlockStates, propagate_block
from nodepint_mpi.core.transposed import linearise_block
from nodepint_mpi.core.types import Block, State
from nodepint_mpi.parallel.adjoint import Gradient, Linear, pull_back_walk, solve_adjoint
from nodepint_mpi.parallel.counters import Tally, work
from nodepint_mpi.parallel.failure import warn_of_drift
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.judge import SweepRecord, serial_record
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import Memory
from nodepint_mpi.parallel.methods.serial import walk, walk_linearized
from nodepint_mpi.parallel.solve import largest_jump, solve_interface


class Linearized(NamedTuple):
    """What the owned slices give at their final states, and how to pull it back.

    `result` holds, for every owned slice, the states at the observation times inside it and the
    fine state at its end. `pull_back(sources)` takes the cotangents of that; it is collective.
    """

    states: BlockStates
    result: SliceResult
    pull_back: Callable[[SliceResult], Gradient]


class LinearizedSolve(NamedTuple):
    """A forward solve ready to be pulled back; `jump` is the largest jump that is left."""

    at: Linearized
    record: SweepRecord
    jump: Float[Array, ""]


def linearize_solve(line: Line, solver: TimeSolver, initial: State) -> LinearizedSolve:
    """Solve in parallel, then linearize at the solution. Collective over the line, inside jit.

    A horizon of one slice needs no iteration: it is the serial solve, at the serial price.

    Args:
        line: Ranks along time, and the parameters of the vector field.
        solver: Propagators, method, tolerances.
        initial: State at the first edge, (*state). Read on the first rank only.
    """
    if solver.walks(line.owned):
        at = _linearize_walk(line, solver, initial)
        _warn(line, solver, at)
        record = serial_record(line.comm, at.result.end, line.owned)
        return LinearizedSolve(at, record, jnp.zeros((), record.jumps.dtype))
    solved = solve_interface(line, solver, initial)
    at = linearize_at(line, solver, solved.states.starts, solved.memory)
    _warn(line, solver, at)
    with scope(SWEEP):
        jump = largest_jump(line.comm, at.result, solved.states)
    return LinearizedSolve(at, solved.record, jump)


def solve_block(line: Line, solver: TimeSolver, initial: State) -> SliceResult:
    """Solve in parallel and read the owned slices, without a derivative. Collective, inside jit."""
    if solver.walks(line.owned):
        return walk(line, solver.fine, initial)[1]
    states = solve_interface(line, solver, initial).states
    with work(FINE_FORWARD, Tally(fine=line.owned.n_owned)):
        return propagate_block(
            solver.fine, line.params, states.starts, line.owned, at_once=solver.slices_at_once
        )


def linearize_at(line: Line, solver: TimeSolver, starts: Block, memory: Memory) -> Linearized:
    """Linearize the fine propagator at given starts of the slices. Collective, inside jit.

    For the serial method only the very first start counts. `memory` is the forward solve's.
    """
    if solver.walks(line.owned):
        return _linearize_walk(line, solver, starts[0])
    with work(FINE_FORWARD, Tally(fine=line.owned.n_owned)):
        result, pull_back = linearise_block(
            solver.fine, line.params, starts, line.owned, at_once=solver.slices_at_once
        )

    def solve_cotangents(sources: SliceResult) -> Gradient:
        return solve_adjoint(line, solver, Linear(starts, memory, pull_back), sources)

    return Linearized(BlockStates(starts, result.end), result, solve_cotangents)


def _linearize_walk(line: Line, solver: TimeSolver, initial: State) -> Linearized:
    walked = walk_linearized(line, solver.fine, initial)
    return Linearized(
        walked.states, walked.result, lambda sources: pull_back_walk(line, walked, sources)
    )


def _warn(line: Line, solver: TimeSolver, at: Linearized) -> None:
    """Of a continuous adjoint that is off, once for every power of ten."""
    warn_of_drift(line, solver.fine, at.states.starts, at.result.end, again=False)
