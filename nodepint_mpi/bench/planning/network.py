"""What a message costs: latency and bandwidth, and the trees that reductions and gathers take.

Hockney's model: a message of m bytes takes latency + m / bandwidth. Importing this module loads
neither MPI nor JAX.
"""

import math
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from nodepint_mpi.errors import LayoutError

if TYPE_CHECKING:
    from nodepint_mpi.parallel.comms import Comms

Number = int | float

SMALL, LARGE = 8, 2**22
"""Bytes of the messages that are timed."""
N_MESSAGES, N_REPEATS = 200, 5


class Network(NamedTuple):
    """Seconds that any message takes, and bytes a second.

    Reference:
        Hockney (1994), Parallel Computing 20, 389-398; Thakur, Rabenseifner, Gropp (2005), Int. J.
        High Performance Computing Applications 19, 49-66, sections 3 and 4, for the trees.
    """

    latency_s: float
    bandwidth: float

    def message_s(self, n_bytes: Any) -> Any:
        """From one rank to another; of numbers or arrays of them."""
        return self.latency_s + n_bytes / self.bandwidth

    def tree_s(self, n_ranks: int, n_bytes: Number) -> float:
        """From one rank to all, or a sum over all on one, along a binomial tree."""
        return _depth(n_ranks) * self.message_s(n_bytes)

    def reduce_scatter_s(self, n_ranks: int, n_bytes: Number) -> float:
        """The sum over all of `n_bytes`, of which each gets its part, by recursive halving."""
        n_sent = n_bytes * (n_ranks - 1) / n_ranks
        return _depth(n_ranks) * self.latency_s + n_sent / self.bandwidth

    def gather_s(self, n_ranks: int, n_bytes: Number) -> float:
        """What many ranks have, `n_bytes` each, on one of them; or dealt out by it."""
        return _depth(n_ranks) * self.latency_s + (n_ranks - 1) * n_bytes / self.bandwidth


def _depth(n_ranks: int) -> int:
    return math.ceil(math.log2(n_ranks))


def measure_network(comms: "Comms") -> Network:
    """Time messages along the line and back, as a step sends them. Collective; equal on all ranks.

    Raises:
        LayoutError: on all ranks, if there is but one.
    """
    import jax
    import jax.numpy as jnp

    from nodepint_mpi.parallel.exchange import recv_left, recv_right, send_left, send_right

    line = comms.time
    if line.size == 1:
        raise LayoutError("One rank sends no messages: start it on two or more, on two nodes.")

    def message_s(n_bytes: int, n_times: int) -> float:
        def there_and_back(k, value):
            value = recv_left(line, value)
            send_right(line, value)
            value = recv_right(line, value)
            send_left(line, value)
            return value

        journeys = jax.jit(lambda value: jax.lax.fori_loop(0, n_times, there_and_back, value))
        value = jnp.zeros(n_bytes // 4, jnp.float32)
        seconds = []
        for _ in range(1 + N_REPEATS):
            comms.control.Barrier()
            began = time.perf_counter()
            jax.block_until_ready(journeys(value))
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:]) / (2 * (line.size - 1) * n_times)

    small, large = message_s(SMALL, N_MESSAGES), message_s(LARGE, N_MESSAGES // 20)
    bandwidth = (LARGE - SMALL) / max(large - small, 1e-12)
    return comms.control.bcast(Network(small - SMALL / bandwidth, bandwidth))
