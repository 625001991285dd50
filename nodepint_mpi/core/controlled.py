"""Controlled equations by name, and a cost for phases."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nodepint_mpi.core.costs import Cost, Quadratic
from nodepint_mpi.core.problems import heat_problem, kuramoto, kuramoto_problem
from nodepint_mpi.errors import ProblemError


class ControlledProblem(NamedTuple):
    """du/dt = field(t, u, c, args), u(t0) = initial, with c of `n_controls` numbers."""

    field: Callable
    args: dict[str, float]
    initial: np.ndarray
    n_controls: int


class Additive(eqx.Module):
    """field(t, u, args) + B c, with a row of B for each number of the state."""

    field: Callable
    matrix: tuple[tuple[float, ...], ...] = eqx.field(static=True)

    def __call__(self, t: Array, u: Array, c: Array, args: Any) -> Array:
        change = self.field(t, u, args)
        matrix = jnp.asarray(np.asarray(self.matrix), change.dtype)
        if len(matrix) != u.size:
            raise ProblemError(
                f"`matrix` has {len(matrix)} rows, and the state {u.size} numbers: one row for "
                "each of them, one column for each control."
            )
        return change + (matrix @ c.astype(change.dtype)).reshape(change.shape)


def minimum_energy(t, u, c, args):
    """x' = y + c, y' = x."""
    return jnp.stack([u[1] + c[0], u[0]])


def cubed_force(t, u, c, args):
    """x'' = c^3, as (x, x')."""
    return jnp.stack([u[1], c[0] ** 3])


def inverted_pendulum(t, u, c, args):
    """A pole on a cart that is pushed by the force c, as (x, x', angle, angle'); 0 is upright.

    Barto, Sutton, Anderson (1983), IEEE Trans. Syst. Man Cybern. 13, 834-846, without friction,
    for a point mass `pole` at the distance `length`.
    """
    _, v, angle, omega = u
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    cart, pole, length, gravity = args["cart"], args["pole"], args["length"], args["gravity"]
    mass = cart + pole * sine**2
    push = (c[0] + pole * sine * (length * omega**2 - gravity * cosine)) / mass
    turn = (gravity * sine - push * cosine) / length
    return jnp.stack([v, push, omega, turn])


def heated_ends(t, u, c, args):
    """u_t = kappa u_xx on inner points of step dx; c are the values at both ends."""
    padded = jnp.concatenate([c[:1], u, c[1:]]).astype(u.dtype)
    return args["kappa"] * (padded[2:] - 2 * u + padded[:-2]) / args["dx"] ** 2


def paced_kuramoto(t, u, c, args):
    """Coupled phases (see `core.problems.kuramoto`) in a field of force that all of them feel:
    c1 cos u_i - c2 sin u_i is added to each."""
    pace = c[0] * jnp.cos(u) - c[1] * jnp.sin(u)
    return kuramoto(t, u, args) + pace.astype(u.dtype)


def _ends_problem(d: int) -> ControlledProblem:
    plain = heat_problem(d)
    return ControlledProblem(heated_ends, plain.args, np.zeros(d), 2)


def _kuramoto_problem(d: int) -> ControlledProblem:
    plain = kuramoto_problem(d)
    return ControlledProblem(paced_kuramoto, {"coupling": 0.5, "spread": 1.0}, plain.initial, 2)


CONTROLLED: dict[str, ControlledProblem] = {
    "minimum_energy": ControlledProblem(minimum_energy, {}, np.array([0.5, 0.5]), 1),
    "cubed_force": ControlledProblem(cubed_force, {}, np.array([-4.0, 0.0]), 1),
    "inverted_pendulum": ControlledProblem(
        inverted_pendulum, {"cart": 1.0, "pole": 0.3, "length": 0.5, "gravity": 9.81},
        np.array([0.0, 0.0, np.pi, 0.0]), 1,
    ),
    "heated_ends": _ends_problem(128),
    "paced_kuramoto": _kuramoto_problem(64),
}  # fmt: skip
"""Fields that take a control, by name. Every field of `core.problems` takes one by a matrix."""


class Incoherence(eqx.Module):
    """weight (1 - |z|^2) with the order parameter z = mean_j exp(i u_j) of phases u."""

    weight: float = eqx.field(static=True)

    def __call__(self, u: Array) -> Float[Array, ""]:
        coherence = jnp.mean(jnp.cos(u)) ** 2 + jnp.mean(jnp.sin(u)) ** 2
        return self.weight * (1 - coherence)


class _Along(eqx.Module):
    """The same along the trajectory, and the energy of the control."""

    incoherence: Incoherence | None
    energy: Quadratic

    def __call__(self, t: Array, u: Array, c: Array) -> Array:
        total = self.energy(t, u, c)
        return total if self.incoherence is None else total + self.incoherence(u)


def synchrony_cost(*, terminal: float = 0.0, running: float = 0.0, energy: float = 0.0) -> Cost:
    """terminal I(u(T)) + integral of running I(u) + energy / 2 |c|^2, I = 1 - |mean exp(i u)|^2.

    Local. I is 0 where all phases u are equal, and 1 where they are spread evenly.

    Args:
        terminal: Weight at the end.
        running: Weight along the trajectory.
        energy: Weight of the control.
    """
    return Cost(
        terminal=Incoherence(terminal) if terminal else None,
        running=_Along(Incoherence(running) if running else None, Quadratic(None, energy))
        if running or energy
        else None,
    )
