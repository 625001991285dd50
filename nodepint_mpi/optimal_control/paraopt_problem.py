"""What is checked before ParaOpt begins, and where it begins: states, multipliers, directions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nodepint_mpi.errors import NonFiniteError, ProblemError
from nodepint_mpi.optimal_control.correction import Edges
from nodepint_mpi.optimal_control.hamiltonian import Hamiltonian, with_newton_steps
from nodepint_mpi.optimal_control.paraopt_options import ParaOpt
from nodepint_mpi.optimal_control.paraopt_programs import Problem
from nodepint_mpi.optimal_control.two_point import Trajectory


def make_problem(
    hamiltonian: Hamiltonian, terminal: Any, u0: Any, edges: np.ndarray, options: ParaOpt
) -> Problem:
    """The problem, with all that can be checked of it. Local; every rank reaches the same verdict.

    Raises:
        ProblemError: if shapes or costs cannot be used, or `tol` is out of reach.
        NonFiniteError: if `u0` holds NaN or infinity.
    """
    initial = jnp.asarray(u0)
    if not jnp.issubdtype(initial.dtype, jnp.floating):
        initial = initial.astype(jnp.asarray(0.0).dtype)
    if initial.ndim != 1 or not initial.size:
        raise ProblemError(f"`u0` has shape {initial.shape}; ParaOpt expects (state,).")
    _require_finite("u0", initial)
    resolution = 10 * float(jnp.finfo(initial.dtype).eps)
    if options.tol < resolution:
        raise ProblemError(
            f"`tol` = {options.tol:g} cannot be reached in {initial.dtype.name}: pass `u0` in "
            "double precision (`jax.config.update('jax_enable_x64', True)`), or a `tol` above "
            f"{resolution:.0e}."
        )
    if hamiltonian.n_controls < 1:
        raise ProblemError(f"`n_controls` is {hamiltonian.n_controls}; it must be 1 or more.")
    args = jax.tree.map(lambda leaf: _traced(leaf, initial), hamiltonian.args)
    hamiltonian = Hamiltonian(hamiltonian.field, hamiltonian.running, args, hamiltonian.n_controls)
    _check_shapes(hamiltonian, terminal, initial)
    hamiltonian = with_newton_steps(hamiltonian, float(edges[0]), initial)
    directions = jnp.eye(len(initial), dtype=initial.dtype)
    if options.basis is not None and not isinstance(options.basis, int):
        directions = _orthonormal(options.basis, initial)
    elif options.basis is not None:
        n_nodes = (len(edges) - 1) * options.n_coarse + 1
        most = min(len(initial), 2 * n_nodes)
        if not 1 <= options.basis <= most:
            raise ProblemError(
                f"`basis` is {options.basis}; it must be from 1 to {most}: the state has "
                f"{len(initial)} numbers, and the coarse solution {n_nodes} nodes."
            )
        directions = directions[:, : options.basis]
    return Problem(hamiltonian, terminal, initial, directions)


def make_start(initial: Array, target: Any, guess: tuple[Any, Any] | None, n_edges: int) -> Edges:
    """States and multipliers at all edges to start from. Local.

    Raises:
        ProblemError: if the shapes of `target` or `guess` do not fit.
        NonFiniteError: if they hold NaN or infinity.
    """
    if guess is not None:
        shape = n_edges, len(initial)
        parts = [_like("guess", part, initial, shape) for part in guess]
        if len(parts) != 2:
            raise ProblemError(f"`guess` has {len(parts)} parts; it needs states and multipliers.")
        return Edges(parts[0].at[0].set(initial), parts[1])
    share = jnp.linspace(0.0, 1.0, n_edges, dtype=initial.dtype)[:, None]
    end = initial if target is None else _like("target", target, initial, initial.shape)
    states = initial[None] + share * (end - initial)[None]
    return Edges(states, jnp.ones_like(states))


def straight(edges: Edges, n_steps: int) -> Trajectory:
    """Straight lines between edges, at the nodes of every slice. Local."""

    def lines(at_edges):
        share = jnp.linspace(0.0, 1.0, n_steps + 1, dtype=at_edges.dtype)[None, :, None]
        return (1 - share) * at_edges[:-1, None] + share * at_edges[1:, None]

    return Trajectory(lines(edges.states), lines(edges.multipliers))


def straight_line(edges: Edges, n_steps: int) -> Trajectory:
    """The same at the nodes of all slices, one after the other. Local."""

    def joined(slices, at_edges):
        return jnp.concatenate([slices[:, :-1].reshape(-1, slices.shape[-1]), at_edges[-1:]])

    slices = straight(edges, n_steps)
    return Trajectory(
        joined(slices.states, edges.states), joined(slices.multipliers, edges.multipliers)
    )


def pod(trajectory: Trajectory, rank: int) -> Float[Array, "state directions"]:
    """The leading singular vectors of states and multipliers, each divided by its norm. Local."""
    parts = [part / jnp.maximum(jnp.linalg.norm(part), 1e-300) for part in trajectory]
    _, _, rows = jnp.linalg.svd(jnp.concatenate(parts), full_matrices=False)
    return rows[:rank].T


def _check_shapes(hamiltonian: Hamiltonian, terminal: Any, initial: Array) -> None:
    time, control = jnp.zeros((), initial.dtype), jnp.zeros(hamiltonian.n_controls, initial.dtype)
    slope = jax.eval_shape(hamiltonian.field, time, initial, control, hamiltonian.args)
    if jax.tree.structure(slope) != jax.tree.structure(0) or slope.shape != initial.shape:
        raise ProblemError(
            f"`field` returns {slope}; it must return an array of the state's shape "
            f"{initial.shape}."
        )
    for name, cost in (
        ("running", jax.eval_shape(hamiltonian.running, time, initial, control)),
        ("terminal", jax.eval_shape(terminal, initial)),
    ):
        if jax.tree.structure(cost) != jax.tree.structure(0) or cost.shape != ():
            raise ProblemError(f"`{name}` returns {cost}; it must return one number.")


def _orthonormal(basis: Any, initial: Array) -> Array:
    given = np.asarray(basis, initial.dtype)
    if given.ndim != 2 or given.shape[0] != len(initial) or not 1 <= given.shape[1] <= len(initial):
        raise ProblemError(
            f"`basis` has shape {given.shape}; it must be (state, r) with state = {len(initial)} "
            f"and r from 1 to {len(initial)}."
        )
    _require_finite("basis", given)
    q, r = np.linalg.qr(given)
    size = np.abs(np.diag(r))
    if np.min(size) <= 1e3 * np.finfo(given.dtype).eps * np.max(size):
        raise ProblemError("The columns of `basis` are linearly dependent; leave some out.")
    return jnp.asarray(q)


def _like(name: str, given: Any, initial: Array, shape: tuple[int, ...]) -> Array:
    array = jnp.asarray(given, initial.dtype)
    if array.shape != shape:
        raise ProblemError(f"`{name}` has shape {array.shape}; expected {shape}.")
    _require_finite(name, array)
    return array


def _require_finite(name: str, array: Any) -> None:
    where = np.argwhere(~np.isfinite(np.asarray(array)))
    if len(where):
        raise NonFiniteError(
            f"`{name}` holds NaN or infinity, first in entry {tuple(map(int, where[0]))}."
        )


def _traced(leaf: Any, like: Array) -> Any:
    """Numbers as arrays, so that others do not compile again."""
    if isinstance(leaf, float):
        return jnp.asarray(leaf, like.dtype)
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
