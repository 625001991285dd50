"""One optimizer step and one evaluation: jitted programs of each rank.

The step walks: encode on the first rank - solve in parallel - loss where the observations fall -
adjoint in parallel - encoder's pull-back on the first rank - one sum over ranks - update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree

from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.by_name import call
from nodepint_mpi.core.exogenous import Interpolation
from nodepint_mpi.core.keys import keys_as_numbers
from nodepint_mpi.core.objective import Loss, Mean, Term, nothing, per_sample
from nodepint_mpi.core.observations import BlockObservations
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.relaxation import RelaxedParams
from nodepint_mpi.core.sample_params import SampleParams
from nodepint_mpi.core.sweeps import slices_finite
from nodepint_mpi.models.networks import EncodeProcessDecode, as_numbers
from nodepint_mpi.parallel.adjoint import pull_back_walk
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import counting
from nodepint_mpi.parallel.differentiate import linearize_solve, solve_block
from nodepint_mpi.parallel.exchange import sum_over_ranks
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import Carry
from nodepint_mpi.parallel.methods.serial import walk_linearized
from nodepint_mpi.parallel.warm_start import follow
from nodepint_mpi.training.batch_model import (
    decode,
    encode,
    offered_to_loss,
    sample_keys,
    takes_key,
    terms_of_loss,
)


class TrainState(NamedTuple):
    """What the optimizer changes, equal on all ranks."""

    params: PyTree[Array]
    opt_state: PyTree


class StepReport(NamedTuple):
    """Numbers of one step, equal on all ranks.

    `jump` and `adjoint_residual` are the largest of them, absolute and relative to the largest
    cotangent; in a tracked step both are root mean squares relative to the states and cotangents.
    """

    loss: Array
    grad_norm: Array
    sweeps: Array
    jump: Array
    adjoint_sweeps: Array
    adjoint_residual: Array
    guarded: Array
    damped: Array
    fallbacks: Array
    finite: Array


class Stepped(NamedTuple):
    """A step's result: the new state, the gradient it was made with, its numbers and its work.

    `tally` counts what this rank did, a `Tally` as an array.
    """

    state: TrainState
    gradient: PyTree[Array]
    report: StepReport
    tally: Array


class Tracked(NamedTuple):
    """A tracked step's result; with what the next one starts from, and the cotangents' norm over
    the gradient's.

    The smaller a gradient is that large cotangents add up to, the more their errors count.
    """

    state: TrainState
    gradient: PyTree[Array]
    report: StepReport
    tally: Array
    carry: Carry
    magnification: Array


class Walked(NamedTuple):
    """What is finite in a serial step: the first state, the ends of the slices of this rank, its
    part of the loss, and the cotangent that leaves it to the left."""

    initial: Bool[Array, ""]
    ends: Bool[Array, " owned"]
    loss: Bool[Array, ""]
    cotangent: Bool[Array, ""]


class LineProblem(NamedTuple):
    """What a line of ranks computes with: model, solver, observations and loss.

    `edge_weights` (edges, times), for relaxed continuity, gives the data at the slice boundaries of
    samples without gaps. `interpolation` is that of inputs over time, `terms` are added to the
    loss, and `seed` is that of random keys.
    """

    comm: TimeComm
    static: EncodeProcessDecode
    solver: TimeSolver
    observations: BlockObservations
    loss: Loss
    metrics: dict[str, Loss]
    edge_weights: np.ndarray | None = None
    interpolation: Interpolation = "linear"
    terms: tuple[Term, ...] = ()
    seed: int = 0

    def line(self, of_field: PyTree[Array]) -> Line:
        """The line, with these parameters of the vector field. Local."""
        return Line(self.comm, self.observations.owned, of_field)


def apply_gradient(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: PyTree[Array]
) -> TrainState:
    """The optimizer step. Local."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state)


class TrainStep:
    """A step in two jitted programs, one for the gradient and one for the update. Collective.

    The ranks of a line compile different programs for their parts of the gradient. An update that
    XLA fuses with them rounds differently on each, and the parameters drift apart; on its own it is
    the same program on all ranks.
    """

    def __init__(self, solve: Any, optimizer: optax.GradientTransformation, kind: type):
        """Local. `solve` takes parameters and what the step takes, and returns the gradient and
        what follows it in `kind`, `Stepped` or `Tracked`."""

        def update_step(state: TrainState, gradient: PyTree[Array]) -> TrainState:
            return apply_gradient(optimizer, state, gradient)

        self._solve, self._update, self._kind = solve, jax.jit(update_step), kind

    def __call__(self, state: TrainState, *args: Any) -> Any:
        """The step's result, on what the step takes besides its state."""
        gradient, *rest = self._solve(state.params, *args)
        return self._kind(self._update(state, gradient), gradient, *rest)

    def _cache_size(self) -> int:
        """How often the gradient has been compiled, as a jitted function says it."""
        return self._solve._cache_size()


