"""Enlarging the network between two optimizer steps."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nodepint_mpi.build.optimizers import restart_average
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.models.growth import enlarge, sample_directions
from nodepint_mpi.models.networks import LinearMap
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.training.batch_model import split_model
from nodepint_mpi.training.setup import Experiment, at_step
from nodepint_mpi.training.train_state import TrainState

_log = logging.getLogger(__name__)


def grow(
    comms: Comms, experiment: Experiment, state: TrainState, samples: np.ndarray, step: int
) -> tuple[Experiment, TrainState]:
    """Experiment and state with the network that `step` is taken with. Collective over `comms`.

    Weights and the optimizer's moments are carried over; new moments are zero, and an average of
    parameters starts anew. New directions of
    a dense network are those in which the targets of `samples`, row numbers, lie outside the old
    ones. Interface states and the method's memory are those of another state: the next step starts
    anew.

    Raises:
        ConfigError: on all ranks, if the optimizer keeps arrays of other shapes than parameters.
    """
    control = comms.control
    opt_state = experiment.update.whole(state.opt_state)
    with together(control):
        grown = at_step(experiment, step)
        fresh, _ = split_model(grown.model)
        old, directions = state.params, None
        if isinstance(old.encoder, LinearMap):
            n_new = fresh.encoder.matrix.shape[0] - old.encoder.matrix.shape[0]
            if control.rank == 0:  # one factorization, so that all ranks have the same bits
                rows = np.asarray(old.encoder.matrix, float)
                batch = experiment.train.take(samples)
                seen = np.asarray(batch.targets, float).reshape(-1, rows.shape[1])
                if batch.mask is not None:  # only what was observed whole
                    seen = seen[np.asarray(batch.mask).reshape(seen.shape).all(axis=1)]
                key = jax.random.fold_in(jax.random.key(experiment.config.run.seed), step)
                directions = sample_directions(rows, seen, n_new, key)
    directions = control.bcast(directions)
    with together(control):
        new = None if directions is None else jnp.asarray(directions)
        params, places = enlarge(old, fresh, new)
        moments = optax.tree.map_params(
            experiment.update.optimizer,
            lambda leaf, place: leaf if _is_masked(leaf) else place.place(leaf),
            opt_state,
            places,
            is_leaf=_is_masked,
        )
        wanted = grown.update.shapes()["opt_state"]
        shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (moments, wanted)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f'`optim.name = "{experiment.config.optim.name}"` keeps arrays of other shapes '
                "than the parameters, which `[growth]` cannot carry over: take another, such as "
                "adam."
            )
        opt_state = jax.tree.unflatten(jax.tree.structure(wanted), jax.tree.leaves(moments))
        opt_state = grown.update.held.cut(restart_average(opt_state, params))
    if control.rank == 0:
        sizes = [tree.shape[-1] for tree in (experiment.state, grown.state)]
        _log.info("step %d: the state grows from %d to %d", step, *sizes)
    return grown, TrainState(params, opt_state)


def _is_masked(leaf: object) -> bool:
    """Whether a parameter is in another group of the optimizer's."""
    return isinstance(leaf, optax.MaskedNode)
