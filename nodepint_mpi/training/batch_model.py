"""The model on a batch: what encoder, field, decoder and loss are given of its samples."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nodepint_mpi.core.batch import SampleBatch, as_numbers
from nodepint_mpi.core.by_name import asked_for, call
from nodepint_mpi.core.objective import Term, per_sample
from nodepint_mpi.core.sample_params import FieldArgs, SampleArgs
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.models.networks import EncodeProcessDecode

ENCODER_TAKES = ("times", "mask", "static", "key")
"""What an encoder may take by name."""
DECODER_TAKES = ("static", "key")
"""What a decoder may take by name."""
FIELD_TAKES = ("key",)
"""What a vector field may take by name, besides `t`, `u` and `args`."""


def split_model(model: EncodeProcessDecode) -> tuple[PyTree, PyTree]:
    """Trainable arrays and everything else. Local."""
    return eqx.partition(model, eqx.is_inexact_array)


class BatchedField:
    """The processor as a vector field of a batch, with its parameters as `args`. Local."""

    def __init__(self, static: PyTree):
        self._static = static

    def __call__(self, t: Any, u: Array, params: PyTree) -> Array:
        """The slopes of all samples, (samples, *state)."""
        processor = eqx.combine(params, self._static)
        return jax.vmap(lambda sample: slope_of(processor, t, sample, None, None))(u)

    def of_sample(self, t: Any, u: Array, args: FieldArgs) -> Array:
        """The slope of one sample, which gets its own inputs and features if it has any."""
        own = args.own if jax.tree.leaves(args.own) else None
        return slope_of(eqx.combine(args.params, self._static), t, u, own, args.key)

    def diffusion_of_sample(self, t: Any, u: Array, args: FieldArgs) -> Array:
        """What the noise of one sample is multiplied with."""
        own = args.own if jax.tree.leaves(args.own) else None
        return eqx.combine(args.params, self._static).diffusion(t, u, own)


def slope_of(processor: Callable, t: Any, u: Any, args: SampleArgs | None, key: Any) -> Any:
    """The vector field of one sample, which gets its key if it asks for one. Local."""
    return call(processor, t, u, args, offered={"key": key})


def takes_key(processor: Callable) -> bool:
    """Whether the vector field asks for a random key. Local."""
    return bool(asked_for(processor, 3, FIELD_TAKES))


def require_default_key(processor: Callable) -> None:
    """Outside training, and in diffrax, the vector field is called without a key. Local.

    Raises:
        ProblemError: if it cannot be.
    """
    if takes_key(processor):
        key = inspect.signature(processor).parameters["key"]
        if key.default is not None:
            raise ProblemError(
                "The vector field takes `key`, which only a training step has: write `key=None`, "
                "so that it is `f(t, u, args)` everywhere else."
            )


def sample_keys(seed: int, batch: SampleBatch) -> Array | None:
    """A random key for each sample in this step, whatever rank it is on; None outside training."""
    if batch.step is None:
        return None
    key = jax.random.fold_in(jax.random.key(seed), batch.step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(batch.rows))


def encode(model: EncodeProcessDecode, batch: SampleBatch, seed: int) -> Array:
    """Initial states (samples, *state). Local.

    An encoder that takes `times` or `mask` gets the whole series of targets, which are zero where
    there is none; `static` and `key` are of the sample.
    """
    names = asked_for(model.encoder, 1, ENCODER_TAKES)
    if not names:
        return jax.vmap(model.encoder)(as_numbers(jnp.asarray(batch.initial)))
    is_series = "times" in names or "mask" in names
    x = as_numbers(jnp.asarray(batch.targets if is_series else batch.initial))
    mask = jnp.ones(jnp.shape(batch.targets), bool) if batch.mask is None else batch.mask
    static = None if batch.static is None else as_numbers(jnp.asarray(batch.static))
    offered = {"mask": mask, "static": static, "key": sample_keys(seed, batch)}
    if batch.times is not None:
        offered["times"] = as_numbers(jnp.asarray(batch.times))
    given = {name: offered[name] for name in names}
    return jax.vmap(lambda x, given: model.encoder(x, **given))(x, given)


def decode(model: EncodeProcessDecode, states: Array, batch: SampleBatch, seed: int) -> Array:
    """Predictions from states (seen, samples, *state). Local.

    A decoder may take `static` and `key` of the sample by name.
    """
    decoder = model.decoder
    names = asked_for(decoder, 1, DECODER_TAKES)
    if not names:
        return per_sample(decoder)(states)
    offered = {
        "key": sample_keys(seed, batch),
        "static": None if batch.static is None else as_numbers(jnp.asarray(batch.static)),
    }
    given = {name: offered[name] for name in names}
    one_time = jax.vmap(lambda u, given: decoder(u, **given))
    return jax.vmap(lambda u: one_time(u, given))(states)


def decode_paths(
    model: EncodeProcessDecode, states: Array, batch: SampleBatch, seed: int, n_paths: int | None
) -> Array:
    """Predictions from states (seen, samples, paths, *state), or without `n_paths`. Local."""
    if n_paths is None:
        return decode(model, states, batch, seed)
    of_paths = jax.vmap(lambda u: decode(model, u, batch, seed), in_axes=2, out_axes=2)
    return of_paths(states)


def terms_of_loss(
    terms: tuple[Term, ...], model: EncodeProcessDecode, batch: SampleBatch, seed: int
) -> Array:
    """What a group's samples add to the loss. Local."""
    offered = {"batch": batch, "key": sample_keys(seed, batch)}
    values = [term.weight * jnp.mean(call(term.function, model, offered=offered)) for term in terms]
    return sum(values, jnp.zeros(()))


def offered_to_loss(
    model: EncodeProcessDecode,
    batch: SampleBatch,
    seen: Callable[[Array], Array],
    mask: Array | None,
    seed: int,
) -> dict[str, object]:
    """What a loss may take by name; see `core.objective.OFFERED`. Local.

    `seen` takes (samples, times, ...) to what is compared, (seen, samples, ...).
    """
    weights = None if batch.weights is None else as_numbers(seen(batch.weights))
    times = None if batch.times is None else as_numbers(seen(batch.times))
    return {
        "mask": mask, "weights": weights, "times": times, "model": model, "batch": batch,
        "key": sample_keys(seed, batch),
    }  # fmt: skip
