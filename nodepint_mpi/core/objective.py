"""Losses and metrics as (sum, count) pairs, so that they reduce exactly over ranks and batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Inexact, Shaped

from nodepint_mpi.errors import ProblemError


class Mean(eqx.Module):
    """A mean in the making."""

    sum: Float[Array, ""]
    count: Float[Array, ""]

    def value(self) -> float:
        """The mean, once all parts are in. Local."""
        return float(self.sum) / float(self.count)


class RootOfMean(Mean):
    """The square root of a mean in the making."""

    def value(self) -> float:
        return math.sqrt(super().value())


Loss = Callable[..., Mean]
"""`loss(predictions, targets)`, both with leading axes (times, samples); what else of `OFFERED` it
takes by name it is given."""

OFFERED = ("mask", "weights", "times", "model", "batch", "key")
"""What a loss or metric may take by name.

`mask` is of the targets' shape and false where nothing was observed, `weights` and `times` are
(times, samples), `model` has encoder, processor and decoder, `batch` is the `SampleBatch`, and
`key` holds one of JAX's keys for each sample of a training step, else it is None. `mask` and
`weights` are None where all counts alike.
"""

Some = Bool[Array, "*shape"] | None
Weights = Float[Array, "times samples"] | None


def mean_of(values: Array, mask: Some, weights: Weights) -> Mean:
    """The weighted mean of what is there. Local."""
    if mask is None and weights is None:
        return Mean(jnp.sum(values), jnp.asarray(values.size, values.dtype))
    counts = jnp.ones_like(values) if mask is None else mask.astype(values.dtype)
    if weights is not None:
        counts = counts * weights.reshape(*weights.shape, *[1] * (values.ndim - 2))
    return Mean(jnp.sum(jnp.where(counts > 0, counts * values, 0.0)), jnp.sum(counts))


def where_known(mask: Some, values: Array, instead: float) -> Array:
    """Values with a harmless number where nothing was observed, so that no derivative is NaN.

    Local.
    """
    return values if mask is None else jnp.where(mask, values, instead)


def _errors(predictions: Array, targets: Array, mask: Some) -> Array:
    if predictions.shape != targets.shape:  # else they would be broadcast, if they can be
        raise ProblemError(
            f"Predictions of shape {predictions.shape} cannot be compared with observations of "
            f"shape {targets.shape}. With `noise.n_paths` take a loss and metrics of several "
            "paths, such as 'energy_score'."
        )
    return where_known(mask, predictions - targets, 0.0)


def mean_squared_error(
    predictions: Inexact[Array, "*shape"],
    targets: Inexact[Array, "*shape"],
    *,
    mask: Some = None,
    weights: Weights = None,
) -> Mean:
    """Squared error, averaged over times, samples and components."""
    return mean_of(jnp.square(_errors(predictions, targets, mask)), mask, weights)


def mean_squared_log_error(
    predictions: Inexact[Array, "*shape"],
    targets: Inexact[Array, "*shape"],
    *,
    mask: Some = None,
    weights: Weights = None,
) -> Mean:
    """Squared difference of logarithms: for positive quantities, relative errors count."""
    logs = (jnp.log(where_known(mask, values, 1.0)) for values in (predictions, targets))
    return mean_squared_error(*logs, mask=mask, weights=weights)


def cross_entropy(
    logits: Inexact[Array, "*shape classes"],
    labels: Shaped[Array, "*shape"],
    *,
    mask: Some = None,
    weights: Weights = None,
) -> Mean:
    """Cross entropy of integer labels, averaged over times and samples."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return mean_of(losses, mask, weights)


def accuracy(
    logits: Inexact[Array, "*shape classes"],
    labels: Shaped[Array, "*shape"],
    *,
    mask: Some = None,
    weights: Weights = None,
) -> Mean:
    """Share of samples whose largest logit is at the label."""
    return mean_of((jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype), mask, weights)


def relative_error(
    predictions: Inexact[Array, "*shape"],
    targets: Inexact[Array, "*shape"],
    *,
    mask: Some = None,
    weights: Weights = None,
) -> RootOfMean:
    """Relative L2 error: the norm of all errors together over that of all targets."""
    errors = mean_of(jnp.square(_errors(predictions, targets, mask)), mask, weights)
    wanted = mean_of(jnp.square(where_known(mask, targets, 0.0)), mask, weights)
    return RootOfMean(errors.sum, wanted.sum)


class Term(NamedTuple):
    """What is added to the loss, `weight` times: a function of the model and, by name, of `batch`
    and `key`, that returns one number, or one for each sample, of which the mean is taken."""

    function: Callable
    weight: float


@dataclass(frozen=True)
class SimulationFree:
    """A loss for which nothing is solved, where a loss is expected; also a decorator of one.

    `function(model)`, which may take `batch` and `key` by name, returns one number for each sample,
    of which the mean is taken. `key` holds a random key for each sample, in evaluation the same
    each time.
    """

    function: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def nothing(loss: Loss, predictions: Array | jax.ShapeDtypeStruct, targets: Array) -> Mean:
    """What `loss` makes of no samples; of what is given only shapes and types are read."""
    made = jax.eval_shape(loss, predictions, targets)
    return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), made)


def per_sample(function: Callable) -> Callable:
    """Apply a function of one sample over two leading axes (times, samples)."""
    return jax.vmap(jax.vmap(function))
