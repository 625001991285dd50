"""Jitted programs that update nothing: scores, predictions, and a serial look at a step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.objective import Mean, SimulationFree
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.sweeps import slices_finite
from nodepint_mpi.parallel.adjoint import pull_back_walk
from nodepint_mpi.parallel.differentiate import solve_block
from nodepint_mpi.parallel.exchange import sum_over_ranks
from nodepint_mpi.parallel.methods.serial import walk_linearized
from nodepint_mpi.training.block_loss import compare, decode_states, linearize_loss, read_states
from nodepint_mpi.training.encoder import encode_initial
from nodepint_mpi.training.line_problem import LineProblem, field_params
from nodepint_mpi.training.simulation_free import mean_of_samples


class Walked(NamedTuple):
    """What is finite in a serial step: the first state, the ends of the slices of this rank, its
    part of the loss, and the cotangent that leaves it to the left."""

    initial: Bool[Array, ""]
    ends: Bool[Array, " owned"]
    loss: Bool[Array, ""]
    cotangent: Bool[Array, ""]


def make_evaluation(problem: LineProblem, *, predicts: bool = False) -> Callable:
    """Make the jitted `(params, batch, counted) -> ({name: Mean}, predictions)`; sums over ranks.

    Local to make; the evaluation is collective over the grid. What is not `counted` adds nothing.
    Where it `predicts`, it also returns what `make_prediction` does, else None: one program that
    solves, in place of two.
    """

    def scores(params: PyTree, batch: SampleBatch) -> tuple[dict[str, Mean], Array | None]:
        if isinstance(problem.loss, SimulationFree) and not predicts:
            return {"loss": mean_of_samples(problem, params, batch)}, None
        result = _forward(problem, params, batch)
        seen = None
        if predicts:
            seen = decode_states(problem, params, read_states(problem, result, batch), batch)
        if isinstance(problem.loss, SimulationFree):
            return {"loss": mean_of_samples(problem, params, batch)}, seen
        functions = {"loss": problem.loss, **problem.metrics}
        means = {
            name: compare(problem, params, result, batch, function)
            for name, function in functions.items()
        }
        return means, seen

    def evaluate(params: PyTree, batch: SampleBatch, counted: Array):
        local, seen = scores(params, batch)
        local = jax.tree.map(lambda part: jnp.where(counted, part, jnp.zeros_like(part)), local)
        return sum_over_ranks(problem.comm, local), seen

    return jax.jit(evaluate)


def make_prediction(problem: LineProblem) -> Callable:
    """Make the jitted `(params, batch) -> predictions` at this rank's observations.

    Local to make; the prediction is collective over the line. (seen, samples, *prediction)
    """

    def predict(params: PyTree, batch: SampleBatch) -> Array:
        result = _forward(problem, params, batch)
        return decode_states(problem, params, read_states(problem, result, batch), batch)

    return jax.jit(predict)


def make_walk(problem: LineProblem) -> Callable:
    """Make the jitted `(params, batch, weight) -> Walked`: a step, but serially.

    Local to make; the walk is collective over the line. For a look at a step that went wrong.
    """

    def walk(params: PyTree, batch: SampleBatch, weight: Array | None) -> Walked:
        initial, _ = encode_initial(problem, params, batch)
        of_field = field_params(problem, params, batch, weight)
        line = problem.line(of_field)
        walked = walk_linearized(line, problem.solver.fine, initial)
        loss, pull_back, _ = linearize_loss(problem, params, walked.result, batch)
        _, sources = pull_back(jnp.ones_like(loss))
        gradient = pull_back_walk(line, walked, sources)
        finite = [jnp.all(jnp.isfinite(one)) for one in (initial, loss, gradient.initial)]
        return Walked(finite[0], slices_finite(walked.result.end), *finite[1:])

    return jax.jit(walk)


def _forward(problem: LineProblem, params: PyTree, batch: SampleBatch) -> SliceResult:
    initial, _ = encode_initial(problem, params, batch)
    of_field = field_params(problem, params, batch, None)
    return solve_block(problem.line(of_field), problem.solver, initial)
