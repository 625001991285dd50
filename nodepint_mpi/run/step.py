"""One optimiser step and one evaluation, each a single jitted function per rank.

The step walks: encode on the first rank - solve in parallel - loss where the observations fall -
adjoint in parallel - encoder's pull-back on the first rank - one sum over ranks - update.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from nodepint_mpi.core.networks import EncodeProcessDecode, as_numbers
from nodepint_mpi.core.objective import Loss, Mean, nothing, per_sample
from nodepint_mpi.core.observations import BlockObservations
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.types import Block
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.differentiate import TimeSolver, linearise_solve, solve_block
from nodepint_mpi.parallel.exchange import sum_over_ranks
from nodepint_mpi.parallel.methods import Memory


class TrainState(NamedTuple):
    """What a step changes. Parameters and optimiser state are equal on all ranks.

    With a warm start, `ends` and `lefts` are the interface states and cotangents of the owned
    slices after the last step, (owned, samples, *state), and `memory` is what the method has
    learned, such as a basis with its tangents; None before the first.
    """

    params: PyTree[Array]
    opt_state: PyTree
    ends: Block | None = None
    lefts: Block | None = None
    memory: Memory | None = None


class StepReport(NamedTuple):
    """Numbers of one step, equal on all ranks."""

    loss: Array
    grad_norm: Array
    sweeps: Array
    jump: Array
    adjoint_sweeps: Array
    adjoint_residual: Array
    guarded: Array
    damped: Array
    fallbacks: Array
    fine_solves: Array
    tangents: Array
    finite: Array


class WarmStart(NamedTuple):
    """Where the next step may start from; see `TrainState`."""

    ends: Block | None
    lefts: Block | None
    memory: Memory | None


class LineProblem(NamedTuple):
    """What a line of ranks computes with: model, solver, observations and loss."""

    comm: TimeComm
    static: EncodeProcessDecode
    solver: TimeSolver
    observations: BlockObservations
    loss: Loss
    metrics: dict[str, Loss]


def split_model(model: EncodeProcessDecode) -> tuple[PyTree, PyTree]:
    """Trainable arrays and everything else. Local."""
    return eqx.partition(model, eqx.is_inexact_array)


def batched_field(static: PyTree) -> Callable:
    """The processor as a vector field of a batch, with its parameters as `args`. Local."""

    def field(t, u, params):
        processor = eqx.combine(params, static)
        return jax.vmap(lambda sample: processor(t, sample, None))(u)

    return field


def make_train_step(
    problem: LineProblem, optimiser: optax.GradientTransformation, *, warm_start: bool
) -> Callable:
    """Make the jitted step `(state, inputs, targets) -> (state, report)`.

    Local to make; the step is collective over the line, and consumes the state it is given. With
    a warm start it is compiled twice: the first step has nothing to start from.
    """

    def step(state: TrainState, inputs: Array, targets: Array):
        gradient, report, warm = loss_and_gradient(problem, state, inputs, targets)
        updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        kept = warm if warm_start else WarmStart(None, None, None)
        return TrainState(params, opt_state, *kept), report

    return jax.jit(step, donate_argnums=0)


def loss_and_gradient(
    problem: LineProblem, state: TrainState, inputs: Array, targets: Array
) -> tuple[PyTree[Array], StepReport, WarmStart]:
    """The loss of a batch and its gradient, summed over the ranks.

    Collective over the line, inside jit. Also returns where the next step may start from: the
    fine ends of the owned slices and, but for a serial solve, the cotangents at their left edges
    and what the method learned.
    """
    comm, params, owned = problem.comm, state.params, problem.observations.owned
    initial, pull_back_encoder = _encode(problem, params, inputs)
    solver = problem.solver
    solved = linearise_solve(
        comm, solver, params.processor, initial, state.ends, owned, state.memory
    )
    local_sum, pull_back_loss, local_count = jax.vjp(
        lambda params, result: _local_loss(problem, params, result, targets),
        params,
        solved.line.result,
        has_aux=True,
    )
    count = sum_over_ranks(comm, local_count)
    gradient, sources = pull_back_loss(1 / count)
    adjoint = solved.line.pull_back(sources, state.lefts)
    gradient = eqx.tree_at(
        lambda g: g.processor,
        gradient,
        jax.tree.map(jnp.add, gradient.processor, adjoint.params),
    )
    if pull_back_encoder is not None:
        (from_encoder,) = pull_back_encoder(adjoint.initial)
        gradient = jax.tree.map(jnp.add, gradient, from_encoder)
    loss, gradient = sum_over_ranks(comm, (local_sum / count, gradient))
    grad_norm = optax.tree.norm(gradient)
    finite = solved.record.finite & adjoint.record.finite
    report = StepReport(
        loss=loss,
        grad_norm=grad_norm,
        sweeps=solved.record.n_sweeps,
        jump=solved.jump,
        adjoint_sweeps=adjoint.record.n_sweeps,
        adjoint_residual=adjoint.record.residual,
        guarded=solved.record.n_guarded,
        damped=solved.record.n_damped,
        fallbacks=solved.record.n_fallbacks,
        fine_solves=solved.record.n_fine,
        tangents=solved.record.n_tangents,
        finite=finite & jnp.isfinite(loss) & jnp.isfinite(grad_norm),
    )
    memory = (
        None
        if solved.memory is None
        else solver.method.recalled(*solver.method.kept(solved.memory))
    )
    return gradient, report, WarmStart(solved.line.result.end, adjoint.lefts, memory)


def make_evaluation(problem: LineProblem) -> Callable:
    """Make the jitted `(params, inputs, targets) -> {name: Mean}`; sums over all ranks.

    Local to make; the evaluation is collective over the line.
    """

    def evaluate(params: PyTree, inputs: Array, targets: Array) -> dict[str, Mean]:
        result = _forward(problem, params, inputs)
        functions = {"loss": problem.loss, **problem.metrics}
        local = {
            name: _compare(problem, params, result, targets, function)
            for name, function in functions.items()
        }
        return sum_over_ranks(problem.comm, local)

    return jax.jit(evaluate)


def make_prediction(problem: LineProblem) -> Callable:
    """Make the jitted `(params, inputs) -> predictions` at this rank's observations.

    Local to make; the prediction is collective over the line. (seen, samples, *prediction)
    """

    def predict(params: PyTree, inputs: Array) -> Array:
        result = _forward(problem, params, inputs)
        model = eqx.combine(params, problem.static)
        return per_sample(model.decoder)(problem.observations.read(result))

    return jax.jit(predict)


def _forward(problem: LineProblem, params: PyTree, inputs: Array) -> SliceResult:
    initial, _ = _encode(problem, params, inputs)
    owned = problem.observations.owned
    return solve_block(problem.comm, problem.solver, params.processor, initial, owned)


def _encode(problem: LineProblem, params: PyTree, inputs: Array):
    """Initial states on the first rank, where alone they are read, and their pull-back."""

    def encode(params):
        return jax.vmap(eqx.combine(params, problem.static).encoder)(as_numbers(inputs))

    if problem.comm.rank == 0:
        return jax.vjp(encode, params)
    shape = jax.eval_shape(encode, params)
    return jnp.zeros(shape.shape, shape.dtype), None


def _local_loss(problem, params, result, targets) -> tuple[Array, Array]:
    mean = _compare(problem, params, result, targets, problem.loss)
    return mean.sum, mean.count


def _compare(problem, params, result, targets, function: Loss) -> Mean:
    """A loss or metric over the observations in this rank's block."""
    observations = problem.observations
    if len(observations.indices) == 0:
        return nothing(result.end)
    model = eqx.combine(params, problem.static)
    predictions = per_sample(model.decoder)(observations.read(result))
    wanted = jnp.moveaxis(jnp.asarray(targets)[:, np.asarray(observations.indices)], 1, 0)
    return function(predictions, wanted)
