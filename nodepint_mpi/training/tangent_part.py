"""One rank's part of random basis descent by tangents: a solve, and derivatives along directions.

No adjoint is solved and no state is kept for one: what is held at a time are the tangents of a
chunk of directions.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.objective import SimulationFree
from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.scopes import FINE_FORWARD
from nodepint_mpi.core.sweeps import propagate_block
from nodepint_mpi.parallel.counters import Tally, work
from nodepint_mpi.parallel.exchange import sum_over_ranks
from nodepint_mpi.parallel.judge import serial_record
from nodepint_mpi.parallel.methods.serial import walk
from nodepint_mpi.parallel.push_forward import push_forward
from nodepint_mpi.parallel.solve import largest_jump, solve_interface
from nodepint_mpi.training.batch_model import terms_of_loss
from nodepint_mpi.training.block_loss import compare
from nodepint_mpi.training.line_problem import LineProblem, field_params, initial_of
from nodepint_mpi.training.part import Part, Solved, divided_sums
from nodepint_mpi.training.random_descent import RandomDescent


def tangent_part(
    problem: LineProblem,
    descent: RandomDescent,
    params: PyTree,
    batch: SampleBatch,
    weight: Array | None = None,
) -> Part:
    """This rank's part of a batch's loss and coefficients. Collective over the grid, inside jit.

    Args:
        problem: What the line computes with; its continuity is not relaxed.
        descent: The directions.
        params: Where the derivative is taken.
        batch: The samples, with the number of the step.
        weight: None: relaxed solves have no tangents here.
    """
    assert weight is None and not isinstance(problem.loss, SimulationFree)  # refused before
    comm, solver, owned = problem.comm, problem.solver, problem.observations.owned
    of_initial, loss, first = initial_of(problem, batch), problem.loss, problem.comm.rank == 0
    shape = jax.eval_shape(of_initial, params)
    initial = of_initial(params) if first else jnp.zeros(shape.shape, shape.dtype)

    def of_field(params: PyTree) -> PyTree:
        return field_params(problem, params, batch, None)

    def read_loss(params: PyTree, result: SliceResult) -> tuple[Array, Array]:
        mean = compare(problem, params, result, batch, loss)
        return mean.sum, mean.count

    def added(params: PyTree) -> Array:
        model = eqx.combine(params, problem.static)
        return terms_of_loss(problem.terms, model, batch, problem.seed) / comm.n_groups

    line = problem.line(of_field(params))
    if solver.walks(owned):
        states, result = walk(line, solver.fine, initial)
        record = serial_record(comm, result.end, owned)
        jump = jnp.zeros((), record.jumps.dtype)
    else:
        solved = solve_interface(line, solver, initial)
        states, record = solved.states, solved.record
        with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
            result = propagate_block(
                solver.fine, line.params, states.starts, owned, at_once=solver.slices_at_once
            )
        jump = largest_jump(comm, result, states)
    loss_sum, count = read_loss(params, result)
    count = sum_over_ranks(comm, count)
    fine = solver.fine.for_tangents()

    def of_chunk(directions: PyTree[Array]) -> Array:
        n = len(jax.tree.leaves(directions)[0])
        begun = jnp.zeros((n, *shape.shape), shape.dtype)
        if first:
            begun = jax.vmap(lambda v: jax.jvp(of_initial, (params,), (v,))[1])(directions)
        results = push_forward(
            comm, owned, fine, of_field, params, states.starts,
            directions=directions, initial=begun,
        )  # fmt: skip

        def slope(direction: PyTree[Array], tangent: SliceResult) -> Array:
            primal, along = (params, result), (direction, tangent)
            value = jax.jvp(lambda p, r: read_loss(p, r)[0], primal, along)[1] / count
            if problem.terms and first:
                value = value + jax.jvp(added, (params,), (direction,))[1]
            return value

        return jax.vmap(slope, in_axes=(0, 1))(directions, results)

    widest = len(owned_range(owned.n_slices, comm.size, 0))
    coefficients = descent.along(
        of_chunk, jnp.asarray(batch.step), numbers=2 * widest * initial.size
    )
    value = loss_sum / count
    if problem.terms and first:
        value = value + added(params)
    nothing, zero = jnp.array(0), jnp.zeros_like(value)
    numbers = Solved(
        sweeps=record.n_sweeps,
        jump=jump,
        adjoint_sweeps=nothing,
        adjoint_residual=zero,
        guarded=record.n_guarded,
        damped=record.n_damped,
        fallbacks=record.n_fallbacks,
        finite=record.finite,
    )
    return Part(coefficients, divided_sums(comm, value), numbers, batch.step)
