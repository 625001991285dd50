"""Losses and metrics as (sum, count) pairs, so that they reduce exactly over ranks and batches."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Inexact, Shaped


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


Loss = Callable[[Array, Array], Mean]
"""`loss(predictions, targets)`, both with leading axes (times, samples)."""


def mean_squared_error(
    predictions: Inexact[Array, "*shape"], targets: Inexact[Array, "*shape"]
) -> Mean:
    """Squared error, averaged over times, samples and components."""
    errors = jnp.square(predictions - targets)
    return Mean(jnp.sum(errors), jnp.asarray(errors.size, errors.dtype))


def mean_squared_log_error(
    predictions: Inexact[Array, "*shape"], targets: Inexact[Array, "*shape"]
) -> Mean:
    """Squared difference of logarithms: for positive quantities, relative errors count."""
    return mean_squared_error(jnp.log(predictions), jnp.log(targets))


def cross_entropy(
    logits: Inexact[Array, "*shape classes"], labels: Shaped[Array, "*shape"]
) -> Mean:
    """Cross entropy of integer labels, averaged over times and samples."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return Mean(jnp.sum(losses), jnp.asarray(losses.size, losses.dtype))


def accuracy(logits: Inexact[Array, "*shape classes"], labels: Shaped[Array, "*shape"]) -> Mean:
    """Share of samples whose largest logit is at the label."""
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
    return Mean(jnp.sum(hits), jnp.asarray(hits.size, hits.dtype))


def relative_error(
    predictions: Inexact[Array, "*shape"], targets: Inexact[Array, "*shape"]
) -> RootOfMean:
    """Relative L2 error: the norm of all errors together over that of all targets."""
    return RootOfMean(jnp.sum(jnp.square(predictions - targets)), jnp.sum(jnp.square(targets)))


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "mean_squared_error": mean_squared_error,
    "mean_squared_log_error": mean_squared_log_error,
}

METRICS: dict[str, dict[str, Loss]] = {
    "cross_entropy": {"accuracy": accuracy},
    "mean_squared_error": {"relative_error": relative_error},
    "mean_squared_log_error": {
        "mean_squared_error": mean_squared_error,
        "relative_error": relative_error,
    },
}
"""What is reported beside the loss."""


def nothing(loss: Loss, predictions: Array | jax.ShapeDtypeStruct, targets: Array) -> Mean:
    """What `loss` makes of no samples; of what is given only shapes and types are read."""
    made = jax.eval_shape(loss, predictions, targets)
    return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), made)


def per_sample(function: Callable) -> Callable:
    """Apply a function of one sample over two leading axes (times, samples)."""
    return jax.vmap(jax.vmap(function))
