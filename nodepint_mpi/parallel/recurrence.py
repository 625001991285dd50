"""The coarse problem: an affine recurrence in r coordinates ties the slices together.

It is made of r-vectors and r x r matrices, one for each slice and sample, and never of a state. The
forward recurrence runs from left to right, the adjoint one through the transposes of the same
matrices from right to left. Both are solved in one of three ways, which differ in round-off:

    slices  the first rank receives the maps of all slices and walks through them
    blocks  it receives one map a rank, composed of those of its slices, and tells every rank
            where to start; the ranks then walk through their own slices
    scan    the ranks compose their maps with those of the ranks 1, 2, 4, ... further on

The last two are linear, but a correction that is too long is cut. Where the walks find that one is,
all ranks take the walk through all slices instead.

Reference:
    Hillis, Steele (1986), Communications of the ACM 29, 1170-1183, for the scan.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from nodepint_mpi.core.affine import (
    Affine,
    Walked,
    compose,
    compose_all,
    needs_guard,
    pack,
    step_guarded,
    unpack,
    walk,
    walk_guarded,
)
from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.scopes import COARSE, scope
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import cond, work
from nodepint_mpi.parallel.exchange import (
    gather_to_first,
    max_over_ranks,
    scatter_from_first,
    shift_left,
    shift_right,
)

Recurrence = Literal["slices", "blocks", "scan"]
"""The ways to solve a recurrence."""


class Coordinates(NamedTuple):
    """Coordinates at the starts of the owned slices, and on how many slices they were cut.

    `n_damped` counts slices where the radius was exceeded or a number not finite; it is known on
    the first rank only.
    """

    at_starts: Inexact[Array, "owned *batch rank"]
    n_damped: Int[Array, ""]


def solve_coordinates(
    comm: TimeComm,
    transfers: Inexact[Array, "owned *batch rank rank"],
    residuals: Inexact[Array, "owned *batch rank"],
    radius: Float[Array, ""] | None,
    owned: OwnedSlices,
    way: Recurrence = "slices",
) -> Coordinates:
    """c_0 = 0, c_{n+1} = A_n^T c_n + beta_n. Collective over the grid, inside jit.

    Args:
        comm: Line of ranks along time.
        transfers: A_n of the owned slices, from `core.basis.transfers`.
        residuals: beta_n = V^T b_n, the jumps at the ends of the owned slices.
        radius: Largest norm of a sample's coordinates, equal on all ranks; what is longer is cut to
            it, since a linear model means nothing that far away. No bound if None.
        owned: The slices of this rank.
        way: How to solve it.
    """
    maps = Affine(transfers, residuals)
    walked, n_cut = _solve(comm, maps, radius, owned, way, transposed=False)
    return Coordinates(walked.before, n_cut)


class Cocoordinates(NamedTuple):
    """Coordinates of the adjoint correction at both edges of the owned slices."""

    at_lefts: Inexact[Array, "owned *batch rank"]
    at_rights: Inexact[Array, "owned *batch rank"]


def solve_cocoordinates(
    comm: TimeComm,
    transfers: Inexact[Array, "owned *batch rank rank"],
    residuals: Inexact[Array, "owned *batch rank"],
    owned: OwnedSlices,
    way: Recurrence = "slices",
) -> Cocoordinates:
    """e_N = 0, e_n = A_n e_{n+1} + sigma_n. Collective over the grid, inside jit.

    Args:
        comm: Line of ranks along time.
        transfers: The A_n of the forward sweep.
        residuals: sigma_n, the residuals at the right edges seen along the tangents.
        owned: The slices of this rank.
        way: How to solve it.
    """
    maps = Affine(transfers, residuals)
    walked, _ = _solve(comm, maps, None, owned, way, transposed=True)
    return Cocoordinates(at_lefts=walked.after, at_rights=walked.before)


def _solve(
    comm: TimeComm,
    maps: Affine,
    radius: Array | None,
    owned: OwnedSlices,
    way: str,
    *,
    transposed: bool,
) -> tuple[Walked, Int[Array, ""]]:
    """The walk from zero as far as it leads through the owned slices; on the first rank, steps cut.

    Radius and guard are those of the walk through all slices, whichever the way.
    """
    if comm.size == 1:
        with work(COARSE, walked=owned.n_slices):
            return walk_guarded(maps, _zero(maps), radius, transposed=transposed)

    def by_slices():
        return _walk_on_first(comm, maps, radius, owned, transposed)

    if way == "slices":
        return by_slices()
    with work(COARSE, composed=owned.n_owned - 1):
        block = compose_all(maps, transposed=transposed)
    start = BLOCK_STARTS[way](comm, block, transposed)
    with work(COARSE, walked=owned.n_owned):
        walked = walk(maps, start, transposed=transposed)
        guard = needs_guard(walked.after, radius)
    guard = max_over_ranks(comm, guard.astype(jnp.float32))
    return cond(guard > 0, by_slices, lambda: (walked, jnp.array(0)), usual=False)


def _walk_on_first(
    comm: TimeComm, maps: Affine, radius: Array | None, owned: OwnedSlices, transposed: bool
) -> tuple[Walked, Int[Array, ""]]:
    """Through all slices on the first rank; every rank gets back where its own ones start."""
    every = gather_to_first(comm, pack(maps), owned.n_slices)
    before, n_cut = None, jnp.array(0)
    if every is not None:
        with work(COARSE, walked=owned.n_slices):
            walked, n_cut = walk_guarded(every, _zero(maps), radius, transposed=transposed)
        before = walked.before
    before = scatter_from_first(comm, before, maps.vector, owned.n_slices)
    with scope(COARSE):
        after, _ = step_guarded(maps, before, radius, transposed=transposed)
    return Walked(before, after), n_cut


def _start_from_first(comm: TimeComm, block: Affine, transposed: bool) -> Array:
    """Where the walk enters this rank's block: the first rank walks from block to block."""
    blocks = gather_to_first(comm, pack(block)[None], comm.size)
    zero, starts = jnp.zeros_like(block.vector), None
    if blocks is not None:
        with work(COARSE, walked=comm.size):
            starts = walk(blocks, zero, transposed=transposed).before
    return scatter_from_first(comm, starts, zero[None], comm.size)[0]


def _start_by_doubling(comm: TimeComm, block: Affine, transposed: bool) -> Array:
    """Where the walk enters this rank's block: maps of twice as many ranks in every round.

    A map that reaches back to the beginning of the walk is constant, since that begins at zero.
    """
    shift = shift_left if transposed else shift_right
    place = comm.size - 1 - comm.rank if transposed else comm.rank
    so_far = block._replace(matrix=None) if place == 0 else block
    distance = 1
    while distance < comm.size - 1:  # what the last rank would find nobody needs
        like = so_far if place >= 2 * distance else so_far._replace(matrix=None)
        before = shift(comm, pack(so_far), pack(like), distance)
        if distance <= place < comm.size - 1:  # nobody asks for the last rank's
            found = unpack(before)
            n_walked = int(found.matrix is None)  # from where the walk begins
            with work(COARSE, walked=n_walked, composed=1 - n_walked):
                so_far = compose(found, so_far, transposed=transposed)
        distance *= 2
    return shift(comm, so_far.vector, jnp.zeros_like(so_far.vector))


BLOCK_STARTS: dict[str, Callable[[TimeComm, Affine, bool], Array]] = {
    "blocks": _start_from_first,
    "scan": _start_by_doubling,
}


def _zero(maps: Affine) -> Array:
    """Where a walk through these maps begins."""
    return jnp.zeros_like(maps.vector[0])
