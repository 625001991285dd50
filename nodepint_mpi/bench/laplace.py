"""Laplace's equation controlled at a boundary: DP against DAL, and DAL with the wrong data.

On the unit square u = sin 2 pi x below, u = sinh(2 pi y) / (2 pi cosh 2 pi) at both sides, and the
control c(x) above. The cost is the integral of (u_y(x, 1) - cos 2 pi x)^2, zero for
c* = sin(2 pi x) / cosh 2 pi + cos(2 pi x) tanh(2 pi) / (2 pi). Steady, so nothing is solved in
time; it is here for what it says about the two gradients.

Reference:
    Nzoyem, Barton, Deakin (2023), SC-W, arXiv:2310.02286, sections 3 and 4.1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

N_POINTS, STEPS, RATE = 100, 500, 1e-2
KINDS = "DP", "DAL", "DAL, wrong data"


def _matrix(n: int) -> np.ndarray:
    """Minus Laplace's operator on the (n - 2)^2 inner points of the square, five points each."""
    inner, one = n - 2, np.eye(n - 2)
    second = 2 * one - np.eye(inner, k=1) - np.eye(inner, k=-1)
    return np.kron(second, one) + np.kron(one, second)


class Square:
    """The discrete problem, its inverse computed once by fast sine transforms.

    Arrays on the square are (y, x), n points each way, the boundary included.
    """

    def __init__(self, n: int):
        self.n, self.h = n, 1.0 / (n - 1)
        self.x = jnp.linspace(0.0, 1.0, n)
        k = np.arange(1, n - 1)
        self.sines = jnp.asarray(np.sin(np.pi * np.outer(k, k) / (n - 1)) * np.sqrt(2 / (n - 1)))
        values = 2 - 2 * np.cos(np.pi * k / (n - 1))
        self.values = jnp.asarray(values[:, None] + values[None])
        self.below = jnp.sin(2 * jnp.pi * self.x)
        self.sides = jnp.sinh(2 * jnp.pi * self.x) / (2 * jnp.pi * jnp.cosh(2 * jnp.pi))
        self.wanted = jnp.cos(2 * jnp.pi * self.x)

    def solve(self, below: Array, above: Array, sides: Array) -> Array:
        """The harmonic function with these boundary values, (n, n). Local."""
        right = jnp.zeros((self.n - 2, self.n - 2))
        right = right.at[0].add(below[1:-1]).at[-1].add(above[1:-1])
        right = right.at[:, 0].add(sides[1:-1]).at[:, -1].add(sides[1:-1])
        waves = self.sines @ right @ self.sines / self.values
        u = jnp.zeros((self.n, self.n)).at[1:-1, 1:-1].set(self.sines @ waves @ self.sines)
        return u.at[:, 0].set(sides).at[:, -1].set(sides).at[0].set(below).at[-1].set(above)

    def slope_above(self, u: Array) -> Array:
        """u_y at y = 1 by three points, (n,). Local."""
        return (3 * u[-1] - 4 * u[-2] + u[-3]) / (2 * self.h)

    def mismatch(self, control: Array) -> Array:
        """u_y - cos 2 pi x above. Local."""
        return self.slope_above(self.solve(self.below, control, self.sides)) - self.wanted

    def cost(self, control: Array) -> Array:
        """The integral of its square, by the trapezoidal rule. Local."""
        return jnp.trapezoid(jnp.square(self.mismatch(control)), dx=self.h)

    def looped(self, control: Array, *, wrong: bool) -> Array:
        """Half of the gradient, as a density, by the adjoint equation. Local.

        The adjoint is harmonic, u_y - cos 2 pi x above, and zero on the sides that are not
        controlled; half of the cost's derivative is its own slope above. `wrong` gives it the
        values of u on those sides, as the published code does.
        """
        mismatch = self.mismatch(control)
        none = jnp.zeros_like(self.x)
        below, sides = (self.below, self.sides) if wrong else (none, none)
        return self.slope_above(self.solve(below, mismatch, sides))


def run_laplace(report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Final costs of Adam from c = 0 by each gradient. Local; alike on all ranks; needs x64.

    Args:
        report: Told about each row as it ends.
    """
    square = Square(N_POINTS)
    pulled = jax.grad(square.cost)
    gradients = {
        "DP": lambda c: pulled(c) / (2 * square.h),  # half of it as a density, like the others
        "DAL": lambda c: square.looped(c, wrong=False),
        "DAL, wrong data": lambda c: square.looped(c, wrong=True),
    }
    exact = jnp.sin(2 * jnp.pi * square.x) / jnp.cosh(2 * jnp.pi)
    exact += jnp.cos(2 * jnp.pi * square.x) * jnp.tanh(2 * jnp.pi) / (2 * jnp.pi)
    schedule = optax.piecewise_constant_schedule(RATE, {STEPS // 2: 0.1, 3 * STEPS // 4: 0.1})
    rows = []
    for kind, gradient in gradients.items():
        control = _descend(gradient, jnp.zeros(N_POINTS), optax.adam(schedule))
        rows.append(
            {
                "gradient": kind,
                "cost": float(square.cost(control)),
                "control_error": float(jnp.max(jnp.abs(control - exact))),
            }
        )
        report(f"laplace, {kind}: {rows[-1]['cost']:.3e}")
    return rows


def _descend(gradient: Callable, start: Array, optimizer: optax.GradientTransformation) -> Array:
    @jax.jit
    def steps(start: Array) -> Array:
        def step(carry, _):
            control, state = carry
            updates, state = optimizer.update(gradient(control), state)
            return (control + updates, state), None

        with jax.numpy_dtype_promotion("standard"):  # optax multiplies by its integer count
            (control, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=STEPS)
        return control

    return steps(start)


def format_laplace(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown. Local."""
    lines = ["| gradient | final cost | largest error of the control |", "|---|---|---|"]
    lines += [
        f"| {row['gradient']} | {row['cost']:.2e} | {row['control_error']:.1e} |" for row in rows
    ]
    return "\n".join(lines)
