"""Pontryagin's principle: the control, and the slopes, as functions of state and multiplier.

With H(t, u, lambda, c) = lambda . f(t, u, c) + l(t, u, c) the optimal control is where H is
smallest, and then  du/dt = dH/dlambda,  dlambda/dt = -dH/du,  lambda(T) = terminal'(u(T)).

Reference:
    Bryson, Ho (1975), Applied Optimal Control, section 2.3.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from nodepint_mpi.core.types import Scalar
from nodepint_mpi.errors import ProblemError

NEWTON_STEPS = 12
"""Newton steps for the control where the Hamiltonian is not quadratic in it."""

QUADRATIC_TOL = 1e-6
"""Largest relative change of the second derivative with the control of what passes as quadratic."""


class Hamiltonian(eqx.Module):
    """lambda . f + l, its smallest value over the control, and the slopes there. Local.

    `n_newton` steps of Newton's method from zero find the control: one is exact where the
    Hamiltonian is quadratic in it. Derivatives of the slopes are total: the control
    moves with state and multiplier.
    """

    field: Callable[..., Any]
    running: Callable[..., Any]
    args: PyTree
    n_controls: int = eqx.field(static=True)
    n_newton: int = eqx.field(static=True, default=1)

    def __call__(
        self,
        t: Scalar,
        u: Float[Array, " state"],
        multiplier: Float[Array, " state"],
        control: Float[Array, " controls"],
    ) -> Scalar:
        """The Hamiltonian."""
        slope = jnp.asarray(self.field(t, u, control, self.args))
        return jnp.dot(multiplier, slope) + jnp.asarray(self.running(t, u, control))

    def control(
        self, t: Scalar, u: Float[Array, " state"], multiplier: Float[Array, " state"]
    ) -> Float[Array, " controls"]:
        """Where the Hamiltonian is smallest.

        Its derivative is that of the implicit function: the second derivative by the control is
        taken as a constant, since differentiating it would cost as much as all else together.
        """

        def of_control(control):
            return self(t, u, multiplier, control)

        def step(_, control):
            hessian = jax.lax.stop_gradient(jax.hessian(of_control)(control))
            return control - jnp.linalg.solve(hessian, jax.grad(of_control)(control))

        control = jnp.zeros(self.n_controls, u.dtype)
        if self.n_newton > 1:
            control = jax.lax.fori_loop(0, self.n_newton - 1, step, control)
        control = jax.lax.stop_gradient(step(0, control))
        return step(0, control)

    def slopes(
        self, t: Scalar, u: Float[Array, " state"], multiplier: Float[Array, " state"]
    ) -> Float[Array, " twice"]:
        """dH/dlambda and dH/du, one after the other."""
        control = self.control(t, u, multiplier)
        by_state = jax.grad(self, argnums=1)(t, u, multiplier, control)
        return jnp.concatenate([jnp.asarray(self.field(t, u, control, self.args)), by_state])

    def linearize(
        self, t: Scalar, u: Float[Array, " state"], multiplier: Float[Array, " state"]
    ) -> tuple[Float[Array, " twice"], Float[Array, "twice twice"]]:
        """The slopes, and their derivative by state and multiplier."""

        def of_both(both):
            slopes = self.slopes(t, *jnp.split(both, 2))
            return slopes, slopes

        derivative, slopes = jax.jacfwd(of_both, has_aux=True)(jnp.concatenate([u, multiplier]))
        return slopes, derivative


def with_newton_steps(hamiltonian: Hamiltonian, t: float, u: Array) -> Hamiltonian:
    """The same, with the number of Newton steps that the control needs. Local, outside of jit.

    Decided where multipliers are one: at that point and two controls.

    Args:
        hamiltonian: Of any number of steps.
        t: A time.
        u: A state, (state,).

    Raises:
        ProblemError: if the Hamiltonian has no smallest value over the control there.
    """
    time, multiplier = jnp.asarray(t, u.dtype), jnp.ones_like(u)

    @jax.jit
    def hessians():
        second = jax.hessian(hamiltonian, argnums=3)
        zero = jnp.zeros(hamiltonian.n_controls, u.dtype)
        return jnp.stack([second(time, u, multiplier, zero + at) for at in (0.0, 1.0)])

    at_zero, at_one = np.asarray(hessians())
    size = np.max(np.abs(at_zero))
    smallest = float(np.min(np.linalg.eigvalsh(at_zero))) if np.isfinite(size) else np.nan
    if not smallest > 1e-12 * max(size, np.finfo(at_zero.dtype).tiny):
        raise ProblemError(
            "The second derivative of multiplier . field + running by the control has the smallest "
            f"eigenvalue {smallest:g} at the start (t = {t:g}, controls 0, multipliers 1), so no "
            "control is best: the running cost needs a term in every control, such as "
            "`0.5 * alpha * jnp.sum(c**2)` with a positive `alpha`."
        )
    is_quadratic = bool(np.max(np.abs(at_one - at_zero)) <= QUADRATIC_TOL * size)
    return Hamiltonian(
        hamiltonian.field,
        hamiltonian.running,
        hamiltonian.args,
        hamiltonian.n_controls,
        1 if is_quadratic else NEWTON_STEPS,
    )
