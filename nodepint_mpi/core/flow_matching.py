"""Losses that fit a velocity field from noise to data, without solving anything.

Both draw one time and one noise for each sample and compare the field with the path that leads from
this noise to this sample (`core.gaussian_paths`). What fits best on average is the mean velocity,
which carries one distribution to the other. A sample of the data is what the encoder makes of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from nodepint_mpi.core.batch import as_numbers
from nodepint_mpi.core.by_name import call
from nodepint_mpi.core.gaussian_paths import AbstractGaussianPath, gaussian_path_of
from nodepint_mpi.core.sample_params import SampleArgs

Misfit = Callable[[AbstractGaussianPath, Array, Array, Array, Array, Array], Array]


def flow_matching(
    model: Any, *, batch: Any, key: Key[Array, " samples"]
) -> Float[Array, " samples"]:
    """Mean squared error of the velocity. Local.

    For paths whose velocity is bounded: on the variance-preserving one the expectation diverges.

    Reference:
        Lipman et al. (2023), Flow matching for generative modeling, equation (9).
    """

    def misfit(path, t, x, velocity, noise, found):
        del path, t, x, noise
        return found - velocity

    return _of_samples(model, batch, key, misfit)


def denoising_score_matching(
    model: Any, *, batch: Any, key: Key[Array, " samples"]
) -> Float[Array, " samples"]:
    """Mean squared error of the noise, which is that of the score times sigma^2. Local.

    Reference:
        Vincent (2011), Neural Computation 23, 1661-1674; Ho, Jain, Abbeel (2020), Denoising
        diffusion probabilistic models, equation (14).
    """

    def misfit(path, t, x, velocity, noise, found):
        del velocity
        return path.noise(t, x, found) - noise

    return _of_samples(model, batch, key, misfit)


def _of_samples(model: Any, batch: Any, keys: Array, misfit: Misfit) -> Array:
    """The mean square of `misfit` at a random time of each sample."""
    path = gaussian_path_of(model.processor)

    def of_sample(own, static, key):
        for_time, for_noise, for_field = jax.random.split(key, 3)
        data = model.encoder(own)
        t = jax.random.uniform(for_time, (), data.dtype)
        noise = jax.random.normal(for_noise, data.shape, data.dtype)
        x, velocity = path.at(t, data, noise)
        args = None if static is None else SampleArgs(None, static)
        found = call(model.processor, t, x, args, offered={"key": for_field})
        return jnp.mean(jnp.square(misfit(path, t, x, velocity, noise, found)))

    own = as_numbers(jnp.asarray(batch.initial))
    static = None if batch.static is None else as_numbers(jnp.asarray(batch.static))
    return jax.vmap(of_sample)(own, static, keys)
