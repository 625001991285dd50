"""Draw samples of a velocity field, parallel in time: the library call `nodepint_mpi.sample`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from nodepint_mpi.core.gaussian_paths import AbstractGaussianPath, gaussian_path_of
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.method_options import check_comm
from nodepint_mpi.parallel.methods.parareal import Parareal
from nodepint_mpi.parallel.methods.tangent import Tangent
from nodepint_mpi.parallel.noise import Noise
from nodepint_mpi.parallel.sampling import Sampling, SamplingCounts, count_work
from nodepint_mpi.parallel.solution import Solution

_PURPOSE = 0x53746172  # apart from the keys of Brownian paths, encoders, decoders and losses


class Drawn(NamedTuple):
    """Samples, and how they came about; equal on all ranks.

    `samples` and the `noise` they began as are (samples, *shape), `numbers` (samples,) what the
    noise follows from. `largest_jump` is the largest mismatch of any slice at the end, 0 for a
    serial solution and NaN where it was not evaluated.
    """

    samples: Float[Array, "samples *shape"]
    noise: Float[Array, "samples *shape"]
    numbers: Int[np.ndarray, " samples"]
    counts: SamplingCounts
    largest_jump: float
    solution: Solution


def sample(
    field: Field,
    shape: int | tuple[int, ...],
    numbers: Any,
    options: Sampling | None = None,
    *,
    args: PyTree = None,
    args_axes: Any = None,
    path: AbstractGaussianPath | None = None,
    comm: TimeComm | None = None,
) -> Drawn:
    """Draw samples: carry noise at time 0 to data at time 1 along a velocity field.

    Collective over `comm`; every rank must pass equal arguments, and gets all samples.

    The noise of a sample follows from `options.seed` and the number of the sample alone: it is the
    same for all methods, in any batch and on any number of ranks.

    Args:
        field: Velocity field `f(t, u, args)` of one sample.
        shape: Of a state.
        numbers: How many samples, the first ones; or an array of their numbers.
        options: Sampler, steps, method; `Sampling()` unless given.
        args: What the field gets, such as parameters and the class of each sample.
        args_axes: Axes of `args` that count samples, as `jax.vmap` takes them.
        path: The Gaussian path that the field belongs to: its own attribute `path` or the straight
            line unless given.
        comm: A line of ranks; the whole world unless given.

    Raises:
        ProblemError: on all ranks, if options, field and state do not fit together.
        NodepintError: on all ranks, as `solve` does.

    References:
        Shih et al. (2023), Parallel sampling of diffusion models, for Picard's iteration.
        Selvam, Merchant, Ermon (2024), Self-refining diffusion samplers, for parareal.
    """
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    options = (Sampling() if options is None else options).checked(int(np.prod(shape)))
    comm = check_comm(comm)
    numbers = _check_numbers(numbers)
    path = gaussian_path_of(field) if path is None else path
    check_end(path, options)
    start = initial_noise(options.seed, numbers, shape)
    drift, stochastic = partial(velocity_of, field), {}
    if options.sampler == "sde":
        drift = partial(stochastic_drift, field, path)
        noise = Noise(options.seed, numbers, additive=True)
        stochastic = {"diffusion": partial(diffusion, path), "noise": noise}
    solution = solve(
        drift,
        start,
        np.linspace(0.0, options.end, options.slices + 1),
        args=args,
        in_axes=(0, args_axes),
        comm=comm,
        **stochastic,
        **how(drift, options),
    )
    n_owned = max(
        len(own_slices(np.arange(options.slices + 1.0), comm.size, rank).indices)
        for rank in range(comm.size)
    )
    jumps = solution.jumps
    return Drawn(
        samples=solution.interface[-1],
        noise=start,
        numbers=numbers,
        counts=count_work(options, solution, n_owned),
        largest_jump=float(jumps[-1]) if len(jumps) else float("nan"),
        solution=solution,
    )


def initial_noise(
    seed: int, numbers: Int[np.ndarray, " samples"], shape: tuple[int, ...]
) -> Float[Array, "samples *shape"]:
    """Standard normal noise of the samples with these numbers. Local; the same in any batch."""
    key = jax.random.fold_in(jax.random.key(seed), _PURPOSE)
    return _draw(key, jnp.asarray(numbers), shape)


@partial(jax.jit, static_argnums=2)
def _draw(key, numbers, shape):
    dtype = jnp.zeros(()).dtype
    own = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(own)


# Fields are `functools.partial` of these, so that a compiled solve is found again.


def velocity_of(field: Any, t: Any, u: Any, args: PyTree) -> Any:
    """The drift of the probability-flow equation. Local."""
    return field(t, u, args)


def stochastic_drift(field: Any, path: AbstractGaussianPath, t: Any, u: Any, args: PyTree) -> Any:
    """The drift of the stochastic equation. Local."""
    return path.stochastic_drift(t, u, field(t, u, args))


def diffusion(path: AbstractGaussianPath, t: Any, u: Any, args: PyTree) -> Any:
    """That of the stochastic equation, the same for every number of the state. Local."""
    del args
    return jnp.broadcast_to(path.diffusion(t), u.shape).astype(u.dtype)


def how(drift: Field, options: Sampling) -> dict[str, Any]:
    """Propagators, method and stopping rule as `solve` takes them. Local."""
    how: dict[str, Any] = {"fine": options.fine(), "stopping": options.stopping()}
    if options.method == "serial":
        return how | {"method": "serial"}
    coarse = Propagator(drift, options.coarse_integrator())
    basis = options.basis()
    if basis is None:
        return how | {"method": Parareal(coarse)}
    is_newton = options.rank is None
    return how | {
        "method": Tangent(
            basis,
            Propagator(drift, options.tangent_integrator()),
            coarse=coarse,
            use_complement=options.complement and not is_newton,
            recycle=not is_newton,
            falls_back=False,
        )
    }


def _check_numbers(numbers: Any) -> Int[np.ndarray, " samples"]:
    numbers = np.asarray(numbers)
    if numbers.dtype.kind not in "iu" or numbers.ndim > 1 or (numbers.ndim and not numbers.size):
        raise ProblemError("`numbers` must be how many samples, or an array of their numbers.")
    if numbers.ndim == 0:
        if numbers < 1:
            raise ProblemError(f"`numbers` is {int(numbers)}; draw at least one sample.")
        numbers = np.arange(int(numbers))
    if np.any(numbers < 0) or np.any(numbers >= 2**31):
        raise ProblemError("`numbers` of samples must be at least 0 and less than 2^31.")
    return numbers.astype(np.int32)


def check_end(path: AbstractGaussianPath, options: Sampling) -> None:
    """Refuse an end where the noise of a path does not go smoothly to zero. Local.

    Raises:
        ProblemError: with what to give.
    """
    t = jnp.asarray(options.end, jnp.zeros(()).dtype)
    slope = jax.jvp(path.sigma, (t,), (jnp.ones_like(t),))[1]
    if not bool(jnp.isfinite(slope)):
        raise ProblemError(
            f"At t = {options.end:g} the noise of {type(path).__name__} ends with an infinite "
            "slope: give an `end` a little before, such as 0.999."
        )
