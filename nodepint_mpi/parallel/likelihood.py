"""Likelihood of data under a velocity field: the library call `nodepint_mpi.log_likelihood`.

    d log p(x) / dt = -div v(t, x)  along  dx/dt = v(t, x)

is integrated from the data at time 1 back to the noise at time 0, parallel in time.

References:
    Chen et al. (2018), Neural ordinary differential equations, theorem 1.
    Grathwohl et al. (2019), FFJORD; Song et al. (2021), section 4.3 and appendix D.2.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from nodepint_mpi.core.gaussian_paths import AbstractGaussianPath, gaussian_path_of
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.generate import check_end, how, velocity_of
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.method_options import check_comm
from nodepint_mpi.parallel.sampling import Sampling
from nodepint_mpi.parallel.solution import Solution

_PURPOSE = 0x50726F62  # apart from the keys of initial noise and Brownian paths


class LogLikelihood(NamedTuple):
    """Log densities in nats, (samples,), and the noise that the data came from, (samples, *shape).

    Equal on all ranks.
    """

    values: Float[Array, " samples"]
    noise: Float[Array, "samples *shape"]
    solution: Solution

    def bits_per_dimension(self, scale: float = 1.0) -> Float[Array, " samples"]:
        """Negative, in bits for each number, of data that were multiplied by `scale` before. Local.

        Gray levels of 256 steps mapped to [-1, 1] have a scale of 2 / 256 for each step.
        """
        size = math.prod(self.noise.shape[1:])
        return -self.values / (size * math.log(2)) - math.log2(scale)


def log_likelihood(
    field: Field,
    data: Any,
    options: Sampling | None = None,
    *,
    n_probes: int | None = None,
    args: PyTree = None,
    args_axes: Any = None,
    path: AbstractGaussianPath | None = None,
    comm: TimeComm | None = None,
) -> LogLikelihood:
    """Log densities of data by the probability-flow equation, parallel in time.

    Collective over `comm`; every rank must pass equal arguments.

    Args:
        field: Velocity field `f(t, u, args)` of one sample.
        data: States at the time `options.end`, (samples, *shape).
        options: Steps and method, as of `sample`; `sampler` must be "ode".
        n_probes: Random sign vectors per sample by which the divergence is estimated, fixed by
            `options.seed` and the row: an unbiased estimate with some variance. Exact unless given,
            by as many derivatives as a state has numbers.
        args: What the field gets.
        args_axes: Axes of `args` that count samples.
        path: The Gaussian path: that of the field or the straight line unless given.
        comm: A line of ranks; the whole world unless given.

    Raises:
        ProblemError: on all ranks, if options, field and data do not fit together.
    """
    data = jnp.asarray(data, jnp.zeros(()).dtype)
    if data.ndim < 2 or not data.size:
        raise ProblemError(f"`data` has shape {data.shape}; expected (samples, *shape).")
    size = math.prod(data.shape[1:])
    options = (Sampling() if options is None else options).checked(size)
    if options.sampler != "ode":
        raise ProblemError("A likelihood needs the probability-flow equation: `sampler='ode'`.")
    if n_probes is not None and (isinstance(n_probes, bool) or n_probes < 1):
        raise ProblemError(f"`n_probes` is {n_probes!r}; expected a whole number from 1 on.")
    check_end(gaussian_path_of(field) if path is None else path, options)
    signs = None
    if n_probes is not None:
        rows = np.arange(len(data), dtype=np.int32)
        signs = _draw_signs(options.seed, rows, (n_probes, *data.shape[1:]))
    drift = partial(backwards, partial(velocity_of, field), options.end)
    solution = solve(
        drift,
        {"x": data, "log_density": jnp.zeros(len(data), data.dtype)},
        np.linspace(0.0, options.end, options.slices + 1),
        args=(args, signs),
        in_axes=(0, (args_axes, None if signs is None else 0)),
        comm=check_comm(comm),
        **how(drift, options),
    )
    noise = solution.interface["x"][-1]
    squares = jnp.sum(jnp.square(noise.reshape(len(noise), -1)), axis=1)
    of_noise = -squares / 2 - size / 2 * math.log(2 * math.pi)
    return LogLikelihood(of_noise + solution.interface["log_density"][-1], noise, solution)


def backwards(field: Any, end: float, since: Any, state: Any, args: Any) -> Any:
    """State and log density against time, from the data. Local."""
    own, signs = args

    def velocity(x):
        return field(end - since, x, own)

    x = state["x"]
    if signs is None:
        flat = x.reshape(-1)
        slopes = jax.jacfwd(lambda flat: velocity(flat.reshape(x.shape)).reshape(-1))(flat)
        value, divergence = velocity(x), jnp.trace(slopes)
    else:
        value, push = jax.linearize(velocity, x)
        divergence = jnp.mean(jax.vmap(lambda sign: jnp.sum(sign * push(sign)))(signs))
    return {"x": -value, "log_density": -divergence}


@partial(jax.jit, static_argnums=(0, 2))
def _draw_signs(seed: int, rows: Array, shape: tuple[int, ...]) -> Array:
    """Random signs of these samples, (samples, *shape); the same in any batch."""
    key = jax.random.fold_in(jax.random.key(seed), _PURPOSE)
    own = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    dtype = jnp.zeros(()).dtype
    return jax.vmap(lambda key: jax.random.rademacher(key, shape, dtype))(own)
