"""Losses for which nothing is solved: then the ranks of a line share its samples.

Without a trajectory, nothing can be done parallel in time: all ranks of the grid are data-parallel.
"""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.batch import SampleBatch, as_numbers
from nodepint_mpi.core.by_name import call
from nodepint_mpi.core.keys import EVALUATION
from nodepint_mpi.core.objective import Loss, Mean, SimulationFree
from nodepint_mpi.data.samples import Samples
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.training.batch_model import sample_keys
from nodepint_mpi.training.line_problem import LineProblem


def mean_of_samples(problem: LineProblem, params: PyTree, batch: SampleBatch) -> Mean:
    """The loss of this rank's share of its line's samples. Local, inside jit."""
    assert isinstance(problem.loss, SimulationFree)  # the caller has looked
    share, weights = _own_share(problem, batch)
    if share.step is None:
        share = share._replace(step=jnp.asarray(EVALUATION))
    offered = {"batch": share, "key": sample_keys(problem.seed, share)}
    values = call(problem.loss.function, eqx.combine(params, problem.static), offered=offered)
    return Mean(jnp.sum(jnp.where(weights > 0, weights * values, 0.0)), jnp.sum(weights))


def linearize_mean(
    problem: LineProblem, params: PyTree, batch: SampleBatch
) -> tuple[Mean, PyTree[Array]]:
    """This rank's part of the loss, and of its gradient times the count. Local, inside jit."""

    def of_params(params):
        mean = mean_of_samples(problem, params, batch)
        return mean.sum, mean

    (_, mean), gradient = jax.value_and_grad(of_params, has_aux=True)(params)
    return mean, gradient


def check_sections(config: Config, samples: Samples, metrics: Mapping[str, Loss]) -> None:
    """Refuse what has no meaning where nothing is solved, or what the loss does not see. Local.

    Raises:
        ConfigError: with the key to remove.
    """
    section, time, random = samples.section, config.time, config.optim.random_basis
    refused = {
        "time.tracking": time.tracking is not None,
        "time.relaxation": time.relaxation is not None,
        "data.inputs": section.inputs is not None,
        "run.basis_ranks": config.run.basis_ranks > 1 and random is None,
        "optim.random_basis.by": random is not None and random.by == "tangents",
    }
    for key, given in refused.items():
        if given:
            raise ConfigError(
                f"The loss {_name(config)!r} solves nothing in training: remove `{key}`."
            )
    if section.weights is not None and section.times is not None:
        raise ConfigError(
            f"The loss {_name(config)!r} is one number for each sample and does not weigh "
            "observations: remove `data.weights`."
        )
    if metrics:
        raise ConfigError(
            f"The loss {_name(config)!r} makes no predictions, which `loss.metrics` compare: "
            "remove them."
        )


def _name(config: Config) -> str:
    return "" if config.loss is None else config.loss.name


def _own_share(problem: LineProblem, batch: SampleBatch) -> tuple[SampleBatch, Array]:
    """This rank's samples of those of its line, and their weights: equally many on all ranks, of
    which some at the end may be of no weight."""
    n_samples, comm = len(batch.rows), problem.comm
    size = -(-n_samples // comm.size)
    rows = comm.rank * size + np.arange(size)
    own = np.minimum(rows, n_samples - 1)
    shared = batch._replace(
        step=None,
        reads=None,
        at_edges=None,
        known=None,
        initial=as_numbers(jnp.asarray(batch.initial)),
    )
    share = jax.tree.map(lambda x: jnp.asarray(x)[own], shared)
    weights = jnp.asarray(rows < n_samples, jnp.zeros(()).dtype)
    if share.weights is not None:
        weights = weights * share.weights[:, 0]
    return share._replace(step=batch.step), weights
