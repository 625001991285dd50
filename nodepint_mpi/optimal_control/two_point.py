"""Two-point problems of state and multiplier: Newton's method, and derivatives by both ends.

The linear system of a Newton step couples neighboring nodes only. Going from right to left, the
multiplier is an affine function of the state, d lambda_i = S_i du_i + s_i: one step of 2d equations
gives (S_{i-1}, s_{i-1}) from (S_i, s_i), and du_i from du_{i-1}. So M steps cost M factorizations
of 2d x 2d matrices, and nothing larger is ever formed.

Reference:
    Ascher, Mattheij, Russell (1995), Numerical Solution of Boundary Value Problems for ODEs,
    section 7.2, for the decoupling; the recursion of S is the discrete Riccati equation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nodepint_mpi.optimal_control.hamiltonian import Hamiltonian
from nodepint_mpi.optimal_control.schemes import AbstractScheme

MAX_ITERATIONS = 40
"""Newton steps of a two-point problem; from a sound start it takes two to six."""


class Trajectory(NamedTuple):
    """States and multipliers at the nodes, (nodes, state) each, or with slices in front."""

    states: Float[Array, "*slices nodes state"]
    multipliers: Float[Array, "*slices nodes state"]


class Closing(NamedTuple):
    """d lambda = S du + s at the right end, the boundary condition there."""

    matrix: Float[Array, "state state"]
    offset: Float[Array, "state columns"]


class Solved(NamedTuple):
    """A trajectory, whether it solves its problem, and the Newton steps that took."""

    trajectory: Trajectory
    is_solved: Bool[Array, "*slices"]
    n_iterations: Int[Array, "*slices"]


class SliceTangents(NamedTuple):
    """Derivatives of a slice: its end state P and start multiplier Q by its start state and end
    multiplier, along given directions of both: (state, directions) each."""

    end_by_state: Float[Array, "*slices state directions"]
    end_by_multiplier: Float[Array, "*slices state directions"]
    start_by_state: Float[Array, "*slices state directions"]
    start_by_multiplier: Float[Array, "*slices state directions"]


def fixed_multiplier(multiplier: Float[Array, " state"]) -> Callable[[Trajectory], Closing]:
    """The right end of a slice: its multiplier is given. Local."""

    def close(trajectory):
        size = len(multiplier)
        missing = multiplier - trajectory.multipliers[-1]
        return Closing(jnp.zeros((size, size), multiplier.dtype), missing[:, None])

    return close


def terminal_condition(terminal: Callable) -> Callable[[Trajectory], Closing]:
    """The end of the horizon: the multiplier is the derivative of the terminal cost. Local."""

    def close(trajectory):
        state, multiplier = trajectory.states[-1], trajectory.multipliers[-1]
        missing = jax.grad(terminal)(state) - multiplier
        return Closing(jax.hessian(terminal)(state), missing[:, None])

    return close


def solve_two_point(
    scheme: AbstractScheme,
    hamiltonian: Hamiltonian,
    ts: Float[Array, " nodes"],
    start: Trajectory,
    initial: Float[Array, " state"],
    close: Callable[[Trajectory], Closing],
) -> Solved:
    """Newton's method for the state given at the left end and a condition at the right. Local.

    Stops when a step is below eps^(2/3) of the largest number, where the next would be round-off;
    also at numbers that are not finite, which are then no solution.

    Args:
        scheme: Where steps take their slopes.
        hamiltonian: Of the problem.
        ts: Nodes, in the unit of time.
        start: Where to start from.
        initial: The state at the left end.
        close: The condition at the right end, linearized.
    """
    tol = float(jnp.finfo(initial.dtype).eps) ** (2 / 3)

    def step(carry):
        trajectory, _, n_iterations = carry
        steps = _linearize(scheme, hamiltonian, ts, trajectory)
        missing = (initial - trajectory.states[0])[:, None]
        by_state, by_multiplier = _solve_linear(scheme, steps, missing, close(trajectory))
        trajectory = Trajectory(
            trajectory.states + by_state[..., 0], trajectory.multipliers + by_multiplier[..., 0]
        )
        change = _largest(Trajectory(by_state, by_multiplier)) / (1 + _largest(trajectory))
        return trajectory, change, n_iterations + 1

    def is_open(carry):
        _, change, n_iterations = carry
        return (change > tol) & (n_iterations < MAX_ITERATIONS)  # not where it is NaN

    first = start, jnp.asarray(jnp.inf, initial.dtype), jnp.asarray(0)
    trajectory, change, n_iterations = jax.lax.while_loop(is_open, step, first)
    return Solved(trajectory, change <= tol, n_iterations)


def slice_tangents(
    scheme: AbstractScheme,
    hamiltonian: Hamiltonian,
    ts: Float[Array, " nodes"],
    trajectory: Trajectory,
    directions: Float[Array, "state directions"],
) -> SliceTangents:
    """Derivatives of the ends of a slice, linearized along a trajectory. Local."""
    steps = _linearize(scheme, hamiltonian, ts, trajectory)
    size = len(directions)
    eye = jnp.eye(size, dtype=directions.dtype)

    def prepend(carry, step):
        closing, end_by_state, end_by_multiplier = carry
        closing, by_state, offset = _eliminate(scheme, closing, step)
        end_by_multiplier = end_by_multiplier + end_by_state @ offset
        return (closing, end_by_state @ by_state, end_by_multiplier), None

    homogeneous = steps._replace(residual=jnp.zeros_like(steps.residual))
    last = Closing(jnp.zeros_like(eye), directions), eye, jnp.zeros_like(directions)
    (closing, end_by_state, end_by_multiplier), _ = jax.lax.scan(
        prepend, last, homogeneous, reverse=True
    )
    return SliceTangents(
        end_by_state @ directions, end_by_multiplier, closing.matrix @ directions, closing.offset
    )


class _Steps(NamedTuple):
    """The linear equations of all steps."""

    width: Float[Array, "*steps"]
    residual: Float[Array, "*steps twice"]
    derivative: Float[Array, "*steps twice twice"]


def _linearize(
    scheme: AbstractScheme, hamiltonian: Hamiltonian, ts: Array, trajectory: Trajectory
) -> _Steps:
    slopes, derivatives = scheme.linearize(hamiltonian, ts, *trajectory)
    widths = jnp.diff(ts)
    states, multipliers = trajectory
    changes = [states[1:] - states[:-1], multipliers[:-1] - multipliers[1:]]
    residuals = jnp.concatenate(changes, axis=1) - widths[:, None] * slopes
    return _Steps(widths, residuals, derivatives)


def _solve_linear(
    scheme: AbstractScheme, steps: _Steps, initial: Array, closing: Closing
) -> tuple[Array, Array]:
    """Changes of states and multipliers at all nodes, (nodes, state, columns)."""

    def back(closing, step):
        left, by_state, offset = _eliminate(scheme, closing, step)
        return left, (left, by_state, offset)

    _, (closings, by_state, offsets) = jax.lax.scan(back, closing, steps, reverse=True)

    def forth(state, step):
        by_state, offset = step
        state = by_state @ state + offset
        return state, state

    _, after = jax.lax.scan(forth, initial, (by_state, offsets))
    states = jnp.concatenate([initial[None], after])
    matrices = jnp.concatenate([closings.matrix, closing.matrix[None]])
    return states, matrices @ states + jnp.concatenate([closings.offset, closing.offset[None]])


def _eliminate(
    scheme: AbstractScheme, closing: Closing, step: _Steps
) -> tuple[Closing, Array, Array]:
    """(S, s) at the left node of a step from those at its right node, and du there by du here."""
    size = len(closing.offset)
    eye = jnp.eye(size, dtype=closing.offset.dtype)
    zero = jnp.zeros_like(eye)
    at_left, at_right = scheme.split(step.width * step.derivative)
    left = jnp.block([[-eye, zero], [zero, eye]]) - at_left
    right = jnp.block([[eye, zero], [zero, -eye]]) - at_right
    unknown = jnp.concatenate(
        [left[:, size:], right[:, :size] + right[:, size:] @ closing.matrix], axis=1
    )
    known = -right[:, size:] @ closing.offset - step.residual[:, None]
    found = jnp.linalg.solve(unknown, jnp.concatenate([-left[:, :size], known], axis=1))
    left_closing = Closing(found[:size, :size], found[:size, size:])
    return left_closing, found[size:, :size], found[size:, size:]


def _largest(trajectory: Trajectory) -> Array:
    return jnp.maximum(
        jnp.max(jnp.abs(trajectory.states)), jnp.max(jnp.abs(trajectory.multipliers))
    )
