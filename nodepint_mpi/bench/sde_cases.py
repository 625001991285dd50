"""Stochastic equations that `nodepint bench sde` solves, as data."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class SdeCase(NamedTuple):
    """dX = f(t, X, args) dt + g(t, X, args) dW in the sense of Ito, for one number X.

    `exact`, where there is one, is the solution at the end from `(args, start, horizon, W)`.
    """

    drift: Callable
    diffusion: Callable
    args: dict[str, float]
    start: float
    horizon: float
    additive: bool = False
    exact: Callable[[dict[str, Array], float, float, Array], Array] | None = None


def _of_brownian(args, start, horizon, w):
    """X exp((mu - sigma^2 / 2) T + sigma W)."""
    exponent = (args["mu"] - args["sigma"] ** 2 / 2) * horizon + args["sigma"] * w
    return start * jnp.exp(exponent)


def _constant(t, u, args):
    return args["sigma"] * jnp.ones_like(u)


SDE_CASES = {
    "geometric": SdeCase(
        lambda t, u, args: args["mu"] * u, lambda t, u, args: args["sigma"] * u,
        {"mu": -1.0, "sigma": 1.0}, 1.0, 1.0, exact=_of_brownian,
    ),
    "mean_reverting": SdeCase(
        lambda t, u, args: -args["rate"] * u, _constant,
        {"rate": 1.0, "sigma": 0.5}, 1.0, 4.0, additive=True,
    ),
    "sine": SdeCase(
        lambda t, u, args: args["rate"] * jnp.sin(u),
        lambda t, u, args: args["sigma"] * jnp.sqrt(1 + u**2),
        {"rate": 1.0, "sigma": 0.3}, 1.0, 2.0,
    ),
    "periodic": SdeCase(
        lambda t, u, args: jnp.sin(args["rate"] * u), _constant,
        {"rate": 2.0, "sigma": 1.0}, 1.0, 1.0, additive=True,
    ),
    "double_well": SdeCase(
        lambda t, u, args: args["rate"] * (u - u**3), _constant,
        {"rate": 1.0, "sigma": 0.5}, 1.0, 10.0, additive=True,
    ),
}  # fmt: skip
"""Geometric Brownian motion, an Ornstein-Uhlenbeck process, and three without a closed form."""
