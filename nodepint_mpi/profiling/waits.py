"""Waiting told apart from messages, by comparing the ranks that take part. Local; pure.

Who comes late to a message is in it for as long as it takes; who comes early is in it longer, and
waits for the difference. So of a message, what a rank spends beyond the briefest of those that take
part is waiting. This needs no common clock.
"""

from collections.abc import Iterator, Sequence

from nodepint_mpi.core.scopes import (
    CELL,
    GRID,
    LEFTWARDS,
    LINE,
    RECEIVE,
    RIGHTWARDS,
    SEND,
    distance_of,
    every,
)
from nodepint_mpi.profiling.trace import Profile

WAIT = "wait"

Numbers = list[tuple[int, int]]
"""Calls by rank, and by their place among those of the rank."""


def split_waits(
    profiles: Sequence[Profile], n_groups: int = 1, n_basis: int = 1
) -> list[dict[str, float]]:
    """The phases of every rank in one step, with waiting taken out of the messages.

    Args:
        profiles: Of every rank, in the order of the grid: groups, time, basis.
        n_groups: How many groups of ranks share the samples.
        n_basis: How many ranks share the tangents of the same slices.
    """
    split = [dict(profile.phases) for profile in profiles]
    for members in _partners(profiles, n_groups, n_basis):
        if len({len(numbers) for numbers in members}) > 1:
            continue  # not all messages are in the profiles: which belong together is not known
        for together in zip(*members, strict=True):
            least = min(profiles[rank].calls[i].seconds for rank, i in together)
            for rank, i in together:
                call = profiles[rank].calls[i]
                if call.seconds > least:
                    waited = call.exposed_s * (1 - least / call.seconds)
                    split[rank][call.phase] -= waited
                    split[rank][WAIT] = split[rank].get(WAIT, 0.0) + waited
    return split


def _partners(
    profiles: Sequence[Profile], n_groups: int, n_basis: int = 1
) -> Iterator[list[Numbers]]:
    """Calls that belong together, in order: of the two ends of a channel, or of all its ranks.

    A shift by some distance joins every rank to those that far away, and so a chain of them.
    """

    def calls(rank: int, channel: str, phase: str | None = None) -> Numbers:
        return [
            (rank, i)
            for i, call in enumerate(profiles[rank].calls)
            if call.channel == channel and phase in (None, call.phase)
        ]

    channels = {call.channel for profile in profiles for call in profile.calls}
    distances = sorted(d for d in map(distance_of, channels) if d is not None)
    size = len(profiles) // n_groups
    firsts = [group * size + b for group in range(n_groups) for b in range(n_basis)]
    for first in firsts:
        line = range(first, first // size * size + size, n_basis)
        yield [calls(rank, LINE) for rank in line]
        for distance in distances:
            for chain in (line[place::distance] for place in range(distance)):
                yield [calls(rank, every(distance)) for rank in chain]
        for left, right in zip(line, line[1:], strict=False):
            yield [calls(left, RIGHTWARDS, SEND), calls(right, RIGHTWARDS, RECEIVE)]
            yield [calls(right, LEFTWARDS, SEND), calls(left, LEFTWARDS, RECEIVE)]
    for first in range(0, len(profiles), n_basis):
        yield [calls(rank, CELL) for rank in range(first, first + n_basis)]
    yield [calls(rank, GRID) for rank in range(len(profiles))]
