"""Block mathematics: what one rank computes for the slices it owns, between messages.

A function here takes a block and what came in from a neighbor, and returns the block's result
and what goes on to the other neighbor. Nothing here knows about ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.types import Block, Norm, Params, State


class BlockStates(NamedTuple):
    """Interface states of a block: `starts[i]` and `ends[i]` bound owned slice i.

    `starts` holds U[n] and `ends` U[n+1]; they overlap except at the block's own edges.
    """

    starts: Inexact[Array, "owned *state"]
    ends: Inexact[Array, "owned *state"]


class Correction(NamedTuple):
    """A block after a correction sweep, and how often a non-finite value was stepped around."""

    states: BlockStates
    coarse_ends: Inexact[Array, "owned *state"]
    n_guarded: Int[Array, ""]


Advance = Callable[[State, Any], tuple[State, tuple[BlockStates, State, Bool[Array, ""]]]]
"""One slice of a coarse walk, for `jax.lax.scan`: its start and its row -> its end, and the
`Correction` of this slice alone."""


class SliceTimes(NamedTuple):
    """What a propagator needs to know of a slice, or of every slice of a block.

    Its left edge, its length, the observation times inside it counted from the left edge, and its
    global index.
    """

    t0: Float[Array, "*owned"]
    length: Float[Array, "*owned"]
    ts: Float[Array, "*owned times"]
    global_index: Int[Array, "*owned"]


def slice_times(owned: OwnedSlices, like: Array) -> SliceTimes:
    """The slices of a block in the state's precision. Local.

    Differences are taken in double precision before they are cast: a slice is as long at t = 1e8
    as at t = 0.
    """
    dtype = jnp.finfo(like.dtype).dtype
    lefts = owned.edges[:-1]
    parts = (lefts, np.diff(owned.edges), owned.ts - lefts[:, None])
    times = (*(jnp.asarray(part, dtype=dtype) for part in parts), jnp.asarray(owned.indices))
    # Slices of equal length are one constant to XLA, whose simplifier then turns in circles over
    # diffrax's adaptive steps ("likely stuck in a circular simplification loop", jaxlib 0.10.2).
    return SliceTimes(*jax.lax.optimization_barrier(times))


def end_times(owned: OwnedSlices, like: Array) -> SliceTimes:
    """The same for a propagator that is read at its end only. Local."""
    times = slice_times(owned, like)
    return times._replace(ts=times.ts[:, :0])


def propagate_block(
    propagator: Propagator,
    params: Params,
    starts: Block,
    owned: OwnedSlices,
    *,
    at_once: int | None = None,
) -> SliceResult:
    """Propagate every slice of a block from its own start, `at_once` together or all. Local.

    Returns:
        `saves` (owned, times, *state) and `end` (owned, *state).
    """
    times = slice_times(owned, starts)
    if owned.n_owned == 1:
        # One slice is not worth a batched loop, whose every step would carry a select.
        result = propagator(params, starts[0], *(part[0] for part in times))
        return SliceResult(result.saves[None], result.end[None])
    if at_once is None or at_once >= owned.n_owned:
        return jax.vmap(propagator, in_axes=(None, *[0] * 5))(params, starts, *times)
    width = None if at_once == 1 else at_once  # as for one slice alone
    return jax.lax.map(lambda row: propagator(params, *row), (starts, *times), batch_size=width)


def propagate_unsolved(
    propagator: Propagator,
    params: Params,
    states: BlockStates,
    front: Int[Array, ""],
    owned: OwnedSlices,
    *,
    at_once: int | None = None,
) -> Block:
    """Fine ends of a block's slices from the front on; the others keep theirs. Local.

    Slices go through in groups of `at_once` (the whole block if None), and a group that lies
    left of the front costs nothing.
    """
    n_owned = owned.n_owned
    width = n_owned if at_once is None else min(at_once, n_owned)
    n_groups = -(-n_owned // width)
    times = end_times(owned, states.starts)

    def propagate(start, *times):
        return propagator(params, start, *times).end

    def group(rows):
        index, starts, ends, *times = rows

        def every():
            if width == 1:  # not worth a batched loop, whose every step would carry a select
                return propagate(starts[0], *(time[0] for time in times))[None]
            return jax.vmap(propagate)(starts, *times)

        return jax.lax.cond(jnp.any(index >= front), every, lambda: ends)

    rows = (jnp.asarray(owned.indices), states.starts, states.ends, *times)
    if n_groups == 1:
        return group(rows)
    surplus = n_groups * width - n_owned

    def grouped(values, fill):
        last = jnp.broadcast_to(fill, (surplus, *values.shape[1:])).astype(values.dtype)
        return jnp.concatenate([values, last]).reshape(n_groups, width, *values.shape[1:])

    groups = [
        grouped(rows[0], jnp.array(-1)),
        *(grouped(values, values[-1]) for values in rows[1:]),
    ]
    ends = jax.lax.map(group, tuple(groups))
    return ends.reshape(n_groups * width, *states.ends.shape[1:])[:n_owned]


def count_unsolved(
    front: Int[Array, ""], owned: OwnedSlices, *, at_once: int | None = None
) -> Int[Array, ""]:
    """How many slices of a block `propagate_unsolved` really propagates. Local."""
    width = owned.n_owned if at_once is None else min(at_once, owned.n_owned)
    edges = range(0, owned.n_owned, width)
    lasts = jnp.asarray([owned.first + min(i + width, owned.n_owned) - 1 for i in edges])
    sizes = jnp.asarray([min(width, owned.n_owned - i) for i in edges])
    return jnp.sum(jnp.where(lasts >= front, sizes, 0))


def chain_block(
    propagator: Propagator, params: Params, incoming: State, owned: OwnedSlices
) -> tuple[Block, SliceResult]:
    """Propagate through the slices of a block one after the other. Local.

    Returns:
        The starts (owned, *state), and the result of every slice; `result.end[-1]` goes on to
        the right neighbor.
    """

    def advance(start, times):
        result = propagator(params, start, *times)
        return result.end, (start, result)

    _, (starts, result) = jax.lax.scan(advance, incoming, slice_times(owned, incoming))
    return starts, result


def coarse_chain_block(
    coarse: Propagator,
    params: Params,
    incoming: State,
    owned: OwnedSlices,
    defects: Block | None = None,
) -> Correction:
    """The coarse solution of a block, kept finite: iteration 0 of parareal. Local.

    With `defects`, U[n+1] = G(U[n]) + defects[n]: what F has more than G, as far as it is known.
    """

    rows = (end_times(owned, incoming), defects)
    advance = advance_coarse(coarse, params)
    _, (states, coarse_ends, guarded) = jax.lax.scan(advance, incoming, rows)
    return Correction(states, coarse_ends, jnp.sum(guarded))


def advance_coarse(coarse: Propagator, params: Params) -> Advance:
    """A slice of `coarse_chain_block`, whose rows are times and defects. Local."""

    def advance(start, row):
        times, defect = row
        coarse_end, guarded = finite_coarse_end(coarse, params, start, times)
        end = coarse_end if defect is None else coarse_end + defect
        return end, (BlockStates(start, end), coarse_end, guarded)

    return advance


def coarse_block(coarse: Propagator, params: Params, starts: Block, owned: OwnedSlices) -> Block:
    """Coarse ends of a block from given starts, all at once, kept finite. Local."""

    def one(start, times):
        return finite_coarse_end(coarse, params, start, times)[0]

    return jax.vmap(one)(starts, end_times(owned, starts))


def correct_block(
    coarse: Propagator,
    params: Params,
    incoming: State,
    *,
    fine_ends: Block,
    old: BlockStates,
    coarse_ends: Block,
    front: Int[Array, ""],
    owned: OwnedSlices,
) -> Correction:
    """The parareal correction over a block, from left to right. Local.

    U[n+1] <- F(U_old[n]) + (G(U[n]) - G(U_old[n])), with slices left of `front` kept and the slice
    at the front set to F exactly. A non-finite F falls back to G, a non-finite G to its start,
    so a sweep over states far from the solution cannot poison the block, nor a sample the others.
    Slices up to `front` cost nothing; `count_unsolved` from `front + 1` on, with `at_once=1`,
    counts the others.

    Reference:
        Lions, Maday, Turinici (2001), C. R. Acad. Sci. 332, 661-668; in the form of Gander and
        Vandewalle (2007), SIAM J. Sci. Comput. 29, 556-578, eq. (2.3).
    """

    rows = (
        end_times(owned, incoming),
        jnp.asarray(owned.indices),
        fine_ends,
        old.ends,
        coarse_ends,
    )
    advance = advance_corrected(coarse, params, front)
    _, (states, coarse_ends, guarded) = jax.lax.scan(advance, incoming, rows)
    return Correction(states, coarse_ends, jnp.sum(guarded))


def advance_corrected(coarse: Propagator, params: Params, front: Int[Array, ""]) -> Advance:
    """A slice of `correct_block`: rows are times, index, F, and old ends of U and G. Local."""

    def advance(start, row):
        times, index, fine_end, old_end, old_coarse_end = row

        def correct():
            coarse_end, guarded_coarse = finite_coarse_end(coarse, params, start, times)
            candidate = fine_end + (coarse_end - old_coarse_end)
            usable = samples_finite(candidate, coarse.n_sample_axes)
            end = jnp.where(usable, candidate, coarse_end)
            return end, coarse_end, guarded_coarse | ~jnp.all(usable)

        def keep():  # also at the front, whose start has not changed
            return jnp.where(index == front, fine_end, old_end), old_coarse_end, jnp.array(False)

        end, coarse_end, guarded = jax.lax.cond(index > front, correct, keep)
        return end, (BlockStates(start, end), coarse_end, guarded)

    return advance


def replace_ends(
    fine_ends: Block, old_ends: Block, front: Int[Array, ""], owned: OwnedSlices
) -> tuple[Block, Int[Array, ""]]:
    """The correction without a coarse propagator (Picard): U[n+1] <- F(U_old[n]). Local.

    A non-finite F keeps the old end, except at the front, whose start is exact.
    """
    index = _column(jnp.asarray(owned.indices), fine_ends)
    finite = _column(slices_finite(fine_ends), fine_ends)
    keep = (index < front) | ((index > front) & ~finite)
    guarded = (jnp.asarray(owned.indices) > front) & ~slices_finite(fine_ends)
    return jnp.where(keep, old_ends, fine_ends), jnp.sum(guarded)


def slice_distance(left: Block, right: Block, norm: Norm = "max") -> Float[Array, " owned"]:
    """Norm of the difference in each slice; infinite where it is not a number. Local."""
    return _size_of(left - right, tuple(range(1, left.ndim)), norm)


def sample_distance(
    left: Block, right: Block, *, n_batch_axes: int, norm: Norm = "max"
) -> Float[Array, "owned *samples"]:
    """Norm of the difference of each sample in each slice; infinite where it is NaN. Local."""
    return _size_of(left - right, tuple(range(1 + n_batch_axes, left.ndim)), norm)


def _size_of(difference: Array, axes: tuple[int, ...], norm: Norm) -> Array:
    match norm:
        case "max":
            size = jnp.max(jnp.abs(difference), axis=axes, initial=0.0)
        case "rms":
            size = jnp.sqrt(jnp.mean(jnp.square(difference), axis=axes))
        case "mean":
            size = jnp.mean(jnp.abs(difference), axis=axes)
    return jnp.where(jnp.isnan(size), jnp.inf, size)


def slices_finite(states: Block) -> Bool[Array, " owned"]:
    """Which slices hold only finite numbers. Local."""
    return jnp.all(jnp.isfinite(states), axis=tuple(range(1, states.ndim)))


def samples_finite(states: Array, n_lead: int) -> Bool[Array, "..."]:
    """Which states hold only finite numbers, (*lead, 1, ...): like `states`, to select by. Local.

    Args:
        states: Numbers.
        n_lead: Leading axes that count states.
    """
    return jnp.all(jnp.isfinite(states), axis=tuple(range(n_lead, states.ndim)), keepdims=True)


def every_sample(mask: Bool[Array, "owned ..."]) -> Bool[Array, " owned"]:
    """The slices where a mask is true of all samples. Local."""
    return jnp.all(mask, axis=tuple(range(1, mask.ndim)))


def finite_coarse_end(
    coarse: Propagator, params: Params, start: State, times: SliceTimes
) -> tuple[State, Bool[Array, ""]]:
    """G(start), or the start itself where G is not finite, sample by sample. Local.

    The same function wherever a sweep needs G, so that its differences vanish at the solution.
    """
    end = coarse(params, start, *times).end
    finite = samples_finite(end, coarse.n_sample_axes)
    return jnp.where(finite, end, start), ~jnp.all(finite)


def _column(values: Array, like: Array) -> Array:
    """One value per slice, shaped to broadcast against the states of the slices."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))
