"""One optimizer step: jitted programs of each rank.

The step walks: encode on the first rank - solve in parallel - loss where the observations fall -
adjoint in parallel - encoder's pull-back on the first rank; then, in a program of its own, one sum
over ranks - update (`training.update`).
"""

import functools
from collections.abc import Callable
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
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, counting
from nodepint_mpi.parallel.differentiate import linearize_solve
from nodepint_mpi.parallel.exchange import sum_over_ranks
from nodepint_mpi.parallel.methods.base import Carry
from nodepint_mpi.parallel.warm_start import follow
from nodepint_mpi.training.batch_model import (
    terms_of_loss,
)
from nodepint_mpi.training.block_loss import linearize_loss
from nodepint_mpi.training.encoder import encode_initial
from nodepint_mpi.training.line_problem import LineProblem, field_params
from nodepint_mpi.training.part import Part, Solved, divided_sums
from nodepint_mpi.training.simulation_free import linearize_mean
from nodepint_mpi.training.tangent_part import tangent_part
from nodepint_mpi.training.train_state import Sums, TrainState, Updated
from nodepint_mpi.training.update import Update


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
    """A step's result: the new state, this rank's pieces of the gradient it was made with, its
    numbers and its work.

    `tally` counts what this rank did, a `Tally` as an array. The smaller a gradient is that large
    cotangents add up to, the more their errors count: `magnification` is the cotangents' norm over
    the gradient's, and `carry` what the next step starts from; both of tracked steps.
    """

    state: TrainState
    gradient: PyTree[Array]
    report: StepReport
    tally: Array
    carry: Carry | None = None
    magnification: Array | None = None


class TrainStep:
    """A step in two jitted programs, one for the gradient and one for the update. Collective.

    The ranks of a line compile different programs for their parts of the gradient. An update that
    XLA fuses with them would round differently on each, and the parameters drift apart.
    """

    def __init__(self, solve: Any, update: Update):
        """Local. `solve` takes parameters and what the step takes, and returns a `Part`, what was
        counted, and what the next step starts from."""
        self._solve, self._update = solve, update

    def __call__(self, state: TrainState, *args: Any) -> Stepped:
        """The step's result, on what the step takes besides its state."""
        part, tally, carry = self._solve(state.params, *args)
        state, gradient, (report, tally, magnification) = self._update(
            report_of, state, part.gradient, part.sums, part.solved, tally, step=part.step
        )
        return Stepped(state, gradient, report, tally, carry, magnification)

    def _cache_size(self) -> int:
        """How often the gradient has been compiled, as a jitted function says it."""
        return self._solve._cache_size()


def report_of(updated: Updated, solved: Solved, tally: Array) -> tuple[StepReport, Array, Array]:
    """Numbers of a step and its work, and how much its gradient magnifies errors. Local.

    Where nothing has been swept again, misfits are zero; where they were not looked at, too.
    """
    loss, grad_norm, misfits = updated.loss, updated.grad_norm, updated.misfits
    jump = solved.jump + misfits.jump()
    report = StepReport(
        loss,
        grad_norm,
        **solved._replace(
            jump=jump,
            adjoint_residual=solved.adjoint_residual + misfits.residual(),
            finite=solved.finite
            & jnp.isfinite(loss)
            & jnp.isfinite(grad_norm)
            & jnp.isfinite(jump),
        )._asdict(),
    )
    magnification = jnp.sqrt(misfits.cotangents) / (updated.divisor * grad_norm)
    return report, tally + updated.tally, magnification


def make_train_step(problem: LineProblem, update: Update) -> TrainStep:
    """Make the step `(state, batch, weight) -> Stepped`, which solves anew.

    Local to make; the step is collective over the grid. `weight` is that of continuity, for a
    relaxed solve, or None.
    """
    find_part = choose_part(problem, update)

    def step(params: PyTree, batch: SampleBatch, weight: Array | None):
        with counting() as ledger:
            part = find_part(params, batch, weight)
        return part, ledger.tally.as_array(), None

    return TrainStep(jax.jit(step), update)


