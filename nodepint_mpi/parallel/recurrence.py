"""The coarse problem: an affine recurrence in r coordinates ties the slices together.

It is made of r-vectors and r x r matrices, one for each slice and sample, and never of a state. The
forward recurrence runs from left to right, the adjoint one through the transposes of the same
matrices from right to left. Both are solved in one of three ways, which differ in round-off:

    slices  the first rank receives the maps of all slices and walks through them
    blocks  it receives one map a rank, composed of those of its slices, and tells every rank
            where to start; the ranks then walk through their own slices
    scan    the ranks compose their maps with those of the ranks 1, 2, 4, ... further on

The last two are linear, but a correction that is too long is cut. Where the walks find that one is,
all ranks take the walk through all slices instead. By default that way is taken which should take
least, by counts: see `parallel.recurrence_cost`. Where both recurrences are known at the same time,
as in a tracked step, their matrices are composed and sent once.

Reference:
    Hillis, Steele (1986), Communications of the ACM 29, 1170-1183, for the scan.
"""

import math
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
from nodepint_mpi.parallel.recurrence_cost import Sizes, Way, choose_way

Recurrence = Literal["auto", "slices", "blocks", "scan"]
"""How a recurrence is to be solved: one of the ways, or that which should take least."""


class Coordinates(NamedTuple):
    """Coordinates at the starts of the owned slices, and on how many slices they were cut.

    `n_damped` counts slices where the radius was exceeded or a number not finite; it is known on
    the first rank only.
    """

    at_starts: Inexact[Array, "owned *batch rank"]
    n_damped: Int[Array, ""]


class AdjointCoordinates(NamedTuple):
    """Coordinates of the adjoint correction at both edges of the owned slices."""

    at_lefts: Inexact[Array, "owned *batch rank"]
    at_rights: Inexact[Array, "owned *batch rank"]


class _Direction(NamedTuple):
    """One of the recurrences: its vectors, how long coordinates may be, which way it runs."""

    vectors: Array
    radius: Array | None
    transposed: bool


_Solved = tuple[list[Walked], Array]
"""Walks through the owned slices, and on the first rank how many forward steps were cut."""


