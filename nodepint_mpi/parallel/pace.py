"""Whether the sweeps of a method earn their place, judged by how the largest jump decays.

Tangents taken at earlier iterates are as good as new ones only while the states hardly turn: when
a sweep has not brought the jump down to `RENEW_ABOVE` of the last one, a method that recycles takes
its tangents anew. A method whose sweeps do not halve the jump, twice in a row, or that multiply it,
does not work from where it is: its fallback takes over for good, from the best iterate so far, so
that no more is lost than the sweeps that did not work.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.types import Block

RENEW_ABOVE = 0.1
GOOD_BELOW = 0.5
WILD_ABOVE = 10.0
PATIENCE = 2


class Pace(NamedTuple):
    """How a solve goes; equal on all ranks but for the blocks.

    `slow` says that the last sweep was, `n_bad` counts sweeps in a row that did not halve the
    smallest jump. `ends` and `fine_ends` are those of the iterate with the smallest jump, None for
    a method without a fallback.
    """

    jump: Float[Array, ""]
    best_jump: Float[Array, ""]
    slow: Bool[Array, ""]
    n_bad: Int[Array, ""]
    ends: Block | None
    fine_ends: Block | None

    @property
    def falls_back(self) -> Bool[Array, ""]:
        """Whether the fallback does this sweep, as all that follow."""
        return self.n_bad >= PATIENCE


def first_pace(ends: Block, *, has_fallback: bool) -> Pace:
    """Before anything was judged. Local."""
    dtype = jnp.finfo(ends.dtype).dtype
    unknown, far = jnp.full((), jnp.nan, dtype), jnp.full((), jnp.inf, dtype)
    fine_ends = jnp.zeros_like(ends) if has_fallback else None
    best = ends if has_fallback else None
    return Pace(unknown, far, jnp.array(False), jnp.array(0), best, fine_ends)


def judge_pace(
    pace: Pace, jump: Float[Array, ""], ends: Block, fine_ends: Block
) -> tuple[Pace, Bool[Array, ""]]:
    """Take the jump of a new iterate into account. Local, equal on all ranks.

    Args:
        pace: Of the iterates before it.
        jump: The largest of its jumps, equal on all ranks.
        ends: Its states at the ends of the owned slices.
        fine_ends: What the fine propagator gives there.

    Returns:
        The new pace, and whether the fallback takes over with this sweep, so that the iterate is to
        be replaced by the best one (see `best_iterate`).
    """
    first, fallen = jnp.isnan(pace.jump), pace.falls_back
    good = first | (jump <= GOOD_BELOW * pace.best_jump) & jnp.isfinite(jump)
    wild = ~first & ~(jump <= WILD_ABOVE * pace.best_jump)
    n_bad = jnp.where(good, 0, pace.n_bad + 1)
    n_bad = jnp.where(wild | fallen, PATIENCE, n_bad)
    better = first | (jump < pace.best_jump)
    if pace.ends is not None and pace.fine_ends is not None:
        pace = pace._replace(
            ends=jnp.where(better, ends, pace.ends),
            fine_ends=jnp.where(better, fine_ends, pace.fine_ends),
        )
    judged = pace._replace(
        jump=jump,
        best_jump=jnp.where(better, jump, pace.best_jump),
        slow=~first & ~((jump <= RENEW_ABOVE * pace.jump) & jnp.isfinite(jump)),
        n_bad=n_bad,
    )
    return judged, judged.falls_back & ~fallen


def best_iterate(
    pace: Pace, ends: Block, fine_ends: Block, front: Int[Array, ""], owned: OwnedSlices
) -> tuple[Block, Block]:
    """Ends and fine ends of the best iterate right of the front, of this one left of it. Local.

    The slice at the front starts from an exact state: there the fine end is this iterate's.
    """
    assert pace.ends is not None and pace.fine_ends is not None  # there is a fallback
    index = jnp.asarray(owned.indices).reshape(-1, *[1] * (ends.ndim - 1))
    return (
        jnp.where(index >= front, pace.ends, ends),
        jnp.where(index > front, pace.fine_ends, fine_ends),
    )