def make_tracked_step(problem: LineProblem, update: Update) -> TrainStep:
    """Make the step `(state, carry, batch, weight) -> Stepped`.

    Local to make; the step is collective over the grid. One forward and one adjoint sweep, from
    what the last ones left; it consumes the carry.
    """

    def tracked_step(  # a name of its own in XLA's profile, beside `step`
        params: PyTree, carry: Carry, batch: SampleBatch, weight: Array | None
    ):
        with counting() as ledger:
            part, carry = tracked_part(problem, params, carry, batch, weight)
        return part, ledger.tally.as_array(), carry

    return TrainStep(jax.jit(tracked_step, donate_argnums=1), update)


def choose_part(problem: LineProblem, update: Update) -> Callable[..., Part]:
    """What finds the `Part` of parameters, batch and weight: by the adjoint, or by tangents.

    Local; what it returns is collective over the grid, inside jit.
    """
    descent = update.descent
    if descent is None or not descent.by_tangents:
        return functools.partial(gradient_part, problem)
    return functools.partial(tangent_part, problem, descent)


def gradient_part(
    problem: LineProblem,
    params: PyTree,
    batch: SampleBatch,
    weight: Array | None = None,
) -> Part:
    """This rank's part of a batch's loss and gradient. Collective over the grid, inside jit.

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
    record = solved.record
    numbers = Solved(
        sweeps=record.n_sweeps,
        jump=solved.jump,
        adjoint_sweeps=adjoint.record.n_sweeps,
        adjoint_residual=adjoint.record.residual,
        guarded=record.n_guarded,
        damped=record.n_damped,
        fallbacks=record.n_fallbacks,
        finite=record.finite & adjoint.record.finite,
    )
    return Part(gradient, divided_sums(comm, loss), numbers, batch.step)


def _simulation_free(problem: LineProblem, params: PyTree, batch: SampleBatch) -> Part:
    """The same where nothing is solved. Collective, inside jit."""
    mean, gradient = linearize_mean(problem, params, batch)
    count = sum_over_ranks(problem.comm, mean.count)
    gradient = jax.tree.map(lambda part: part / count, gradient)
    loss, gradient = _with_terms(problem, params, batch, mean.sum / count, gradient, 1.0)
    return Part(gradient, divided_sums(problem.comm, loss), Solved.of_sweep(0, loss), batch.step)


def tracked_part(
    problem: LineProblem,
    params: PyTree,
    carry: Carry,
    batch: SampleBatch,
    weight: Array | None = None,
) -> tuple[Part, Carry]:
    """The same from one sweep each way, as near as what is carried. Collective, inside jit.

    One fine solve and one pull-back of the owned slices, all at once; the carry returned is of
    this batch and these parameters.
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
        whole = sum_over_ranks(problem.comm, count)  # by which all is divided in the end
        loss_sum, gradient = _with_terms(problem, params, batch, loss_sum, gradient, whole)
    # The loss is linear in its sum over observations, so all is divided by their number at last.
    sums = Sums(loss_sum, jnp.asarray(count, loss_sum.dtype), followed.misfits)
    return Part(gradient, sums, Solved.of_sweep(1, loss_sum), batch.step), followed.carry


def summed(comm: TimeComm, part: Part) -> tuple[PyTree[Array], StepReport]:
    """Gradient and numbers of a step without an update. Collective over the grid, inside jit."""
    gradient, sums = sum_over_ranks(comm, (part.gradient, part.sums))
    gradient = jax.tree.map(lambda part: part / sums.divisor, gradient)
    loss, norm, nothing = sums.loss / sums.divisor, optax.tree.norm(gradient), Tally().as_array()
    updated = Updated(None, gradient, loss, sums.divisor, norm, sums.misfits, nothing)
    return gradient, report_of(updated, part.solved, nothing)[0]


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
