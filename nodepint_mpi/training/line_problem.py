"""What a line of ranks computes with, and the parameters of the vector field that it makes of a
batch before the solve.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.core.batch import SampleBatch, as_numbers
from nodepint_mpi.core.exogenous import Interpolation
from nodepint_mpi.core.keys import keys_as_numbers
from nodepint_mpi.core.objective import Loss, SimulationFree, Term, per_sample
from nodepint_mpi.core.observations import BlockObservations
from nodepint_mpi.core.relaxation import RelaxedParams
from nodepint_mpi.core.sample_noise import SampleNoise
from nodepint_mpi.core.sample_params import SampleParams
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.training.batch_model import encode, sample_keys, takes_key


class LineProblem(NamedTuple):
    """What a line of ranks computes with: model, solver, observations and loss.

    `edge_weights` (edges, times), for relaxed continuity, gives the data at the slice boundaries of
    samples without gaps. `interpolation` is that of inputs over time, `terms` are added to the
    loss, `seed` is that of random keys, and `noise` that of a stochastic equation. With a
    `dealt_encoder` the ranks share the encoder by samples: see `training.encoder`.
    """

    comm: TimeComm
    static: EncodeProcessDecode
    solver: TimeSolver
    observations: BlockObservations
    loss: Loss | SimulationFree
    metrics: dict[str, Loss]
    edge_weights: np.ndarray | None = None
    interpolation: Interpolation = "linear"
    terms: tuple[Term, ...] = ()
    seed: int = 0
    noise: SampleNoise | None = None
    dealt_encoder: bool = False

    def line(self, of_field: PyTree[Array]) -> Line:
        """The line, with these parameters of the vector field. Local."""
        return Line(self.comm, self.observations.owned, of_field)


def initial_of(problem: LineProblem, batch: SampleBatch) -> Callable[[PyTree], Array]:
    """From parameters to initial states (samples, *state). Local."""

    def of_params(params: PyTree) -> Array:
        states = encode(eqx.combine(params, problem.static), batch, problem.seed)
        return states if problem.noise is None else problem.noise.spread(states)

    return of_params


def field_params(
    problem: LineProblem, params: PyTree, batch: SampleBatch, weight: Array | None
) -> PyTree[Array]:
    """Parameters of the vector field, with what the samples bring. Local, inside jit.

    With a `weight` of continuity, that of a relaxed solve, the data at the slice edges are with
    them.
    """
    of_field, keys, paths = params.processor, None, None
    if takes_key(problem.static.processor):
        keys = sample_keys(problem.seed, batch)
    if problem.noise is not None:
        paths = problem.noise.keys(jnp.asarray(batch.rows), batch.step)
    own = (batch.reads, batch.signal, batch.static, keys, paths)
    if any(part is not None for part in own):
        static = None if batch.static is None else as_numbers(jnp.asarray(batch.static))
        times = None if batch.reads is None else jnp.asarray(batch.reads.times)
        signal = None if batch.signal is None else jax.tree.map(jnp.asarray, batch.signal)
        first = problem.observations.owned.first
        keys = None if keys is None else keys_as_numbers(keys)
        of_field = SampleParams(
            of_field, times, signal, static, keys, paths, first, problem.interpolation
        )
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
