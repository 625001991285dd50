"""Time steps for state and multiplier together. Both schemes are implicit in both directions.

A step from (u_0, lambda_0) at t_0 to (u_1, lambda_1) at t_1 = t_0 + h leaves the residual

    u_1 - u_0 - h dH/dlambda,   lambda_0 - lambda_1 - h dH/du

and a scheme says where the two slopes are taken. Of nodes i = 0 ... M a step has the number of its
left one.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nodepint_mpi.errors import ProblemError
from nodepint_mpi.optimal_control.hamiltonian import Hamiltonian


class AbstractScheme(eqx.Module):
    """Where a step takes its slopes. Local."""

    @abc.abstractmethod
    def linearize(
        self,
        hamiltonian: Hamiltonian,
        ts: Float[Array, " nodes"],
        states: Float[Array, "nodes state"],
        multipliers: Float[Array, "nodes state"],
    ) -> tuple[Float[Array, "steps twice"], Float[Array, "steps twice twice"]]:
        """The slopes of every step, and their derivatives where they are taken."""

    @abc.abstractmethod
    def split(
        self, derivative: Float[Array, "twice twice"]
    ) -> tuple[Float[Array, "twice twice"], Float[Array, "twice twice"]]:
        """What of a step's derivative belongs to its left node and to its right node."""

    @abc.abstractmethod
    def control_points(
        self,
        ts: Float[Array, " nodes"],
        states: Float[Array, "nodes state"],
        multipliers: Float[Array, "nodes state"],
    ) -> tuple[Float[Array, " steps"], Float[Array, "steps state"], Float[Array, "steps state"]]:
        """Times, states and multipliers from which every step has its control."""


class ImplicitEuler(AbstractScheme):
    """Implicit Euler forward for the state and backward for the multiplier; order one.

    dH/dlambda is taken at the right node, dH/du at the left one, as in the reference of ParaOpt.
    """

    def linearize(self, hamiltonian, ts, states, multipliers):
        slopes, derivatives = jax.vmap(hamiltonian.linearize)(ts, states, multipliers)
        size = states.shape[1]
        return (
            jnp.concatenate([slopes[1:, :size], slopes[:-1, size:]], axis=1),
            jnp.concatenate([derivatives[1:, :size], derivatives[:-1, size:]], axis=1),
        )

    def split(self, derivative):
        is_upper = (jnp.arange(len(derivative)) < len(derivative) // 2)[:, None]
        zero = jnp.zeros_like(derivative)
        return jnp.where(is_upper, zero, derivative), jnp.where(is_upper, derivative, zero)

    def control_points(self, ts, states, multipliers):
        return ts[1:], states[1:], multipliers[1:]


class ImplicitMidpoint(AbstractScheme):
    """The implicit midpoint rule for both; order two, and symplectic.

    Its stationary points are those of the cost of the discrete problem, so that controls from it
    are what an optimizer of the piecewise constant control finds.
    """

    def linearize(self, hamiltonian, ts, states, multipliers):
        return jax.vmap(hamiltonian.linearize)(*self.control_points(ts, states, multipliers))

    def split(self, derivative):
        return 0.5 * derivative, 0.5 * derivative

    def control_points(self, ts, states, multipliers):
        return _middle(ts), _middle(states), _middle(multipliers)


def _middle(nodes: Array) -> Array:
    return 0.5 * (nodes[:-1] + nodes[1:])


SCHEMES = {"implicit_euler": ImplicitEuler, "implicit_midpoint": ImplicitMidpoint}


def make_scheme(name: str) -> AbstractScheme:
    """The scheme of a name. Local.

    Raises:
        ProblemError: if there is none.
    """
    if name not in SCHEMES:
        raise ProblemError(f"Unknown scheme {name!r}; choose from {', '.join(SCHEMES)}.")
    return SCHEMES[name]()
