"""What an optimizer's step takes, changes and returns, in whichever way it is done."""

from typing import NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree

from nodepint_mpi.parallel.warm_start import Misfits


class TrainState(NamedTuple):
    """What the optimizer changes.

    Parameters are equal on all ranks. Of the optimizer's state a rank has its pieces: in the
    sharded way flat ones, (length,); else all on the first rank, and arrays without elements on the
    others. What the state holds besides arrays like parameters, such as a count, it has whole.
    """

    params: PyTree[Array]
    opt_state: PyTree


class Sums(NamedTuple):
    """What a step adds up over all ranks besides its gradient: of each its part.

    The gradient and the loss are divided by `divisor`, once it is summed.
    """

    loss: Array
    divisor: Array
    misfits: Misfits


class Updated(NamedTuple):
    """The new state, this rank's pieces of the gradient, and what was summed, equal on all ranks.

    `loss` and `gradient` are divided by the divisor; `tally` is what this rank did.
    """

    state: TrainState | None
    gradient: PyTree[Array]
    loss: Array
    divisor: Array
    grad_norm: Array
    misfits: Misfits
    tally: Array


def apply_gradient(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: PyTree[Array]
) -> TrainState:
    """The optimizer step on whole arrays. Local."""
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by its integer count
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state)
