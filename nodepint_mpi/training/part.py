"""What one rank adds to a step: its part of gradient and sums, and numbers of its solve."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.warm_start import Misfits
from nodepint_mpi.training.train_state import Sums


class Solved(NamedTuple):
    """What a solve says of itself, equal on all ranks; see `StepReport`."""

    sweeps: Array
    jump: Array
    adjoint_sweeps: Array
    adjoint_residual: Array
    guarded: Array
    damped: Array
    fallbacks: Array
    finite: Array

    @staticmethod
    def of_sweep(n_sweeps: int, like: Array) -> "Solved":
        """A step of `n_sweeps` sweeps, without jumps and residuals. Local."""
        none, zero = jnp.array(0), jnp.zeros_like(like)
        number = jnp.array(n_sweeps)
        return Solved(number, zero, number, zero, none, none, none, jnp.array(True))


class Part(NamedTuple):
    """One rank's part of a step's gradient and sums, to be added up over all ranks.

    For random basis descent by tangents there are `Coefficients` in the gradient's place. `step` is
    the number of the optimizer step, for what is drawn anew in each.
    """

    gradient: PyTree[Array]
    sums: Sums
    solved: Solved
    step: Array | None = None


def divided_sums(comm: TimeComm, loss: Array) -> Sums:
    """Those of a loss that has been divided by its count. Local, inside jit."""
    zero, one = jnp.zeros_like(loss), jnp.ones_like(loss)
    return Sums(loss, one if comm.grid_rank == 0 else zero, Misfits(zero, zero, zero, zero))
