"""Newton's correction of states and multipliers at the slice edges: the small system that ties the
slices together, in coordinates of a basis V (the identity unless directions are given).

With the jumps b_n = P_n - Y_{n+1}, beta_n = Q_n - Lambda_n and rho = terminal'(Y_N) - Lambda_N the
corrections fulfill

    dY_{n+1} = P_y V V^T dY_n + P_l V V^T dLambda_{n+1} + b_n,          dY_0 = 0
    dLambda_n = Q_y V V^T dY_n + Q_l V V^T dLambda_{n+1} + beta_n
    dLambda_N = terminal'' V V^T dY_N + rho

with the derivatives of the coarse slices. Seen along V this is a system of 2 r numbers an edge,
solved on the first rank by the recursion of `two_point`; each rank then forms the corrections of
its own edges. What lies outside of V is corrected by the jumps alone, as in Picard's iteration.

Reference:
    Gander, Kwok, Salomon (2020), SIAM J. Sci. Comput. 42, A2773, equations (8) to (12).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.optimal_control.two_point import SliceTangents
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.exchange import bcast_from, gather_to_first, shift_left, shift_right


class Edges(NamedTuple):
    """States and multipliers, or changes of them, at all edges of the owned slices.

    An edge between two ranks is held by both, with the same bits.
    """

    states: Float[Array, "edges state"]
    multipliers: Float[Array, "edges state"]


class Jumps(NamedTuple):
    """b_n and beta_n of the owned slices, and rho, which is read on the last rank only."""

    states: Float[Array, "owned state"]
    multipliers: Float[Array, "owned state"]
    terminal: Float[Array, " state"]


class Terminal(NamedTuple):
    """terminal'' along the directions, read on the last rank only."""

    by_state: Float[Array, "state directions"]


def correct(
    comm: TimeComm,
    owned: OwnedSlices,
    tangents: SliceTangents,
    jumps: Jumps,
    terminal: Terminal,
    directions: Float[Array, "state directions"],
) -> Edges:
    """The changes of states and multipliers at the edges of the owned slices.

    Collective over the line, inside jit. The first rank gathers 4 r^2 + 2 r numbers a slice and
    sends 2 r numbers an edge to all; neighbors exchange one state and one multiplier.

    Args:
        comm: Line of ranks along time.
        owned: The slices of this rank.
        tangents: Of the owned slices, along the directions.
        jumps: Of the owned slices.
        terminal: Second derivative of the terminal cost.
        directions: Orthonormal columns, (state, r).
    """
    rank = directions.shape[1]
    maps = jnp.stack([directions.T @ part for part in tangents], axis=1)
    seen = jnp.stack([jumps.states @ directions, jumps.multipliers @ directions], axis=1)
    packed = jnp.concatenate([maps.reshape(len(maps), -1), seen.reshape(len(seen), -1)], axis=1)
    closing = directions.T @ jnp.concatenate([terminal.by_state, jumps.terminal[:, None]], axis=1)
    closing = bcast_from(comm, closing, comm.size - 1)
    gathered = gather_to_first(comm, packed, owned.n_slices)
    coordinates = jnp.zeros((owned.n_slices + 1, 2, rank), directions.dtype)
    if gathered is not None:
        maps = gathered[:, : 4 * rank**2].reshape(-1, 4, rank, rank)
        seen = gathered[:, 4 * rank**2 :].reshape(-1, 2, rank)
        coordinates = solve_edges(maps, seen, closing)
    coordinates = bcast_from(comm, coordinates, 0)
    own = coordinates[owned.first : owned.first + owned.n_owned + 1]
    return _lift(comm, own, tangents, jumps, terminal)


def solve_edges(
    maps: Float[Array, "slices 4 rank rank"],
    jumps: Float[Array, "slices 2 rank"],
    closing: Float[Array, "rank rank_and_one"],
) -> Float[Array, "edges 2 rank"]:
    """Coordinates of the corrections at all edges. Local.

    From the last slice to the first, e_n = S_n a_n + s_n for the coordinates a of states and e of
    multipliers; then from the first to the last.

    Args:
        maps: P_y, P_l, Q_y, Q_l of every slice along the directions.
        jumps: b_n and beta_n along the directions.
        closing: S_N and, in the last column, s_N.
    """
    rank = maps.shape[-1]
    eye = jnp.eye(rank, dtype=maps.dtype)

    def back(closing, one):
        ((end_by_state, end_by_multiplier, start_by_state, start_by_multiplier), jump) = one
        matrix, offset = closing
        known = jnp.concatenate(
            [end_by_state, (end_by_multiplier @ offset + jump[0])[:, None]], axis=1
        )
        found = jnp.linalg.solve(eye - end_by_multiplier @ matrix, known)
        by_state, shift = found[:, :rank], found[:, rank]
        closing = (
            start_by_state + start_by_multiplier @ matrix @ by_state,
            start_by_multiplier @ (matrix @ shift + offset) + jump[1],
        )
        return closing, (closing, by_state, shift)

    last = closing[:, :rank], closing[:, rank]
    _, (closings, by_state, shifts) = jax.lax.scan(back, last, (maps, jumps), reverse=True)

    def forth(state, one):
        by_state, shift = one
        state = by_state @ state + shift
        return state, state

    first = jnp.zeros(rank, maps.dtype)
    _, after = jax.lax.scan(forth, first, (by_state, shifts))
    states = jnp.concatenate([first[None], after])
    matrices = jnp.concatenate([closings[0], last[0][None]])
    offsets = jnp.concatenate([closings[1], last[1][None]])
    multipliers = jnp.einsum("nij,nj->ni", matrices, states) + offsets
    return jnp.stack([states, multipliers], axis=1)


def _lift(
    comm: TimeComm, own: Array, tangents: SliceTangents, jumps: Jumps, terminal: Terminal
) -> Edges:
    """The whole corrections from their coordinates at the edges of the owned slices."""
    at_left, at_right = own[:-1, 0], own[1:, 1]

    def along(by_state, by_multiplier):
        return jnp.einsum("nij,nj->ni", by_state, at_left) + jnp.einsum(
            "nij,nj->ni", by_multiplier, at_right
        )

    states = along(tangents.end_by_state, tangents.end_by_multiplier) + jumps.states
    multipliers = along(tangents.start_by_state, tangents.start_by_multiplier) + jumps.multipliers
    last = terminal.by_state @ own[-1, 0] + jumps.terminal
    first = shift_right(comm, states[-1], jnp.zeros_like(states[-1]))
    last = shift_left(comm, multipliers[0], last)
    return Edges(jnp.concatenate([first[None], states]), jnp.concatenate([multipliers, last[None]]))
