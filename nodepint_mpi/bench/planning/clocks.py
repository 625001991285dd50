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
        everywhere = np.ones(self.n_time, dtype=bool)
        self._chain(everywhere, spent, self._network.message_s(n_bytes), rightwards=rightwards)

    def relay(
        self,
        spent: Mapping[str, Ranks],
        n_bytes: Number | Ranks,
        coarsening: int,
        *,
        rightwards: bool,
    ) -> None:
        """From group to group of `coarsening` slices, on the ranks where groups begin."""
        begin, end = self._groups(coarsening)
        self._chain(end > begin, spent, self._network.message_s(n_bytes), rightwards=rightwards)

    def walk_within(
        self,
        spent: Mapping[str, Ranks],
        n_bytes: Number | Ranks,
        coarsening: int,
        *,
        rightwards: bool,
    ) -> None:
        """From slice to slice through all groups of `coarsening` slices at once.

        A rank first walks through the slices of groups that begin in its block, then through those
        of a group that goes on from a neighbor: see `parallel.group_messages.walk_within`.
        """
        turn: Callable[[np.ndarray], np.ndarray] = (lambda a: a) if rightwards else _reversed
        begin, end = self._groups(coarsening)
        if rightwards:
            late = np.minimum(begin * coarsening - self.first, self.owned)
        else:
            n_slices, after = int(self.owned.sum()), self.first + self.owned
            lasts = np.where(after == n_slices, after, after // coarsening * coarsening)
            late = np.minimum(after - lasts, self.owned)
        seconds = sum(spent.values(), np.zeros(self.n_time))
        took_late = turn(seconds * late / self.owned)
        took_early = turn(seconds) - took_late
        is_early, waits = turn(late < self.owned), turn(late > 0)
        message_s = np.broadcast_to(self._network.message_s(n_bytes), self.n_time)
        message_s = turn(message_s)
        ready = turn(self.now)
        sent, done = ready + took_early, ready + took_early
        arrives = np.zeros(self.n_time)
        pending = np.flatnonzero(waits & np.roll(is_early, 1))
        while len(pending):  # the next ranks of all groups: as often as one has ranks
            arrives[pending] = sent[pending - 1] + message_s[pending]
            done[pending] = np.maximum(done[pending], arrives[pending]) + took_late[pending]
            through = pending[~is_early[pending]]
            sent[through] = done[through]
            pending = through + 1
            pending = pending[pending < self.n_time]
            pending = pending[waits[pending]]
        self._moved(turn(done), spent, turn(np.where(waits, message_s, 0.0)))

    def _groups(self, coarsening: int) -> tuple[np.ndarray, np.ndarray]:
        """The first group that begins on each rank, and the one after the last."""
        return -(-self.first // coarsening), -(-(self.first + self.owned) // coarsening)

    def _chain(
        self,
        takes_part: np.ndarray,
        spent: Mapping[str, Ranks],
        message_s: Number | Ranks,
        *,
        rightwards: bool,
    ) -> None:
        """A walk through some of the ranks; the others go on."""
        turn: Callable[[np.ndarray], np.ndarray] = (lambda a: a) if rightwards else _reversed
        among = turn(takes_part)
        seconds = sum(spent.values(), np.zeros(self.n_time))
        message_s = np.broadcast_to(message_s, self.n_time)
        ready, took = turn(self.now)[among], turn(seconds)[among]
        sent_s = message_s[turn(np.arange(self.n_time))][among]
        # done[r] = took[r] + max(ready[r], done[r - 1] + sent_s), solved for all r at once
        whole = np.cumsum(took + sent_s)
        done = turn(self.now).copy()
        done[among] = whole + np.maximum.accumulate(ready + took - whole)
        self._moved(turn(done), spent, message_s)

    def _moved(self, done: Ranks, spent: Mapping[str, Ranks], message_s: Ranks) -> None:
        """Ranks that did so much by then, and waited for messages that take so long."""
        idle = done - self.now
        for part, of_part in spent.items():
            idle = idle - of_part
            self.spent[part] = self.spent[part] + of_part
        idle = np.maximum(idle, 0.0)  # but for round-off
        received = np.minimum(idle, message_s)
        self.spent[MESSAGES] = self.spent[MESSAGES] + received
        self.spent[WAIT] = self.spent[WAIT] + (idle - received)
        self.now = done

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


def _reversed(values: np.ndarray) -> np.ndarray:
    return values[::-1]
