"""The encoder of a step: on the first rank of a line, or dealt over its ranks by samples.

Only the first slice starts from what is encoded. While its rank encodes a batch the others wait,
however many they are: a large encoder limits how far ranks along time can speed up a step. Dealt,
each rank encodes its share of the samples and pulls it back, at the cost of a gather and a scatter
of initial states.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.batch import SampleBatch, encoder_reads
from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.core.scopes import ENCODER
from nodepint_mpi.data.samples import Samples
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import work
from nodepint_mpi.parallel.exchange import gather_to_first, scatter_from_first
from nodepint_mpi.training.batch_model import encode, split_model
from nodepint_mpi.training.line_problem import LineProblem, initial_of
from nodepint_mpi.training.rank_samples import share_batch

FLOPS = 5e9
"""Operations a second of an encoder and its pull-back, as of one core."""
MESSAGE_S, BYTE_S = 2e-5, 1e-9
"""What a message takes, and a byte of it, between processes of one machine."""
PASSES = 3
"""An encoder and its pull-back, in encoders."""
WORTH = 2.0
"""How many times what the exchange costs must be saved: these are estimates."""


def encode_initial(
    problem: LineProblem, params: PyTree, batch: SampleBatch
) -> tuple[Array, Callable | None]:
    """Initial states (samples, *state) and their pull-back to the parameters. Inside jit.

    On the first rank; elsewhere nobody reads them, and they are zeros. Where the encoder is dealt,
    both are collective over the line, and the pull-back gives each rank's part of the gradient and
    reads cotangents of the first rank only. Where it is not, both are local, and there is a
    pull-back on the first rank only.
    """
    comm, n_samples = problem.comm, jnp.shape(batch.initial)[0]
    of_params = initial_of(problem, batch)
    if comm.size == 1 or (comm.rank == 0 and not problem.dealt_encoder):
        with work(ENCODER, encoded=1.0):
            return jax.vjp(of_params, params)
    like = jax.eval_shape(of_params, params)
    nothing = jnp.zeros(like.shape, like.dtype)
    if not problem.dealt_encoder:
        return nothing, None
    share = owned_range(n_samples, comm.size, comm.rank)
    own, pull_back_own = nothing[:0], None
    if share:
        part = encoder_reads(batch, share)
        with work(ENCODER, encoded=len(share) / n_samples):
            own, pull_back_own = jax.vjp(initial_of(problem, part), params)
    states = gather_to_first(comm, own, n_samples)

    def pull_back(cotangents: Array) -> tuple[PyTree]:
        given = cotangents if comm.rank == 0 else None
        dealt = scatter_from_first(comm, given, own, n_samples)
        if pull_back_own is None:
            return (jax.tree.map(jnp.zeros_like, params),)
        return pull_back_own(dealt)

    return nothing if states is None else states, pull_back


def deals_encoder(
    config: Config, comm: TimeComm, model: EncodeProcessDecode, samples: Samples
) -> bool:
    """Whether the ranks of a line share the encoder: as the config says, or `saves_time`. Local.

    Args:
        config: The experiment.
        comm: Line of ranks along time.
        model: The network.
        samples: The training split.

    Raises:
        ConfigError: if lines would have different numbers of samples.
    """
    wanted = config.run.dealt_encoder
    if comm.size == 1 or wanted is not None:
        return comm.size > 1 and bool(wanted)
    n_samples = share_batch(config, samples.n_rows, comm.n_groups)
    sample = samples._replace(block=None).take(np.array([0]), 0)
    params, static = split_model(model)

    def of_params(params: PyTree, sample: SampleBatch) -> Array:
        return encode(eqx.combine(params, static), sample, 0)

    state = jax.eval_shape(of_params, params, sample)
    if not jax.tree.leaves(eqx.filter(model.encoder, eqx.is_inexact_array)):
        return False
    cost = jax.jit(of_params).lower(params, sample).cost_analysis() or {}
    state_bytes = math.prod(state.shape) * state.dtype.itemsize
    return saves_time(comm.size, n_samples, float(cost.get("flops", 0.0)), state_bytes)


def saves_time(n_ranks: int, n_samples: int, flops: float, state_bytes: int) -> bool:
    """Whether a dealt encoder should take less time. Local; pure.

    Args:
        n_ranks: Ranks along time.
        n_samples: Samples of a step that they share.
        flops: Operations that encode a sample.
        state_bytes: Of its initial state.
    """
    saved_s = PASSES * flops * (n_samples - math.ceil(n_samples / n_ranks)) / FLOPS
    rounds = math.ceil(math.log2(n_ranks))
    exchange_s = 2 * (rounds * MESSAGE_S + n_samples * state_bytes * BYTE_S)
    return saved_s > WORTH * exchange_s