def make_train_step(problem: LineProblem, optimizer: optax.GradientTransformation) -> TrainStep:
    """Make the step `(state, batch, weight) -> Stepped`, which solves anew.

    Local to make; the step is collective over the line. `weight` is that of continuity, for a
    relaxed solve, or None.
    """

    def step(params: PyTree, batch: SampleBatch, weight: Array | None):
        with counting() as ledger:
            gradient, report = loss_and_gradient(problem, params, batch, weight)
        return gradient, report, ledger.tally.as_array()

    return TrainStep(jax.jit(step), optimizer, Stepped)


def make_tracked_step(problem: LineProblem, optimizer: optax.GradientTransformation) -> TrainStep:
    """Make the step `(state, carry, batch, weight) -> Tracked`.

    Local to make; the step is collective over the line. One forward and one adjoint sweep, from
    what the last ones left; it consumes the carry.
    """

    def tracked_step(  # a name of its own in XLA's profile, beside `step`
        params: PyTree, carry: Carry, batch: SampleBatch, weight: Array | None
    ):
        with counting() as ledger:
            gradient, report, carry, magnification = tracked_gradient(
                problem, params, carry, batch, weight
            )
        return gradient, report, ledger.tally.as_array(), carry, magnification

    return TrainStep(jax.jit(tracked_step, donate_argnums=1), optimizer, Tracked)


def loss_and_gradient(
    problem: LineProblem,
    params: PyTree,
    batch: SampleBatch,
    weight: Array | None = None,
) -> tuple[PyTree[Array], StepReport]:
    """The loss of a batch and its gradient, summed over the ranks. Collective, inside jit.

    With a `weight` of continuity the solve is a relaxed one.
    """
    comm = problem.comm
    initial, pull_back_encoder = _encode(problem, params, batch)
    of_field = _field_params(problem, params, batch, weight)
    solved = linearize_solve(problem.line(of_field), problem.solver, initial)
    loss_sum, pull_back_loss, count = _linearize_loss(problem, params, solved.at.result, batch)
    count = sum_over_ranks(comm, count)
    gradient, sources = pull_back_loss(1 / count)
    adjoint = solved.at.pull_back(sources)
    gradient = _whole_gradient(gradient, adjoint.params, adjoint.initial, pull_back_encoder)
    loss, gradient = _with_terms(problem, params, batch, loss_sum / count, gradient, 1.0)
    loss, gradient = sum_over_ranks(comm, (loss, gradient))
    grad_norm = optax.tree.norm(gradient)
    finite = solved.record.finite & adjoint.record.finite
    return gradient, StepReport(
        loss=loss,
        grad_norm=grad_norm,
        sweeps=solved.record.n_sweeps,
        jump=solved.jump,
        adjoint_sweeps=adjoint.record.n_sweeps,
        adjoint_residual=adjoint.record.residual,
        guarded=solved.record.n_guarded,
        damped=solved.record.n_damped,
        fallbacks=solved.record.n_fallbacks,
        finite=finite & jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(solved.jump),
    )


def tracked_gradient(
    problem: LineProblem,
    params: PyTree,
    carry: Carry,
    batch: SampleBatch,
    weight: Array | None = None,
) -> tuple[PyTree[Array], StepReport, Carry, Array]:
    """The same from one sweep each way, as near as what is carried. Collective, inside jit.

    One fine solve and one pull-back of the owned slices, all at once; the carry returned is of
    this batch and these parameters. See `Tracked`.
    """
    initial, pull_back_encoder = _encode(problem, params, batch)

    def read_loss(result: SliceResult):
        loss_sum, pull_back, count = _linearize_loss(problem, params, result, batch)
        gradient, sources = pull_back(jnp.ones_like(loss_sum))
        return sources, (loss_sum, count, gradient)

    of_field = _field_params(problem, params, batch, weight)
    followed, (loss_sum, count, gradient) = follow(
        problem.line(of_field), problem.solver, initial, carry, read_loss
    )
    gradient = _whole_gradient(gradient, followed.params, followed.initial, pull_back_encoder)
    if problem.terms:
        whole = sum_over_ranks(problem.comm, count)  # by which all is divided below
        loss_sum, gradient = _with_terms(problem, params, batch, loss_sum, gradient, whole)
    total, count, gradient, misfits = sum_over_ranks(
        problem.comm, (loss_sum, count, gradient, followed.misfits)
    )
    # The loss is linear in its sum over observations, so all is divided by their number at last.
    gradient = jax.tree.map(lambda part: part / count, gradient)
    loss, grad_norm = total / count, optax.tree.norm(gradient)
    magnification = jnp.sqrt(misfits.cotangents) / (count * grad_norm)
    one, none = jnp.array(1), jnp.array(0)
    report = StepReport(
        loss=loss,
        grad_norm=grad_norm,
        sweeps=one,
        jump=misfits.jump(),
        adjoint_sweeps=one,
        adjoint_residual=misfits.residual(),
        guarded=none,
        damped=none,
        fallbacks=none,
        finite=jnp.isfinite(loss) & jnp.isfinite(grad_norm),
    )
    return gradient, report, followed.carry, magnification


