"""The equation that the caller of `solve` states, as fields of arrays."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.core.stochastic import NoisyArgs
from nodepint_mpi.parallel.method_options import Fields, MethodOptions
from nodepint_mpi.parallel.noise import Noise, axes_of_paths, check_noise
from nodepint_mpi.parallel.problem import floats_as_arrays
from nodepint_mpi.parallel.samples import lay_out_samples


class Equation(NamedTuple):
    """Arguments of `solve`, by the same names."""

    u0: PyTree
    args: PyTree = None
    diffusion: Any = None
    noise: Noise | None = None
    in_axes: Any = None
    n_batch_axes: int = 0


class Stated(NamedTuple):
    """An equation whose parts fit together: `args` as fields get them, with the keys of the paths
    where there is noise, and the initial states as one array."""

    args: PyTree
    initial: Array
    fields: Fields
    n_batch_axes: int


def state_equation(equation: Equation, edges: np.ndarray, options: MethodOptions) -> Stated:
    """Check an equation and lay it out. Local.

    Args:
        equation: As the caller gives it.
        edges: Slice boundaries, checked.
        options: Those whose steps must fit the noise, checked.

    Raises:
        ProblemError: if state, arguments, noise and steps do not fit together.
        NonFiniteError: if a state holds NaN or infinity.
    """
    noise, in_axes, args = equation.noise, equation.in_axes, floats_as_arrays(equation.args)
    names = "fine", "coarse", "tangents", "method"
    steps = {name: getattr(options, name) for name in names}
    stochastic = check_noise(noise, equation.diffusion, steps)
    if noise is not None:
        args = NoisyArgs(args, noise.keys())
        in_axes = axes_of_paths(in_axes, noise)
    initial, layout, samples, n_batch_axes = lay_out_samples(
        equation.u0, args, in_axes, equation.n_batch_axes
    )
    state = jax.ShapeDtypeStruct(initial.shape, initial.dtype)
    fields = Fields(layout, float(edges[0]), args, state, samples, stochastic)
    return Stated(args, initial, fields, n_batch_axes)
