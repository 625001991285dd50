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


def heat(t, u, args):
    """u_t = kappa u_xx by central differences on a grid of step dx, u = 0 at both ends."""
    padded = jnp.pad(u, 1)
    return args["kappa"] * (padded[2:] - 2 * u + padded[:-2]) / args["dx"] ** 2


def kuramoto(t, u, args):
    """Coupled phases: u_i' = w_i + (coupling / d) sum_j sin(u_j - u_i).

    The frequencies w_i are spread evenly over [-spread, spread]. The sum over j is an imaginary
    part, that of exp(-i u_i) z with the order parameter z = mean_j exp(i u_j).
    """
    frequencies = args["spread"] * jnp.linspace(-1.0, 1.0, u.size, dtype=u.dtype)
    sine, cosine = jnp.sin(u), jnp.cos(u)
    pull = jnp.mean(sine) * cosine - jnp.mean(cosine) * sine
    return frequencies + args["coupling"] * pull


def image_field(t, u, args):
    """A neural field of images (height, width, 2): u' = gain w2 * tanh(w1 * u) - decay u.

    Convolutions `*` with fixed random 3 x 3 kernels on a wrapped grid, 8 channels in between.
    """
    first, second = (jnp.asarray(kernel, dtype=u.dtype) for kernel in _KERNELS)
    change = _convolve(second, jnp.tanh(_convolve(first, u)))
    return args["gain"] * change - args["decay"] * u


def _convolve(kernel, image):
    """A 3 x 3 kernel (3, 3, in, out) on an image (height, width, in) whose edges are joined."""
    shifts = [(i, j) for i in range(3) for j in range(3)]
    return sum(jnp.roll(image, (1 - i, 1 - j), axis=(0, 1)) @ kernel[i, j] for i, j in shifts)


def _random_kernels(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    first, second = random.normal(size=(3, 3, 2, 8)), random.normal(size=(3, 3, 8, 2))
    return first / np.sqrt(9 * 2), second / np.sqrt(9 * 8)


_KERNELS = _random_kernels(0)


def burgers_problem(d: int, nu: float, span: tuple[float, float] = (0.0, 5.0)) -> Problem:
    """Burgers' equation on d points of [-1, 1] with viscosity nu, from a wavy start. Local."""
    x = np.linspace(-1.0, 1.0, d)
    initial = 0.5 * (np.cos(4.5 * np.pi * x) + 1.0)
    return Problem(burgers, {"nu": nu, "dx": 2.0 / (d - 1)}, initial, span)


def heat_problem(d: int, span: tuple[float, float] = (0.0, 0.1)) -> Problem:
    """Heat on d inner points of [0, 1]: a smooth bump with a little square wave on it. Local."""
    x = np.arange(1, d + 1) / (d + 1)
    initial = np.sin(np.pi * x) + 0.1 * np.sign(np.sin(9.5 * np.pi * x))
    return Problem(heat, {"kappa": 1.0, "dx": 1.0 / (d + 1)}, initial, span)


def kuramoto_problem(d: int, span: tuple[float, float] = (0.0, 20.0)) -> Problem:
    """d phases that start spread over the circle and fall into step. Local."""
    golden = (np.sqrt(5.0) - 1) / 2
    initial = 2 * np.pi * (golden * np.arange(d) % 1.0)
    return Problem(kuramoto, {"coupling": 2.0, "spread": 1.0}, initial, span)


def image_problem(n: int, span: tuple[float, float] = (0.0, 4.0)) -> Problem:
    """A neural field on n x n images of two channels, from waves of both directions. Local."""
    x, y = np.meshgrid(np.arange(n) / n, np.arange(n) / n, indexing="ij")
    initial = np.stack([np.sin(2 * np.pi * (x + y)), np.cos(2 * np.pi * (x - 2 * y))], axis=-1)
    return Problem(image_field, {"gain": 2.0, "decay": 0.5}, initial, span)


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
    "burgers": burgers_problem(128, 0.01),
    "burgers_1024": burgers_problem(1024, 0.002, (0.0, 2.0)),
    "heat": heat_problem(128),
    "kuramoto": kuramoto_problem(100),
    "image_field": image_problem(8),
}
"""Problems by name; up to `burgers` with the constants of the published parareal runs."""


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
