"""The clocks of a line of ranks, moved on by work, walks, messages and reductions.

Every event of a step is an operation that moves all clocks at once, by arrays over the ranks, so
that a line may have 1e5 of them. The groups of samples are alike, and so are ranks that share the
tangents of their slices: one line stands for all. Local; pure.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int

from nodepint_mpi.bench.planning.network import Network, Number
from nodepint_mpi.core.partition import owned_range

Ranks = Float[np.ndarray, " ranks"]

FINE, COARSE, MESSAGES, OTHER, WAIT = "fine", "coarse", "messages", "other", "wait"
PARTS = (FINE, COARSE, MESSAGES, OTHER, WAIT)
"""What a rank's time goes into; tangents are fine work, and so is all that ranks share."""


class Clocks:
    """When each rank of a line is done with all so far, and what it did until then, in seconds.

    Args:
        n_slices: How many slices the line deals out, in order.
        n_time: Ranks of the line.
        n_data: Groups of samples, each with a line.
        network: What messages cost.
        n_basis: Ranks that share the tangents of the same slices.
    """

    def __init__(self, n_slices: int, n_time: int, n_data: int, network: Network, n_basis: int = 1):
        ranges = [owned_range(n_slices, n_time, rank) for rank in range(n_time)]
        self.first: Int[np.ndarray, " ranks"] = np.array([own.start for own in ranges])
        self.owned: Int[np.ndarray, " ranks"] = np.array([len(own) for own in ranges])
        self.now: Ranks = np.zeros(n_time)
        self.spent: dict[str, Ranks] = {part: np.zeros(n_time) for part in PARTS}
        self._n_data, self._n_basis, self._network = n_data, n_basis, network

    @property
    def n_time(self) -> int:
        """Ranks of the line."""
        return len(self.now)

    def unsolved(self, front: int, at_once: int | None = 1) -> Int[np.ndarray, " ranks"]:
        """Slices of each rank that are propagated when those left of the front are solved.

        A rank takes them in groups of `at_once`, all its own if None; see `core.sweeps`.
        """
        width = self.owned if at_once is None else np.minimum(at_once, self.owned)
        solved = np.clip(front - self.first, 0, self.owned)
        return np.where(solved == self.owned, 0, self.owned - solved // width * width)

    def work(self, part: str, seconds: Number | Ranks) -> None:
        """Every rank is busy for so long."""
        self.now = self.now + seconds
        self.spent[part] = self.spent[part] + seconds

    def walk(
        self, spent: Mapping[str, Ranks], n_bytes: Number | Ranks, *, rightwards: bool
    ) -> None:
        """From slice to slice: a rank begins its own when its neighbor's state has come."""
        turn: Callable[[Ranks], Ranks] = (lambda a: a) if rightwards else (lambda a: a[::-1])
        seconds = sum(spent.values(), np.zeros(self.n_time))
        ready, took = turn(self.now), turn(seconds)
        message_s = self._network.message_s(n_bytes)
        # done[r] = took[r] + max(ready[r], done[r - 1] + message_s), solved for all r at once
        whole = np.cumsum(took + message_s)
        done = whole + np.maximum.accumulate(ready + took - whole)
        idle = np.maximum(done - took - ready, 0.0)  # but for round-off
        received = np.minimum(idle, message_s)
        for part, of_part in spent.items():
            self.spent[part] = self.spent[part] + of_part
        self.spent[MESSAGES] = self.spent[MESSAGES] + turn(received)
        self.spent[WAIT] = self.spent[WAIT] + turn(idle - received)
        self.now = turn(done)

    def shift(self, n_bytes: Number | Ranks, *, rightwards: bool, distance: int = 1) -> None:
        """Every rank hands something to the one so far on, all at the same time.

        What takes longest for a rank is what it sends or what it receives.
        """
        if self.n_time <= distance:
            return
        turn: Callable[[Ranks], Ranks] = (lambda a: a) if rightwards else (lambda a: a[::-1])
        sent = self._network.message_s(turn(np.broadcast_to(n_bytes, self.n_time)))
        sent = np.where(np.arange(self.n_time) < self.n_time - distance, sent, 0.0)
        arrives = np.concatenate([np.zeros(distance), sent[:-distance]])
        now = turn(self.now)
        ready = np.concatenate([now[:distance], np.maximum(now[distance:], now[:-distance])])
        self._meet(turn(ready), turn(np.maximum(sent, arrives)))

    def reduce(self, n_bytes: Number) -> None:
        """A sum or maximum over the ranks of all lines, known to all: to one rank and back."""
        n_ranks = self.n_time * self._n_data * self._n_basis
        if n_ranks > 1:
            ready = np.full(self.n_time, self.now.max())
            self._meet(ready, 2 * self._network.tree_s(n_ranks, n_bytes))

    def reduce_scatter(self, n_bytes: Number) -> None:
        """A sum over the ranks of all lines of `n_bytes`, of which each gets its part."""
        n_ranks = self.n_time * self._n_data * self._n_basis
        if n_ranks > 1:
            ready = np.full(self.n_time, self.now.max())
            self._meet(ready, self._network.reduce_scatter_s(n_ranks, n_bytes))

    def gather_shards(self, n_bytes: Number) -> None:
        """Every rank of all lines gets what the others have, `n_bytes` of each."""
        n_ranks = self.n_time * self._n_data * self._n_basis
        if n_ranks > 1:
            ready = np.full(self.n_time, self.now.max())
            self._meet(ready, self._network.gather_s(n_ranks, n_bytes))

    def on_first(self, n_bytes: Number) -> None:
        """A sum over the ranks of all lines, known to the first alone."""
        self._along_tree(n_bytes, np.full(self.n_time, self.now.max()))

    def to_grid(self, n_bytes: Number) -> None:
        """The first rank tells those of all lines the same."""
        self._along_tree(n_bytes, np.maximum(self.now, self.now[0]))

    def _along_tree(self, n_bytes: Number, ready: Ranks) -> None:
        n_ranks = self.n_time * self._n_data * self._n_basis
        if n_ranks > 1:
            self._meet(ready, self._network.tree_s(n_ranks, n_bytes))

    def gather(self, n_bytes: Number) -> None:
        """The first rank gets what the others have, `n_bytes` of each."""
        ready = np.full(self.n_time, self.now.max())
        self._meet(ready, self._network.gather_s(self.n_time, n_bytes))

    def join(self, n_bytes: Number) -> None:
        """Ranks with the same slices get what the others have, `n_bytes` of each; all are alike."""
        self._meet(self.now, self._network.gather_s(self._n_basis, n_bytes))

    def share(self, n_bytes: Number) -> None:
        """The first of the ranks with the same slices tells the others something."""
        self._meet(self.now, self._network.tree_s(self._n_basis, n_bytes))

    def deal(self, n_bytes: Number) -> None:
        """The first rank gives each of the others its part, of `n_bytes`."""
        ready = np.maximum(self.now, self.now[0])
        self._meet(ready, self._network.gather_s(self.n_time, n_bytes))

    def spread(self, n_bytes: Number) -> None:
        """The first rank tells all others the same."""
        ready = np.maximum(self.now, self.now[0])
        self._meet(ready, self._network.tree_s(self.n_time, n_bytes))

    def _meet(self, ready: Ranks, message_s: Number | Ranks) -> None:
        """Wait until others are ready, then take part in a message."""
        self.spent[WAIT] = self.spent[WAIT] + (ready - self.now)
        self.spent[MESSAGES] = self.spent[MESSAGES] + message_s
        self.now = ready + message_s
