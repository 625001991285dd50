"""One optimizer step: jitted programs of each rank.

The step walks: encode on the first rank - solve in parallel - loss where the observations fall -
adjoint in parallel - encoder's pull-back on the first rank - one sum over ranks - update.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.objective import SimulationFree
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.relaxation import RelaxedParams
from nodepint_mpi.core.sample_params import SampleParams
from nodepint_mpi.parallel.counters import counting
from nodepint_mpi.parallel.differentiate import linearize_solve
from nodepint_mpi.parallel.exchange import sum_over_ranks
from nodepint_mpi.parallel.methods.base import Carry
from nodepint_mpi.parallel.warm_start import follow
from nodepint_mpi.training.batch_model import (
    terms_of_loss,
)
from nodepint_mpi.training.block_loss import linearize_loss
from nodepint_mpi.training.line_problem import LineProblem, encode_initial, field_params
from nodepint_mpi.training.simulation_free import linearize_mean


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
    if isinstance(problem.loss, SimulationFree):
        return _simulation_free(problem, params, batch)
    comm = problem.comm
    initial, pull_back_encoder = encode_initial(problem, params, batch)
    of_field = field_params(problem, params, batch, weight)
    solved = linearize_solve(problem.line(of_field), problem.solver, initial)
    loss_sum, pull_back_loss, count = linearize_loss(problem, params, solved.at.result, batch)
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


def _simulation_free(
    problem: LineProblem, params: PyTree, batch: SampleBatch
) -> tuple[PyTree[Array], StepReport]:
    """The same where nothing is solved. Collective, inside jit."""
    mean, gradient = linearize_mean(problem, params, batch)
    count = sum_over_ranks(problem.comm, mean.count)
    gradient = jax.tree.map(lambda part: part / count, gradient)
    loss, gradient = _with_terms(problem, params, batch, mean.sum / count, gradient, 1.0)
    loss, gradient = sum_over_ranks(problem.comm, (loss, gradient))
    grad_norm, none = optax.tree.norm(gradient), jnp.array(0)
    zero = jnp.zeros_like(loss)
    return gradient, StepReport(
        loss=loss,
        grad_norm=grad_norm,
        sweeps=none,
        jump=zero,
        adjoint_sweeps=none,
        adjoint_residual=zero,
        guarded=none,
        damped=none,
        fallbacks=none,
        finite=jnp.isfinite(loss) & jnp.isfinite(grad_norm),
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
    initial, pull_back_encoder = encode_initial(problem, params, batch)

    def read_loss(result: SliceResult):
        loss_sum, pull_back, count = linearize_loss(problem, params, result, batch)
        gradient, sources = pull_back(jnp.ones_like(loss_sum))
        return sources, (loss_sum, count, gradient)

    of_field = field_params(problem, params, batch, weight)
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


def _with_terms(problem: LineProblem, params: PyTree, batch, loss, gradient, scale):
    """Loss and gradient of this rank with the terms, which the first rank of a line adds."""
    if not problem.terms or problem.comm.rank != 0:
        return loss, gradient

    def added(params):
        model = eqx.combine(params, problem.static)
        return terms_of_loss(problem.terms, model, batch, problem.seed) / problem.comm.n_groups

    value, of_terms = jax.value_and_grad(added)(params)
    return loss + scale * value, jax.tree.map(lambda a, b: a + scale * b, gradient, of_terms)


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
