"""What the ways to solve a recurrence take, by counts alone, and the way that takes least.

Nothing is timed, so that all ranks choose the same way, in every process and in a plan. Local.
"""

import math
from typing import Literal, NamedTuple

Way = Literal["slices", "blocks", "scan"]
"""The ways to solve a recurrence; see `parallel.recurrence`."""

STEP_S, MULTIPLY_S = 1e-6, 6e-10
"""Of a walk on one core: to begin a step, and for each entry of the maps it goes through."""
COMPOSED = 4
"""What each entry takes when one map is made of two: so many times as long, at most."""
MESSAGE_S, BYTE_S = 5e-6, 1e-10
"""Of a message between nodes."""
WORTH = 0.5
"""Another way than "slices" has to take less than this share of it: the costs above are those of a
machine within a factor of two, and where a correction is cut "slices" is done in addition."""


class Sizes(NamedTuple):
    """What a recurrence is made of; equal on all ranks of all lines.

    `n_coordinates` are those of a sample, `n_samples` those of one line, `n_lines` the lines that
    agree with each other.
    """

    n_ranks: int
    n_slices: int
    n_coordinates: int
    n_samples: int = 1
    n_lines: int = 1
    number_bytes: int = 8


def choose_way(sizes: Sizes) -> Way:
    """The way that should take least. Local."""
    if sizes.n_ranks == 1:
        return "slices"
    taken = count_seconds(sizes)
    best = min(taken, key=lambda way: taken[way])
    return best if taken[best] < WORTH * taken["slices"] else "slices"


def count_seconds(sizes: Sizes) -> dict[Way, float]:
    """What every way takes on its longest path, on a machine as the constants say. Local."""
    n_ranks, n_slices, n_coordinates, n_samples, n_lines, number_bytes = sizes
    vector = n_samples * n_coordinates
    entries = vector * (n_coordinates + 1)
    walk_s = STEP_S + MULTIPLY_S * entries
    compose_s = STEP_S + MULTIPLY_S * entries * min(COMPOSED, n_coordinates + 1)
    map_s, vector_s = (number_bytes * BYTE_S * numbers for numbers in (entries, vector))
    depth, n_owned = _depth(n_ranks), -(-n_slices // n_ranks)
    agree_s = 2 * _depth(n_ranks * n_lines) * MESSAGE_S
    own_s = (n_owned - 1) * compose_s + n_owned * walk_s + agree_s

    def on_first(n_maps: int) -> float:
        """Maps gathered, walked through by the first rank, and their starts dealt out."""
        return 2 * depth * MESSAGE_S + n_maps * (walk_s + map_s + vector_s)

    rounds_s = (depth - 1) * (MESSAGE_S + map_s + compose_s)
    return {
        "slices": on_first(n_slices),
        "blocks": own_s + on_first(n_ranks),
        "scan": own_s + rounds_s + MESSAGE_S + vector_s,
    }


def _depth(n_ranks: int) -> int:
    return math.ceil(math.log2(n_ranks))
