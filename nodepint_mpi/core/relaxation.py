"""Relaxed continuity: slices that start between where the last one ended and what was observed.

    U[n+1] = F_n(w U[n] + (1 - w) D[n]),   D[n] the observed state at edge n, U[0] as it is

Where a sample was not observed around an edge its trajectory is continuous there.

With weight w = 0 every slice is fitted by itself from data (multiple shooting without matching),
with w = 1 the trajectory is continuous. In between errors are damped from slice to slice, and
gradients with them, so that long oscillations do not lock the fit into a flat minimum; training
takes w from 0 to 1.

Reference:
    Hess, Monfared, Brenner, Durstewitz (2023), ICML, "Generalized teacher forcing for learning
    chaotic dynamics"; multiple shooting: Bock, Plitt (1984), IFAC Proc. 17, 1603-1608.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.sample_params import SamplePropagator
from nodepint_mpi.core.types import Params
from nodepint_mpi.errors import ProblemError

Solver = TypeVar("Solver", bound=eqx.Module)


class RelaxedParams(NamedTuple):
    """Parameters of the field, the weight w, and the observed states at all edges.

    `known` says which samples were observed around which edge; all if None.
    """

    field: Params
    weight: Float[Array, ""]
    observed: Inexact[Array, "edges *state"]
    known: Float[Array, "edges samples"] | None = None


class RelaxedPropagator(SamplePropagator):
    """A propagator whose slices start relaxed if it is given `RelaxedParams`, else as ever."""

    def __call__(self, params, start, t0, length, ts, index=None):
        if not isinstance(params, RelaxedParams):
            return super().__call__(params, start, t0, length, ts, index)
        weight = jnp.where(index == 0, 1.0, params.weight).astype(start.dtype)
        if params.known is not None:
            known = params.known[index].reshape(-1, *[1] * (start.ndim - 1))
            weight = jnp.where(known > 0, weight, 1.0)
        relaxed = weight * start + (1 - weight) * params.observed[index]
        return super().__call__(params.field, relaxed, t0, length, ts, index)


def with_propagators(solver: Solver, kind: Callable[..., Propagator]) -> Solver:
    """The same solver with propagators that `kind` makes of (field, integrator). Local."""

    def wrap(part):
        return kind(part.field, part.integrator) if isinstance(part, Propagator) else part

    return jax.tree.map(wrap, solver, is_leaf=lambda part: isinstance(part, Propagator))


def edge_weights(times: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Matrix (edges, times) of the linear interpolation from observation times to edges. Local.

    Raises:
        ProblemError: if a slice starts where nothing was observed.
    """
    if times[0] > edges[0] or times[-1] < edges[-2]:
        raise ProblemError(
            f"Observations run from {times[0]:g} to {times[-1]:g}; relaxed slices need them from "
            f"{edges[0]:g} to {edges[-2]:g}, where the last one starts."
        )
    return np.stack([np.interp(edges, times, unit) for unit in np.eye(len(times))], axis=1)
