"""Control problems with known solutions, or costs that others have reached."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nodepint_mpi.core.costs import Cost, quadratic_cost
from nodepint_mpi.core.propagators import AbstractIntegrator, FixedSteps
from nodepint_mpi.core.runge_kutta import RK4


class ControlCase(NamedTuple):
    """One problem: `field(t, u, c, args)`, steps of 16 slices, and the cost to compare with.

    `first` gives values at nodes to start from: where the control enters by its cube, zero is a
    stationary point. `reported` gives the published cost from states and controls at the step ends
    where that is not the cost that is minimized, the integral. `roughness` is the noise on the
    first values at nodes, and `pace` that of a network.
    """

    field: Callable
    start: tuple[float, ...]
    horizon: float
    cost: Cost
    n_controls: int
    fine: AbstractIntegrator
    coarse: AbstractIntegrator
    best: float
    first: Callable[[np.ndarray], np.ndarray] = np.zeros_like
    reported: Callable[[np.ndarray, np.ndarray], float] | None = None
    roughness: float = 0.0
    pace: float = 1.0


N_SLICES = 16


def minimum_energy(t: Array, u: Array, c: Array, args: Any) -> Array:
    """x' = y + c, y' = x."""
    return jnp.stack([u[1] + c[0], u[0]])


def scalar_linear(t: Array, u: Array, c: Array, args: Any) -> Array:
    """x' = rate x + c."""
    return args["rate"] * u + c


def cubed_force(t: Array, u: Array, c: Array, args: Any) -> Array:
    """x'' = c^3, as (x, x')."""
    return jnp.stack([u[1], c[0] ** 3])


def predator_prey(t: Array, u: Array, c: Array, args: Any) -> Array:
    """x' = x (a - b y) + c1, y' = y (b x - a) + c2."""
    x, y = u
    a, b = args["a"], args["b"]
    return jnp.stack([x * (a - b * y), y * (b * x - a)]) + c


def _mean_costs(weight: float) -> Callable[[np.ndarray, np.ndarray], float]:
    def reported(states: np.ndarray, controls: np.ndarray) -> float:
        x, v = states.T
        return float(np.mean((4 - x) ** 2 + 2 * v**2) + weight * np.mean(controls**2))

    return reported


def _braking(times: np.ndarray) -> np.ndarray:
    """First forward, then back."""
    return np.linspace(1.5, -1.0, len(times))


def _cubed_cost(weight: float, horizon: float) -> Cost:
    def running(t: Array, u: Array, c: Array) -> Array:
        return ((4 - u[0]) ** 2 + 2 * u[1] ** 2 + weight * c[0] ** 2) / horizon

    return Cost(running=running)


CONTROL_CASES: dict[str, ControlCase] = {
    "minimum energy": ControlCase(
        minimum_energy, (0.5, 0.5), 1.0,
        quadratic_cost(target=[1.0, -1.0], energy=2.0, reach=True), 1,
        FixedSteps(RK4(), 16), FixedSteps(diffrax.Heun(), 1), 70.4432414804,
    ),
    "linear-quadratic, stable": ControlCase(
        lambda t, u, c, args: -u + c, (1.0,), 1.0, quadratic_cost(running=1.0, energy=1.0), 1,
        FixedSteps(RK4(), 16), FixedSteps(diffrax.Heun(), 1), 0.192909298093,
    ),
    "linear-quadratic, unstable": ControlCase(
        lambda t, u, c, args: u + c, (1.0,), 1.0, quadratic_cost(running=1.0, energy=1.0), 1,
        FixedSteps(RK4(), 16), FixedSteps(diffrax.Heun(), 1), 0.844749195797,
    ),
    "cubed force, w = 1": ControlCase(
        cubed_force, (-4.0, 0.0), 8.0, _cubed_cost(1.0, 8.0), 1,
        FixedSteps(diffrax.Heun(), 50), FixedSteps(diffrax.Heun(), 5), 11.657,
        _braking, _mean_costs(1.0), 0.3, 10.0,
    ),
    "cubed force, w = 0.1": ControlCase(
        cubed_force, (-4.0, 0.0), 8.0, _cubed_cost(0.1, 8.0), 1,
        FixedSteps(diffrax.Heun(), 50), FixedSteps(diffrax.Heun(), 5), 11.420,
        _braking, _mean_costs(0.1), 0.3, 10.0,
    ),
}  # fmt: skip
"""Problems by name; `best` is exact, or the best cost known with one value for each step."""
