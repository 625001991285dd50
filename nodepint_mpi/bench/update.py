"""`nodepint bench update`: memory, messages and time of the optimizer's step, in both ways.

Adam on a dense network. Bytes are those that a rank hands to MPI. For comparison: an all-reduce of
the gradient along a ring, after which every rank would do the whole update, hands over
2 (P - 1) / P of it.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.counters import WORD_BYTES, Tally
from nodepint_mpi.parallel.warm_start import Misfits
from nodepint_mpi.training.memory import tree_bytes
from nodepint_mpi.training.train_state import Sums, TrainState
from nodepint_mpi.training.update import Update

WAYS = {"sharded": True, "on the first rank": False}


def run_update(comms: Comms, *, n_parameters: int, repeats: int) -> dict[str, Any]:
    """Take steps in both ways, in turn. Collective over `comms`; equal on all ranks.

    Args:
        comms: The ranks.
        n_parameters: Approximate size of the network: square matrices and their biases.
        repeats: Timed steps of each way.

    Returns:
        By way: `moment_bytes` and `message_bytes`, the largest of a rank, and `step_s`, the median
        of the slowest rank; besides `all_reduce_bytes` of a rank, and how many parameters and ranks
        there are.
    """
    comm, width = comms.time, max(1, int((n_parameters / 4) ** 0.5))
    shapes = {f"layer{n}": {"weight": (width, width), "bias": (width,)} for n in range(4)}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    gradient = jax.tree.map(lambda leaf: leaf * (1.0 + comm.grid_rank), params)
    zero = jnp.zeros(())
    sums = Sums(zero, jnp.ones(()), Misfits(zero, zero, zero, zero))
    updates = {
        way: Update(comm, optax.adam(1e-3), params, sharded=sharded)
        for way, sharded in WAYS.items()
    }
    states = {way: TrainState(params, update.init(params)) for way, update in updates.items()}
    found: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in range(repeats + 1):  # the first one compiles
        for way, update in updates.items():
            comms.control.Barrier()
            began = time.perf_counter()
            state, _, tally = jax.block_until_ready(
                update(lambda updated: updated.tally, states[way], gradient, sums)
            )
            states[way] = state
            taken = comms.control.allreduce(time.perf_counter() - began, op=_largest)
            if step:
                seconds[way].append(taken)
                continue
            work = Tally(*np.asarray(tally).tolist())
            numbers = comms.control.allgather(
                (tree_bytes(states[way].opt_state), work.words * WORD_BYTES)
            )
            moments, messages = (max(column) for column in zip(*numbers, strict=True))
            found[way] |= {"moment_bytes": moments, "message_bytes": messages}
    for way, each in seconds.items():
        found[way]["step_s"] = statistics.median(each)
    n_ranks, whole = comm.n_grid, tree_bytes(params)
    return {
        "n_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "n_ranks": n_ranks,
        "all_reduce_bytes": 2 * whole * (n_ranks - 1) // n_ranks,
        "ways": comms.control.bcast(found),
    }


def format_update(result: dict[str, Any]) -> str:
    """A table, a line for each way. Local."""
    lines = [
        f"{result['n_parameters']:,} parameters on {result['n_ranks']} ranks; an all-reduce of the "
        f"gradient sends {result['all_reduce_bytes'] / 1e6:.1f} MB a rank",
        f"{'update':20} {'moments of a rank':>18} {'sent by a rank':>15} {'step':>10}",
    ]
    for way, numbers in result["ways"].items():
        moments, messages = numbers["moment_bytes"] / 1e6, numbers["message_bytes"] / 1e6
        lines.append(
            f"{way:20} {moments:15.1f} MB {messages:12.1f} MB {numbers['step_s'] * 1e3:7.1f} ms"
        )
    return "\n".join(lines)


def _largest(one: float, other: float) -> float:
    return max(one, other)