def solve_coordinates(
    comm: TimeComm,
    transfers: Inexact[Array, "owned *batch rank rank"],
    residuals: Inexact[Array, "owned *batch rank"],
    radius: Float[Array, ""] | None,
    owned: OwnedSlices,
    way: Recurrence = "auto",
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
    forward = _Direction(residuals, radius, transposed=False)
    (walked,), n_cut = _solve(comm, transfers, [forward], owned, way)
    return Coordinates(walked.before, n_cut)


def solve_adjoint_coordinates(
    comm: TimeComm,
    transfers: Inexact[Array, "owned *batch rank rank"],
    residuals: Inexact[Array, "owned *batch rank"],
    owned: OwnedSlices,
    way: Recurrence = "auto",
) -> AdjointCoordinates:
    """e_N = 0, e_n = A_n e_{n+1} + sigma_n. Collective over the grid, inside jit.

    Args:
        comm: Line of ranks along time.
        transfers: The A_n of the forward sweep.
        residuals: sigma_n, the residuals at the right edges seen along the tangents.
        owned: The slices of this rank.
        way: How to solve it.
    """
    back = _Direction(residuals, None, transposed=True)
    (walked,), _ = _solve(comm, transfers, [back], owned, way)
    return AdjointCoordinates(at_lefts=walked.after, at_rights=walked.before)


def solve_both(
    comm: TimeComm,
    transfers: Inexact[Array, "owned *batch rank rank"],
    residuals: Inexact[Array, "owned *batch rank"],
    adjoint_residuals: Inexact[Array, "owned *batch rank"],
    radius: Float[Array, ""] | None,
    owned: OwnedSlices,
    way: Recurrence = "auto",
) -> tuple[Coordinates, AdjointCoordinates]:
    """Both recurrences through the same matrices at once. Collective over the grid, inside jit.

    As `solve_coordinates` and `solve_adjoint_coordinates`, but that matrices are composed and sent
    once, and that the ranks agree once on whether a correction is too long.
    """
    forward = _Direction(residuals, radius, transposed=False)
    back = _Direction(adjoint_residuals, None, transposed=True)
    (along, against), n_cut = _solve(comm, transfers, [forward, back], owned, way)
    return Coordinates(along.before, n_cut), AdjointCoordinates(against.after, against.before)


def _solve(
    comm: TimeComm,
    matrices: Array,
    directions: list[_Direction],
    owned: OwnedSlices,
    wanted: Recurrence,
) -> _Solved:
    """The walks from zero as far as they lead through the owned slices.

    Radius and guard are those of the walk through all slices, whichever the way.
    """
    maps = [Affine(matrices, each.vectors) for each in directions]
    if comm.size == 1:
        with work(COARSE, walked=owned.n_slices * len(maps)):
            return _walk_guarded_all(maps, directions)
    way = _choose(comm, matrices, owned) if wanted == "auto" else wanted

    def by_slices() -> _Solved:
        return _walk_on_first(comm, maps, directions, owned)

    if way == "slices":
        return by_slices()
    block = _compose_own(maps, directions, owned)
    starts = BLOCK_STARTS[way](comm, block, directions)
    with work(COARSE, walked=owned.n_owned * len(maps)):
        walked = [
            walk(each, start, transposed=direction.transposed)
            for each, start, direction in zip(maps, starts, directions, strict=True)
        ]
        guards = [
            needs_guard(one.after, direction.radius)
            for one, direction in zip(walked, directions, strict=True)
        ]
    guard = max_over_ranks(comm, jnp.any(jnp.stack(guards)).astype(jnp.float32))
    return cond(guard > 0, by_slices, lambda: (walked, jnp.array(0)), usual=False)


def _choose(comm: TimeComm, matrices: Array, owned: OwnedSlices) -> Way:
    """By sizes that are the same on all ranks of all lines."""
    _, *batch, _, n_coordinates = matrices.shape
    sizes = Sizes(
        comm.size, owned.n_slices, n_coordinates, math.prod(batch), comm.n_groups,
        matrices.dtype.itemsize,
    )  # fmt: skip
    return choose_way(sizes)


def _walk_guarded_all(maps: list[Affine] | Array, directions: list[_Direction]) -> _Solved:
    """Through all slices, which are here, open or packed; steps that the forward walk has cut."""
    found, n_forward_cut = [], jnp.array(0)
    for i, (vectors, radius, transposed) in enumerate(directions):
        each = maps[i] if isinstance(maps, list) else maps
        zero = jnp.zeros_like(vectors[0])
        walked, n_cut = walk_guarded(
            each, zero, radius, transposed=transposed, which=i, n_vectors=len(directions)
        )
        found.append(walked)
        n_forward_cut = n_forward_cut if transposed else n_cut
    return found, n_forward_cut


def _walk_on_first(
    comm: TimeComm, maps: list[Affine], directions: list[_Direction], owned: OwnedSlices
) -> _Solved:
    """Through all slices on the first rank; every rank gets back where its own ones start."""
    every = gather_to_first(comm, pack(*maps), owned.n_slices)
    starts, n_cut = None, jnp.array(0)
    if every is not None:
        with work(COARSE, walked=owned.n_slices * len(maps)):
            walked, n_cut = _walk_guarded_all(every, directions)
        starts = jnp.stack([one.before for one in walked], axis=1)
    like = jnp.stack([each.vectors for each in directions], axis=1)
    starts = scatter_from_first(comm, starts, like, owned.n_slices)
    found = []
    with scope(COARSE):
        for i, (each, (_, radius, transposed)) in enumerate(zip(maps, directions, strict=True)):
            after, _ = step_guarded(each, starts[:, i], radius, transposed=transposed)
            found.append(Walked(starts[:, i], after))
    return found, n_cut


def _compose_own(
    maps: list[Affine], directions: list[_Direction], owned: OwnedSlices
) -> list[Affine]:
    """One map of this rank's block each way, by the same product of matrices."""
    walked = owned.n_owned * (len(maps) - 1)
    with work(COARSE, composed=owned.n_owned - 1, walked=walked):
        blocks = [compose_all(maps[0], transposed=directions[0].transposed)]
        for each, (vectors, _, transposed) in zip(maps[1:], directions[1:], strict=True):
            ends = walk(each, jnp.zeros_like(vectors[0]), transposed=transposed).after
            blocks.append(Affine(blocks[0].matrix, ends[0 if transposed else -1]))
    return blocks


def _starts_from_first(
    comm: TimeComm, blocks: list[Affine], directions: list[_Direction]
) -> list[Array]:
    """Where the walks enter this rank's block: the first rank walks from block to block."""
    every = gather_to_first(comm, pack(*blocks)[None], comm.size)
    zeros = jnp.stack([jnp.zeros_like(block.vector) for block in blocks])
    starts = None
    if every is not None:
        with work(COARSE, walked=comm.size * len(blocks)):
            walks = [
                walk(every, zeros[i], transposed=each.transposed, which=i, n_vectors=len(blocks))
                for i, each in enumerate(directions)
            ]
        starts = jnp.stack([walked.before for walked in walks], axis=1)
    return list(scatter_from_first(comm, starts, zeros[None], comm.size)[0])


def _starts_by_doubling(
    comm: TimeComm, blocks: list[Affine], directions: list[_Direction]
) -> list[Array]:
    """Where the walks enter this rank's block: maps of twice as many ranks in every round."""
    return [
        _start_by_doubling(comm, block, direction.transposed)
        for block, direction in zip(blocks, directions, strict=True)
    ]


def _start_by_doubling(comm: TimeComm, block: Affine, transposed: bool) -> Array:
    """Of one direction. A map that reaches back to the beginning of the walk is constant, since
    that begins at zero."""
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


BLOCK_STARTS: dict[str, Callable[[TimeComm, list[Affine], list[_Direction]], list[Array]]] = {
    "blocks": _starts_from_first,
    "scan": _starts_by_doubling,
}
