"""The loss over the observations that fall into this rank's block of slices."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.by_name import call
from nodepint_mpi.core.objective import Loss, Mean, SimulationFree, nothing
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.scopes import LOSS
from nodepint_mpi.parallel.counters import work
from nodepint_mpi.training.batch_model import decode_paths, offered_to_loss
from nodepint_mpi.training.line_problem import LineProblem


def linearize_loss(
    problem: LineProblem, params: PyTree, result: SliceResult, batch: SampleBatch
) -> tuple[Array, Callable, Array]:
    """This rank's part of the loss, its pull-back to parameters and result, and its count.

    Local, inside jit.
    """

    loss = problem.loss
    assert not isinstance(loss, SimulationFree)  # which is computed without a solve

    def local_loss(params, result) -> tuple[Array, Array]:
        mean = compare(problem, params, result, batch, loss)
        return mean.sum, mean.count

    n_seen = len(problem.observations.indices if batch.reads is None else batch.reads.columns)
    with work(LOSS, observed=n_seen):
        return jax.vjp(local_loss, params, result, has_aux=True)


def read_states(problem: LineProblem, result: SliceResult, batch: SampleBatch) -> Array:
    """States at this rank's observation times, (seen, samples, *state). Local, inside jit."""
    if batch.reads is None:
        return problem.observations.read(result)
    states = jnp.concatenate([result.saves, result.end[:, None]], axis=1)
    samples = jnp.arange(states.shape[2])
    return states[jnp.asarray(batch.reads.slices), jnp.asarray(batch.reads.slots), samples[None]]


def decode_states(problem: LineProblem, params: PyTree, states: Array, batch: SampleBatch) -> Array:
    """Predictions of states (seen, samples, *paths, *state). Local, inside jit."""
    model, n_paths = eqx.combine(params, problem.static), problem.noise and problem.noise.n_paths
    return decode_paths(model, states, batch, problem.seed, n_paths)


def compare(
    problem: LineProblem, params: PyTree, result: SliceResult, batch: SampleBatch, function: Loss
) -> Mean:
    """A loss or metric over the observations in this rank's block. Local, inside jit."""
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
        like = jax.eval_shape(lambda u: decode_states(problem, params, u, batch), states)
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
    predictions = decode_states(problem, params, read_states(problem, result, batch), batch)
    offered = offered_to_loss(model, batch, seen, mask, problem.seed)
    return call(function, predictions, seen(targets), offered=offered)