def make_evaluation(problem: LineProblem) -> Callable:
    """Make the jitted `(params, batch, counted) -> {name: Mean}`; sums over all ranks.

    Local to make; the evaluation is collective over the grid. What is not `counted` adds nothing.
    """

    def evaluate(params: PyTree, batch: SampleBatch, counted: Array) -> dict[str, Mean]:
        result = _forward(problem, params, batch)
        functions = {"loss": problem.loss, **problem.metrics}
        local = {
            name: _compare(problem, params, result, batch, function)
            for name, function in functions.items()
        }
        local = jax.tree.map(lambda part: jnp.where(counted, part, jnp.zeros_like(part)), local)
        return sum_over_ranks(problem.comm, local)

    return jax.jit(evaluate)


def make_prediction(problem: LineProblem) -> Callable:
    """Make the jitted `(params, batch) -> predictions` at this rank's observations.

    Local to make; the prediction is collective over the line. (seen, samples, *prediction)
    """

    def predict(params: PyTree, batch: SampleBatch) -> Array:
        result = _forward(problem, params, batch)
        return _decode(problem, params, _read(problem, result, batch), batch)

    return jax.jit(predict)


def make_walk(problem: LineProblem) -> Callable:
    """Make the jitted `(params, batch, weight) -> Walked`: a step, but serially.

    Local to make; the walk is collective over the line. For a look at a step that went wrong.
    """

    def walk(params: PyTree, batch: SampleBatch, weight: Array | None) -> Walked:
        initial, _ = _encode(problem, params, batch)
        of_field = _field_params(problem, params, batch, weight)
        line = problem.line(of_field)
        walked = walk_linearized(line, problem.solver.fine, initial)
        loss, pull_back, _ = _linearize_loss(problem, params, walked.result, batch)
        _, sources = pull_back(jnp.ones_like(loss))
        gradient = pull_back_walk(line, walked, sources)
        finite = [jnp.all(jnp.isfinite(one)) for one in (initial, loss, gradient.initial)]
        return Walked(finite[0], slices_finite(walked.result.end), *finite[1:])

    return jax.jit(walk)


def _forward(problem: LineProblem, params: PyTree, batch: SampleBatch) -> SliceResult:
    initial, _ = _encode(problem, params, batch)
    of_field = _field_params(problem, params, batch, None)
    return solve_block(problem.line(of_field), problem.solver, initial)


def _encode(problem: LineProblem, params: PyTree, batch: SampleBatch):
    """Initial states on the first rank, where alone they are read, and their pull-back."""

    def of_params(params):
        return encode(eqx.combine(params, problem.static), batch, problem.seed)

    if problem.comm.rank == 0:
        return jax.vjp(of_params, params)
    shape = jax.eval_shape(of_params, params)
    return jnp.zeros(shape.shape, shape.dtype), None


def _linearize_loss(problem, params, result, batch):
    """This rank's part of the loss, its pull-back to parameters and result, and its count."""

    def local_loss(params, result) -> tuple[Array, Array]:
        mean = _compare(problem, params, result, batch, problem.loss)
        return mean.sum, mean.count

    return jax.vjp(local_loss, params, result, has_aux=True)


def _with_terms(problem: LineProblem, params: PyTree, batch, loss, gradient, scale):
    """Loss and gradient of this rank with the terms, which the first rank of a line adds."""
    if not problem.terms or problem.comm.rank != 0:
        return loss, gradient

    def added(params):
        model = eqx.combine(params, problem.static)
        return terms_of_loss(problem.terms, model, batch, problem.seed) / problem.comm.n_groups

    value, of_terms = jax.value_and_grad(added)(params)
    return loss + scale * value, jax.tree.map(lambda a, b: a + scale * b, gradient, of_terms)


