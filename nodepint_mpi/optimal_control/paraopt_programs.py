"""The compiled parts of a ParaOpt sweep: slices, correction, estimate, and what is gathered."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.optimal_control.correction import Edges, Jumps, Terminal, correct
from nodepint_mpi.optimal_control.hamiltonian import Hamiltonian
from nodepint_mpi.optimal_control.schemes import make_scheme
from nodepint_mpi.optimal_control.two_point import (
    SliceTangents,
    Solved,
    Trajectory,
    fixed_multiplier,
    slice_tangents,
    solve_two_point,
    terminal_condition,
)
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.exchange import bcast_from, gather_slices

N_POWERS = 24
"""Power iterations of the estimate; the last third of them counts."""


class Problem(eqx.Module):
    """What is solved: arrays in it are traced."""

    hamiltonian: Hamiltonian
    terminal: Any
    initial: Array
    directions: Array
    """Along which the slices are differentiated, (state, r)."""

    def along(self, directions: Array) -> "Problem":
        """The same with other directions. Local."""
        return Problem(self.hamiltonian, self.terminal, self.initial, directions)


class SliceReport(NamedTuple):
    """What each slice says of itself, of all slices and equal on all ranks, (slices,) each."""

    is_solved: Array
    is_coarse_solved: Array
    cost: Array
    jump: Array


class Propagated(NamedTuple):
    """The owned slices solved from their edges."""

    fine: Trajectory
    coarse: Trajectory
    tangents: SliceTangents
    jumps: Jumps
    terminal: Terminal
    report: SliceReport


class Gathered(NamedTuple):
    """The solution at all edges and nodes."""

    states: Array
    multipliers: Array
    node_states: Array
    node_multipliers: Array
    controls: Array


class Layout(NamedTuple):
    """What the compiled parts depend on besides numbers."""

    edges: tuple[float, ...]
    scheme: str
    n_steps: int
    n_coarse: int
    solves_coarse: bool


class SlicePrograms:
    """The parts of a sweep, to be jitted. `static` completes the arrays of a `Problem`.

    All are collective over the line, and to be called in the same order on all its ranks.
    """

    def __init__(self, comm: TimeComm, layout: Layout, static: Problem) -> None:
        self._comm, self._static = comm, static
        self._scheme = make_scheme(layout.scheme)
        edges = np.asarray(layout.edges)
        self._owned = own_slices(edges, comm.size, comm.rank)
        self._fine_ts = nodes_of(self._owned.edges, layout.n_steps)
        self._coarse_ts = nodes_of(self._owned.edges, layout.n_coarse)
        self._all_coarse_ts = np.append(nodes_of(edges, layout.n_coarse)[:, :-1], edges[-1])
        self._layout = layout

    def propagate(
        self, arrays: Problem, edges: Edges, fine: Trajectory, coarse: Trajectory, is_first: Array
    ) -> Propagated:
        """Solve the owned slices and differentiate the coarse ones.

        Args:
            arrays: Arrays of the problem.
            edges: States and multipliers at the edges of the owned slices.
            fine: Where to start from, at the fine nodes.
            coarse: The same at coarse nodes; the first time the fine solution is.
            is_first: Whether this is the first time.
        """
        problem, layout = self._whole(arrays), self._layout
        solved = self._solve(problem, self._fine_ts, fine, edges)
        fine, is_coarse_solved = solved.trajectory, jnp.ones_like(solved.is_solved)
        coarse_ts = self._fine_ts
        sampled = resample(fine, layout.n_coarse)
        if layout.solves_coarse:
            start = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), sampled, coarse)
            coarse_solved = self._solve(problem, self._coarse_ts, start, edges)
            sampled, is_coarse_solved = coarse_solved.trajectory, coarse_solved.is_solved
        coarse_ts = self._coarse_ts
        tangents = self._tangents(problem, coarse_ts, sampled, problem.directions)
        last = edges.states[-1]
        jumps = Jumps(
            fine.states[:, -1] - edges.states[1:],
            fine.multipliers[:, 0] - edges.multipliers[:-1],
            jax.grad(problem.terminal)(last) - edges.multipliers[-1],
        )
        report = self._report(problem, solved, is_coarse_solved, jumps, last)
        terminal = Terminal(along(problem.terminal, last, problem.directions))
        return Propagated(fine, sampled, tangents, jumps, terminal, report)

    def correct(self, arrays: Problem, edges: Edges, propagated: Propagated) -> tuple[Edges, Array]:
        """Corrected edges, and the squared norm of the changes at the right edge of every slice."""
        _, _, tangents, jumps, terminal, _ = propagated
        changes = correct(
            self._comm, self._owned, tangents, jumps, terminal, self._whole(arrays).directions
        )
        return jax.tree.map(jnp.add, edges, changes), self._squares(changes)

    def estimate(
        self, arrays: Problem, edges: Edges, propagated: Propagated
    ) -> Float[Array, " powers"]:
        """Factors by which sweeps of the linearized iteration change the norm of the error.

        The error of a sweep is (1 - M^-1 J) times that before, with Newton's matrix J, which has
        the derivatives of the fine slices, and M in its place: a power iteration.
        """
        problem, owned = self._whole(arrays), self._owned
        directions, terminal = problem.directions, propagated.terminal
        eye = jnp.eye(len(directions), dtype=directions.dtype)
        fine = self._tangents(problem, self._fine_ts, propagated.fine, eye)
        terminal_fine = along(problem.terminal, edges.states[-1], eye)

        def missed(exact, approximate, change):
            seen = change @ directions
            return _rows(exact, change) - _rows(approximate, seen)

        def power(error, _):
            at_left, at_right = error.states[:-1], error.multipliers[1:]
            coarse = propagated.tangents
            jumps = Jumps(
                missed(fine.end_by_state, coarse.end_by_state, at_left)
                + missed(fine.end_by_multiplier, coarse.end_by_multiplier, at_right),
                missed(fine.start_by_state, coarse.start_by_state, at_left)
                + missed(fine.start_by_multiplier, coarse.start_by_multiplier, at_right),
                terminal_fine @ error.states[-1]
                - terminal.by_state @ (error.states[-1] @ directions),
            )
            after = correct(self._comm, owned, coarse, jumps, terminal, directions)
            size = jnp.sqrt(jnp.sum(self._squares(after)))
            scale = jnp.where(size > 0, size, 1.0)
            return jax.tree.map(lambda part: part / scale, after), size

        # Drawn by global edge, so that it does not depend on the ranks.
        key, shape = jax.random.key(0), eye.shape[:1]
        drawn = [
            jax.vmap(
                lambda n, key=key: jax.random.normal(jax.random.fold_in(key, n), shape, eye.dtype)
            )(jnp.arange(owned.first, owned.first + owned.n_owned + 1))
            for key in jax.random.split(key)
        ]
        drawn[0] = jnp.where((jnp.arange(len(drawn[0])) + owned.first == 0)[:, None], 0.0, drawn[0])
        start = Edges(*drawn)
        size = jnp.sqrt(jnp.sum(self._squares(start)))
        _, sizes = jax.lax.scan(
            power, jax.tree.map(lambda part: part / size, start), length=N_POWERS
        )
        return sizes

    def gather(self, arrays: Problem, edges: Edges, fine: Trajectory) -> Gathered:
        """Everything at all edges and nodes, on all ranks."""
        problem, n_slices = self._whole(arrays), self._owned.n_slices
        points = jax.vmap(self._scheme.control_points)(jnp.asarray(self._fine_ts), *fine)
        controls = jax.vmap(jax.vmap(problem.hamiltonian.control))(*points)

        def joined(lefts, rights):
            """All left ends, and the last right one: (slices, nodes, numbers) to rows."""
            lefts, rights = (gather_slices(self._comm, part, n_slices) for part in (lefts, rights))
            flat = lefts.reshape(-1, lefts.shape[-1])
            return jnp.concatenate([flat, rights[-1:]])

        def from_right(rights, lefts):
            rights, lefts = (gather_slices(self._comm, part, n_slices) for part in (rights, lefts))
            flat = rights.reshape(-1, rights.shape[-1])
            return jnp.concatenate([lefts[:1], flat])

        controls = gather_slices(self._comm, controls, n_slices)
        return Gathered(
            joined(edges.states[:-1, None], edges.states[1:]),
            from_right(edges.multipliers[1:, None], edges.multipliers[:-1]),
            joined(fine.states[:, :-1], fine.states[:, -1]),
            from_right(fine.multipliers[:, 1:], fine.multipliers[:, 0]),
            controls.reshape(-1, controls.shape[-1]),
        )

    def solve_coarse(self, arrays: Problem, start: Trajectory) -> Solved:
        """The whole problem by coarse steps, from a start at all coarse nodes.

        The first rank computes it and sends it to all.
        """
        problem, comm = self._whole(arrays), self._comm
        solved = Solved(start, jnp.asarray(True), jnp.asarray(0))
        if comm.rank == 0:
            solved = solve_two_point(
                self._scheme, problem.hamiltonian, jnp.asarray(self._all_coarse_ts), start,
                problem.initial, terminal_condition(problem.terminal),
            )  # fmt: skip
        return jax.tree.map(lambda part: bcast_from(comm, part, 0), solved)

    def _whole(self, arrays: Problem) -> Problem:
        return eqx.combine(arrays, self._static)

    def _solve(self, problem: Problem, ts: np.ndarray, start: Trajectory, edges: Edges) -> Solved:
        def one(ts, start, initial, multiplier):
            return solve_two_point(
                self._scheme, problem.hamiltonian, ts, start, initial, fixed_multiplier(multiplier)
            )

        dtype = edges.states.dtype
        return jax.vmap(one)(
            jnp.asarray(ts, dtype), start, edges.states[:-1], edges.multipliers[1:]
        )

    def _tangents(
        self, problem: Problem, ts: np.ndarray, along: Trajectory, directions: Array
    ) -> SliceTangents:
        def one(ts, along):
            return slice_tangents(self._scheme, problem.hamiltonian, ts, along, directions)

        return jax.vmap(one)(jnp.asarray(ts, directions.dtype), along)

    def _squares(self, changes: Edges) -> Array:
        """Squared norms at the right edge of every slice, of all slices."""
        squares = jnp.sum(changes.states[1:] ** 2 + changes.multipliers[1:] ** 2, axis=1)
        return gather_slices(self._comm, squares, self._owned.n_slices)

    def _report(
        self, problem: Problem, solved: Solved, is_coarse_solved: Array, jumps: Jumps, last: Array
    ) -> SliceReport:
        """Costs, with the terminal one in the last slice."""
        hamiltonian, ts = problem.hamiltonian, jnp.asarray(self._fine_ts, last.dtype)

        def running(t, u, multiplier):
            control = hamiltonian.control(t, u, multiplier)
            return jnp.asarray(hamiltonian.running(t, u, control))

        points = jax.vmap(self._scheme.control_points)(ts, *solved.trajectory)
        costs = jnp.sum(jnp.diff(ts, axis=1) * jax.vmap(jax.vmap(running))(*points), axis=1)
        is_last = jnp.arange(len(ts)) + self._owned.first == self._owned.n_slices - 1
        costs = costs + jnp.where(is_last, jnp.asarray(problem.terminal(last)), 0.0)
        largest = jnp.maximum(
            jnp.max(jnp.abs(jumps.states), axis=1), jnp.max(jnp.abs(jumps.multipliers), axis=1)
        )
        rows = jnp.stack(
            [
                solved.is_solved.astype(last.dtype),
                is_coarse_solved.astype(last.dtype),
                costs,
                jnp.where(is_last, jnp.maximum(largest, jnp.max(jnp.abs(jumps.terminal))), largest),
            ],
            axis=1,
        )
        return SliceReport(*gather_slices(self._comm, rows, self._owned.n_slices).T)


def nodes_of(edges: np.ndarray, n_steps: int) -> np.ndarray:
    """The nodes of every slice, (slices, n_steps + 1). Local."""
    parts = np.linspace(0.0, 1.0, n_steps + 1)
    return edges[:-1, None] + np.diff(edges)[:, None] * parts


def resample(trajectory: Trajectory, n_steps: int) -> Trajectory:
    """Trajectories of slices at another number of nodes, by linear interpolation. Local."""
    n_given = trajectory.states.shape[1] - 1
    position = np.arange(n_steps + 1) * n_given / n_steps
    left = np.minimum(position.astype(int), n_given - 1)
    share = (position - left)[None, :, None]

    def part(nodes):
        weight = jnp.asarray(share, nodes.dtype)
        return (1 - weight) * nodes[:, left] + weight * nodes[:, left + 1]

    return Trajectory(part(trajectory.states), part(trajectory.multipliers))


def along(terminal: Any, state: Array, directions: Array) -> Array:
    """The second derivative of the terminal cost along directions, (state, r). Local."""
    by_state = jax.grad(terminal)
    return jax.vmap(
        lambda direction: jax.jvp(by_state, (state,), (direction,))[1], in_axes=1, out_axes=1
    )(directions)


def _rows(matrices: Array, vectors: Array) -> Array:
    return jnp.einsum("nij,nj->ni", matrices, vectors)
