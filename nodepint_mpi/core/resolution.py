"""Whether the times that a field is given can be told apart in the precision of the state."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nodepint_mpi.core.partition import SLICE_RESOLUTION
from nodepint_mpi.core.propagators import AbstractIntegrator, FixedSteps
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError

STEP_RESOLUTION = 1e-2
"""Largest distance of neighboring floating-point times, as a share of a fixed step."""


def check_field_resolution(
    field: Field,
    params: Any,
    state: jax.ShapeDtypeStruct | Array,
    edges: np.ndarray,
    integrators: list[AbstractIntegrator],
) -> None:
    """Refuse a field of t where t cannot be resolved in the state's precision. Local.

    Steps are taken in the time since the start of a slice and so do not depend on where it lies,
    but a field that reads t is given all of it, in the state's precision.

    Args:
        field: Vector field `f(t, u, params)`.
        params: Its parameters: arrays or their shapes.
        state: Shape and type of the state.
        edges: Slice boundaries, double precision.
        integrators: The steps over one slice, fine and coarse.

    Raises:
        ProblemError: if the field reads t and neighboring numbers near the latest time are further
            apart than `STEP_RESOLUTION` of a step (`SLICE_RESOLUTION` of a slice if steps adapt).
    """
    dtype = np.dtype(jnp.finfo(state.dtype).dtype)
    spacing = float(np.spacing(np.max(np.abs(edges)).astype(dtype)))
    shortest = float(np.min(np.diff(edges)))
    steps = [
        STEP_RESOLUTION * shortest / steps.n_steps
        if isinstance(steps, FixedSteps)
        else SLICE_RESOLUTION * shortest
        for steps in integrators
    ]
    if spacing <= min(steps) or not reads_time(field, params, state):
        return
    latest = edges[np.argmax(np.abs(edges))]
    most = max([steps.n_steps for steps in integrators if isinstance(steps, FixedSteps)], default=1)
    raise ProblemError(
        f"The field depends on t, and near t = {latest:g} numbers of type {dtype.name} are "
        f"{spacing:g} apart where a step is {shortest / most:g} long: count time from a later "
        "origin, or compute in float64."
    )


def reads_time(field: Field, params: Any, state: jax.ShapeDtypeStruct | Array) -> bool:
    """Whether du/dt depends on t, as far as the traced program shows. Local.

    True where in doubt: for t inside loops and branches.
    """
    t = jax.ShapeDtypeStruct((), jnp.finfo(state.dtype).dtype)
    dynamic, static = eqx.partition(params, _is_array)

    def of_time(t, u, dynamic):
        return jax.tree.leaves(field(t, u, eqx.combine(dynamic, static)))

    return any(_marked(jax.make_jaxpr(of_time)(t, state, dynamic).jaxpr, [True]))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct) or eqx.is_array(leaf)


def _marked(jaxpr: Any, reads: list[bool]) -> list[bool]:
    """Which outputs depend on the inputs that are marked; the last ones are not."""
    marked = {id(var) for var, read in zip(jaxpr.invars, reads, strict=False) if read}
    for equation in jaxpr.eqns:
        inputs = [id(var) in marked for var in equation.invars]
        if not any(inputs):
            continue
        outputs = [True] * len(equation.outvars)
        if equation.primitive.name in ("jit", "pjit"):
            outputs = _marked(equation.params["jaxpr"].jaxpr, inputs)
        marked |= {id(var) for var, out in zip(equation.outvars, outputs, strict=True) if out}
    return [id(var) in marked for var in jaxpr.outvars]
