"""Initial-value problems from the literature, with the constants of published runs."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError


class Problem(NamedTuple):
    """du/dt = field(t, u, args), u(span[0]) = initial."""

    field: Field
    args: dict[str, float]
    initial: np.ndarray
    span: tuple[float, float]


def dahlquist(t, u, args):
    """u' = rate u."""
    return args["rate"] * u


def lotka_volterra(t, u, args):
    """Prey and predator: x' = alpha x - beta x y, y' = delta x y - gamma y."""
    x, y = u
    return jnp.stack(
        [args["alpha"] * x - args["beta"] * x * y, args["delta"] * x * y - args["gamma"] * y]
    )


def duffing(t, u, args):
    """Damped oscillator x'' + delta x' + alpha x + beta x^3 = 0, as (x, x')."""
    x, v = u
    return jnp.stack([v, -args["delta"] * v - args["alpha"] * x - args["beta"] * x**3])


def fitzhugh_nagumo(t, u, args):
    """Excitable membrane: x' = c (x - x^3/3 + y), y' = -(x - a + b y) / c."""
    x, y = u
    a, b, c = args["a"], args["b"], args["c"]
    return jnp.stack([c * (x - x**3 / 3 + y), -(x - a + b * y) / c])


def rossler(t, u, args):
    """x' = -y - z, y' = x + a y, z' = b + z (x - c)."""
    x, y, z = u
    return jnp.stack([-y - z, x + args["a"] * y, args["b"] + z * (x - args["c"])])


def lorenz(t, u, args):
    """x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z."""
    x, y, z = u
    return jnp.stack([args["sigma"] * (y - x), x * (args["rho"] - z) - y, x * y - args["beta"] * z])


def burgers(t, u, args):
    """Viscous Burgers u_t = nu u_xx - u u_x, central differences on a wrapped grid of step dx."""
    right, left = jnp.roll(u, -1), jnp.roll(u, 1)
    diffusion = args["nu"] * (right - 2 * u + left) / args["dx"] ** 2
    return diffusion - u * (right - left) / (2 * args["dx"])


def _burgers_problem() -> Problem:
    x = np.linspace(-1.0, 1.0, 128)
    initial = 0.5 * (np.cos(4.5 * np.pi * x) + 1.0)
    return Problem(burgers, {"nu": 0.01, "dx": 2.0 / 127}, initial, (0.0, 5.0))


PROBLEMS: dict[str, Problem] = {
    "dahlquist": Problem(dahlquist, {"rate": -1.0}, np.array([1.0]), (0.0, 1.0)),
    "lotka_volterra": Problem(
        lotka_volterra,
        {"alpha": 1.5, "beta": 1.0, "gamma": 3.0, "delta": 1.0},
        np.array([1.0, 1.0]),
        (0.0, 10.0),
    ),
    "duffing": Problem(
        duffing, {"alpha": -1.0, "beta": 1.0, "delta": 0.3}, np.array([1.0, 0.0]), (0.0, 10.0)
    ),
    "fitzhugh_nagumo": Problem(
        fitzhugh_nagumo, {"a": 0.2, "b": 0.2, "c": 3.0}, np.array([-1.0, 1.0]), (0.0, 40.0)
    ),
    "rossler": Problem(
        rossler, {"a": 0.2, "b": 0.2, "c": 5.7}, np.array([0.0, -6.78, 0.02]), (0.0, 340.0)
    ),
    "lorenz": Problem(
        lorenz,
        {"sigma": 10.0, "rho": 28.0, "beta": 8.0 / 3.0},
        np.array([-15.0, -15.0, 20.0]),
        (0.0, 18.0),
    ),
    "burgers": _burgers_problem(),
}
"""Problems by name, with the constants of the published parareal runs."""


def scale_to_box(problem: Problem, low: Any, high: Any) -> Problem:
    """The same problem in the coordinates that map the box [low, high] to [-1, 1]^d. Local.

    Raises:
        ProblemError: if the box has no volume or another dimension than the state.
    """
    low, high = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    if not {low.shape, high.shape} <= {(), problem.initial.shape}:
        raise ProblemError(
            f"The box has corners of shape {low.shape} and {high.shape}; give single numbers or "
            f"the shape of the state, {problem.initial.shape}."
        )
    if not np.all(high > low):
        raise ProblemError("The box needs `low` < `high` in every component.")
    half = (high - low) / 2
    scaled = _ScaledField(problem.field, tuple(np.ravel(low)), tuple(np.ravel(half)))
    return problem._replace(field=scaled, initial=(problem.initial - low) / half - 1)


@dataclass(frozen=True)
class _ScaledField:
    """A field seen in scaled coordinates. Hashable, so that a solve is compiled once."""

    field: Field
    low: tuple[float, ...]
    half: tuple[float, ...]

    def __call__(self, t, u, args):
        low, half = (
            jnp.broadcast_to(jnp.asarray(side, dtype=u.dtype), u.size).reshape(u.shape)
            for side in (self.low, self.half)
        )
        return self.field(t, low + (u + 1) * half, args) / half
