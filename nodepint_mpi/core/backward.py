"""How far the continuous adjoint goes astray: states integrated backward against stored ones.

The adjoint ODE is solved backward in time together with the state, which starts at the stored end
of a slice and should arrive at the stored start. Where the flow contracts, backward it expands, and
the state that arrives is another one; the cotangents are then those of another trajectory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.sweeps import end_times, slice_distance
from nodepint_mpi.core.types import Block, Params


def is_continuous(propagator: Propagator) -> bool:
    """Whether derivatives are those of the adjoint ODE. Local."""
    return getattr(propagator.integrator, "adjoint", None) == "continuous"


def backward_drift(
    propagator: Propagator, params: Params, starts: Block, ends: Block, owned: OwnedSlices
) -> Float[Array, ""]:
    """Largest distance of a state integrated backward from the stored start of its slice. Local.

    Absolute, in the units of the state; infinite where the backward solve fails. With the steps of
    the propagator, at the price of one propagation of the block.
    """
    field = propagator.field

    def reversed_field(t, u, params):
        return jax.tree.map(jnp.negative, field(-t, u, params))

    backward = Propagator(reversed_field, propagator.integrator)
    times = end_times(owned, starts)
    times = times._replace(t0=-(times.t0 + times.length))
    arrived = jax.vmap(backward, in_axes=(None, *[0] * 5))(params, ends, *times).end
    distance = jnp.max(slice_distance(arrived, starts))
    return jnp.where(jnp.isfinite(distance), distance, jnp.inf)
