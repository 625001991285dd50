"""Losses of stochastic models: of predictions that have several paths a sample, and of none.

`energy_score` and `moment_error` compare the paths of a sample with what was observed of it. Both
are means over samples, times and pairs of paths without bias: what minimizes them does not depend
on the number of paths.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nodepint_mpi.core.objective import Mean, mean_of, relative_error, where_known
from nodepint_mpi.errors import ProblemError

Known = Bool[Array, "times samples *shape"] | None
Weights = Float[Array, "times samples"] | None


def energy_score(
    predictions: Float[Array, "times samples paths *shape"],
    targets: Float[Array, "times samples *shape"],
    *,
    mask: Known = None,
    weights: Weights = None,
) -> Mean:
    """E|X - y| - E|X - X'| / 2 over the paths X of a sample, averaged over times and samples.

    The norm is over what is observed at one time. A strictly proper score: its expectation is least
    where the paths have the distribution of y.

    Reference:
        Gneiting, Raftery (2007), J. Am. Stat. Assoc. 102, 359-378, equation (20).
    """
    n_paths = _count_paths("energy_score", predictions, targets)
    known = None if mask is None else mask[:, :, None]
    errors = where_known(known, predictions - targets[:, :, None], 0.0)
    first, second = jnp.triu_indices(n_paths, 1)
    apart = where_known(known, predictions[:, :, first] - predictions[:, :, second], 0.0)
    scores = jnp.mean(_norm(errors), axis=2) - jnp.mean(_norm(apart), axis=2) / 2
    seen = None if mask is None else jnp.any(mask.reshape(*mask.shape[:2], -1), axis=2)
    return mean_of(scores, seen, weights)


def moment_error(
    predictions: Float[Array, "times samples paths *shape"],
    targets: Float[Array, "times samples *shape"],
    *,
    mask: Known = None,
    weights: Weights = None,
) -> Mean:
    """(E X - y)^2 + (E X^2 - y^2)^2 over the paths X of a sample, averaged over all numbers.

    Its expectation is least where the paths have the mean and the second moment of y. Products of
    different paths stand for squares of means.
    """
    _count_paths("moment_error", predictions, targets)
    wanted = targets[:, :, None]
    first = _square_of_mean(predictions - wanted)
    second = _square_of_mean(jnp.square(predictions) - jnp.square(wanted))
    return mean_of(where_known(mask, first + second, 0.0), mask, weights)


def relative_error_of_mean(
    predictions: Float[Array, "times samples paths *shape"],
    targets: Float[Array, "times samples *shape"],
    *,
    mask: Known = None,
    weights: Weights = None,
) -> Mean:
    """Relative L2 error of the mean over the paths."""
    return relative_error(jnp.mean(predictions, axis=2), targets, mask=mask, weights=weights)


def euler_likelihood(model: Any, *, batch: Any) -> Float[Array, " samples"]:
    """The negative log-likelihood of the observed transitions, per observed number.

    For a term of the loss. Between observations at t and t + h of a state without encoder, diagonal
    noise makes a normal distribution of mean u + h f(t, u) and variance h g(t, u)^2 by one step of
    Euler-Maruyama. The field takes no inputs and no features. Nothing is simulated: there is
    nothing parallel in time about it.

    Reference:
        Florens-Zmirou (1989), Statistics 20, 547-557.
    """
    seen = jnp.asarray(batch.targets)
    times = jnp.asarray(batch.times, seen.dtype)
    known = jnp.ones(seen.shape, bool) if batch.mask is None else jnp.asarray(batch.mask)

    def of_transition(t0, t1, before, after, there):
        if getattr(model.processor, "diffusion", None) is None:
            raise ProblemError("`euler_likelihood` needs a vector field with a `diffusion`.")
        h = jnp.where(t1 > t0, t1 - t0, 1.0)  # rows are filled up at the end
        drift = model.processor(t0, before, None)
        spread = model.processor.diffusion(t0, before, None)
        variance = h * jnp.square(spread)
        misfit = jnp.square(after - before - h * drift) / variance
        values = (misfit + jnp.log(2 * jnp.pi * variance)) / 2
        counted = there & (t1 > t0)
        return jnp.sum(jnp.where(counted, values, 0.0)), jnp.sum(counted)

    def of_sample(times, seen, known):
        there = known[:-1] & known[1:]
        parts = jax.vmap(of_transition)(times[:-1], times[1:], seen[:-1], seen[1:], there)
        total, count = (jnp.sum(part) for part in parts)
        return total / jnp.maximum(count, 1)

    return jax.vmap(of_sample)(times, seen, known)


def _count_paths(name: str, predictions: Array, targets: Array) -> int:
    if predictions.ndim != targets.ndim + 1 or predictions.shape[2] < 2:
        raise ProblemError(
            f"`{name}` compares several paths of each sample with what was observed: set "
            "`noise.n_paths` to at least 2."
        )
    return predictions.shape[2]


def _norm(values: Array) -> Array:
    """Euclidean over what is observed at one time, with a derivative of zero at zero."""
    squares = jnp.sum(jnp.square(values).reshape(*values.shape[:3], -1), axis=3)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _square_of_mean(values: Array) -> Array:
    """The squared mean over the paths, without bias: the mean product of two different ones."""
    n_paths = values.shape[2]
    all_pairs, own = jnp.square(jnp.sum(values, axis=2)), jnp.sum(jnp.square(values), axis=2)
    return (all_pairs - own) / (n_paths * (n_paths - 1))