def _field_params(problem: LineProblem, params: PyTree, batch: SampleBatch, weight: Array | None):
    """Parameters of the vector field, with what the samples bring; for a relaxed solve with the
    data at the slice edges."""
    of_field, keys = params.processor, None
    if takes_key(problem.static.processor):
        keys = sample_keys(problem.seed, batch)
    if not (batch.reads is None and batch.signal is None and batch.static is None and keys is None):
        static = None if batch.static is None else as_numbers(jnp.asarray(batch.static))
        times = None if batch.reads is None else jnp.asarray(batch.reads.times)
        signal = None if batch.signal is None else jax.tree.map(jnp.asarray, batch.signal)
        first = problem.observations.owned.first
        keys = None if keys is None else keys_as_numbers(keys)
        of_field = SampleParams(of_field, times, signal, static, keys, first, problem.interpolation)
    if weight is None:
        return of_field
    if batch.at_edges is None:
        assert problem.edge_weights is not None  # made for it
        observed = jnp.einsum(
            "et,bt...->eb...", jnp.asarray(problem.edge_weights), as_numbers(batch.targets)
        )
    else:
        observed = as_numbers(jnp.asarray(batch.at_edges))
    states = per_sample(eqx.combine(params, problem.static).encoder)(observed)
    known = None if batch.known is None else as_numbers(jnp.asarray(batch.known))
    if known is not None:  # what is not known may be no number once it is encoded
        there = known.reshape(*known.shape, *[1] * (states.ndim - 2)) > 0
        states = jnp.where(there, states, 0.0)
    return RelaxedParams(of_field, weight, jax.lax.stop_gradient(states), known)


def _whole_gradient(from_loss, field_bar, initial_bar, pull_back_encoder):
    """This rank's parts of the gradient: decoder, processor, and on the first rank encoder."""
    if isinstance(field_bar, RelaxedParams):
        field_bar = field_bar.field
    processor_bar = field_bar.params if isinstance(field_bar, SampleParams) else field_bar
    added = jax.tree.map(jnp.add, from_loss.processor, processor_bar)
    gradient = eqx.tree_at(lambda g: g.processor, from_loss, added)
    if pull_back_encoder is None:
        return gradient
    (from_encoder,) = pull_back_encoder(initial_bar)
    return jax.tree.map(jnp.add, gradient, from_encoder)


def _read(problem: LineProblem, result: SliceResult, batch: SampleBatch) -> Array:
    """States at this rank's observation times, (seen, samples, *state)."""
    if batch.reads is None:
        return problem.observations.read(result)
    states = jnp.concatenate([result.saves, result.end[:, None]], axis=1)
    samples = jnp.arange(states.shape[2])
    return states[jnp.asarray(batch.reads.slices), jnp.asarray(batch.reads.slots), samples[None]]


def _decode(problem: LineProblem, params: PyTree, states: Array, batch: SampleBatch) -> Array:
    return decode(eqx.combine(params, problem.static), states, batch, problem.seed)


def _compare(
    problem: LineProblem, params: PyTree, result: SliceResult, batch: SampleBatch, function: Loss
) -> Mean:
    """A loss or metric over the observations in this rank's block."""
    if batch.reads is None:
        columns = np.asarray(problem.observations.indices)

        def seen(array):  # (samples, times, ...) to (seen, samples, ...)
            return jnp.moveaxis(jnp.asarray(array)[:, columns], 1, 0)

        mask = None if batch.mask is None else seen(batch.mask)
    else:
        columns = jnp.asarray(batch.reads.columns)
        samples = jnp.arange(columns.shape[1])[None]

        def seen(array):
            return jnp.asarray(array)[samples, columns]

        valid = jnp.asarray(batch.reads.valid)
        shape = (*valid.shape, *jnp.shape(batch.targets)[2:])
        mask = jnp.broadcast_to(valid.reshape(*valid.shape, *[1] * (len(shape) - 2)), shape)
        mask = mask if batch.mask is None else mask & seen(batch.mask)
    model, targets = eqx.combine(params, problem.static), jnp.asarray(batch.targets)
    if batch.reads is None and len(problem.observations.indices) == 0:
        states = result.end[:1]
        like = jax.eval_shape(lambda u: _decode(problem, params, u, batch), states)
        first = np.array([0])

        def at_first(array):
            return jnp.moveaxis(jnp.asarray(array)[:, first], 1, 0)

        offered = offered_to_loss(model, batch, at_first, None, problem.seed)
        if batch.mask is not None:
            offered["mask"] = at_first(batch.mask)
        return nothing(
            lambda made, wanted: call(function, made, wanted, offered=offered),
            like,
            jnp.moveaxis(targets[:, :1], 1, 0),
        )
    predictions = _decode(problem, params, _read(problem, result, batch), batch)
    offered = offered_to_loss(model, batch, seen, mask, problem.seed)
    return call(function, predictions, seen(targets), offered=offered)
