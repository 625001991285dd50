"""Enlarging a network while it is trained: old weights are carried over, predictions stay.

The latent coordinates of a dense network, or the channels of a convolutional one, become more.
What is new begins without influence: its derivative and its weight in the decoder are zero, so the
enlarged network predicts just what the small one did, and the loss goes on from where it was.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from nodepint_mpi.core.basis import random_directions
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.models.networks import (
    ConvDecoder,
    ConvEncoder,
    ConvField,
    DenseField,
    EncodeProcessDecode,
    LinearMap,
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the entries of an old array lie in a larger one: an index list per axis."""

    shape: tuple[int, ...]
    indices: tuple[np.ndarray, ...]

    @classmethod
    def whole(cls, leaf: Array) -> "Placement":
        """An array that stays as it is. Local."""
        return cls(leaf.shape, tuple(np.arange(length) for length in leaf.shape))

    def along(self, axis: int, index: np.ndarray, length: int) -> "Placement":
        """The same with another layout of one axis. Local."""
        shape, indices = list(self.shape), list(self.indices)
        shape[axis], indices[axis] = length, index
        return Placement(tuple(shape), tuple(indices))

    def place(self, old: Array) -> Array:
        """The old entries in an array of zeros. Local."""
        return jnp.zeros(self.shape, old.dtype).at[np.ix_(*self.indices)].set(old)


def sample_directions(
    rows: Float[np.ndarray, "rank state"],
    states: Float[np.ndarray, "samples state"],
    n_new: int,
    key: PRNGKeyArray,
) -> Float[np.ndarray, "new state"]:
    """New directions for a basis: those that the states have most of and the basis misses. Local.

    Args:
        rows: The basis that is enlarged; need not be orthonormal.
        states: Samples of the states.
        n_new: How many.
        key: For random directions, where the states have too few of their own.

    Returns:
        Orthonormal rows, orthogonal to `rows`.

    Raises:
        ProblemError: if the state has not so many entries.
    """
    rank, size = rows.shape
    if rank + n_new > size:
        raise ProblemError(
            f"The network cannot grow to {rank + n_new} coordinates: states have {size} entries."
        )
    held = np.linalg.qr(rows.T)[0]
    missed = states - (states @ held) @ held.T
    values, directions = np.linalg.svd(missed, full_matrices=False)[1:]
    real = directions[values > 1e-6 * max(np.linalg.norm(states), 1e-300)][:n_new]
    drawn = np.asarray(random_directions(key, n_new, (size,), float))
    return np.linalg.qr(np.concatenate([held.T, real, drawn]).T)[0].T[rank : rank + n_new]


def enlarge(
    old: EncodeProcessDecode, fresh: EncodeProcessDecode, directions: Array | None = None
) -> tuple[EncodeProcessDecode, PyTree[Placement]]:
    """Carry weights over into a larger network. Local.

    Args:
        old: Parameters of the trained network: arrays, and None for all else.
        fresh: Those of the larger one, newly made; the new features of a convolutional encoder
            and the new hidden channels of its vector field are taken from here.
        directions: (new, state) New rows of a dense network's encoder.

    Returns:
        The enlarged parameters, structured as `fresh`; and, structured as `old`, where each array
        lies, for whatever else is carried over, such as an optimizer's moments.

    Raises:
        ProblemError: if the network is of another kind.
    """
    match old:
        case EncodeProcessDecode(LinearMap(), DenseField(), LinearMap()):
            assert directions is not None
            places = _place_dense(old, fresh)
            rows = jnp.concatenate(
                [old.encoder.matrix, directions.astype(old.encoder.matrix.dtype)]
            )
            return eqx.tree_at(lambda m: m.encoder.matrix, _put(old, fresh, places), rows), places
        case EncodeProcessDecode(ConvEncoder(), ConvField(), ConvDecoder()):
            places = _place_conv(old, fresh)
            n_old = old.encoder.first.bias.size

            def features(model):
                return [
                    model.encoder.first.weight,
                    model.encoder.second.weight,
                    model.processor.first.weight,
                ]

            enlarged = _put(old, fresh, places)
            drawn = [
                carried.at[:, n_old:].set(new[:, n_old:])
                for carried, new in zip(features(enlarged), features(fresh), strict=True)
            ]
            return eqx.tree_at(features, enlarged, drawn), places
        case _:
            raise ProblemError(
                "Only the networks 'mlp' with `latent` and 'conv' can grow, not one of your own."
            )


def _put(old: PyTree, fresh: PyTree, places: PyTree[Placement]) -> PyTree:
    """Old weights in their places with zeros beside them, in the structure of the new ones."""
    arrays = jax.tree.map(lambda leaf, place: place.place(leaf), old, places)
    return jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(arrays))


def _place_dense(old: Any, fresh: Any) -> PyTree[Placement]:
    """Coordinates come first in what the field takes; the time, if it takes it, last."""
    (before, after), timed = _sizes(old.encoder.matrix, fresh.encoder.matrix, 0), 0
    old_rows, inputs = np.arange(before), np.arange(before)
    if old.processor.time_dependent:
        timed, inputs = 1, np.append(inputs, after)
    places = jax.tree.map(Placement.whole, old)

    def change(get, axis, index, length):
        nonlocal places
        places = eqx.tree_at(get, places, get(places).along(axis, index, length))

    change(lambda m: m.encoder.matrix, 0, old_rows, after)
    change(lambda m: m.decoder.matrix, 1, old_rows, after)
    change(lambda m: m.processor.mlp.layers[0].weight, 1, inputs, after + timed)
    change(lambda m: m.processor.mlp.layers[-1].weight, 0, old_rows, after)
    change(lambda m: m.processor.mlp.layers[-1].bias, 0, old_rows, after)
    return places


def _place_conv(old: Any, fresh: Any) -> PyTree[Placement]:
    """Channels come first in what a convolution takes; the time, if it takes it, last."""
    before, after = _sizes(old.encoder.first.bias, fresh.encoder.first.bias, 0)
    channels = np.arange(before)
    with_time = np.append(channels, after)
    places = jax.tree.map(Placement.whole, old)

    def convolution(get, inputs, width):
        nonlocal places
        patches = (np.arange(9)[:, None] * width + inputs).ravel()
        conv = get(places)
        weight = conv.weight.along(0, patches, 9 * width).along(1, channels, after)
        bias = conv.bias.along(0, channels, after)
        conv = eqx.tree_at(lambda c: (c.weight, c.bias), conv, (weight, bias))
        places = eqx.tree_at(get, places, conv)

    convolution(lambda m: m.encoder.first, np.arange(1), 1)
    convolution(lambda m: m.encoder.second, channels, after)
    convolution(lambda m: m.processor.first, with_time, after + 1)
    convolution(lambda m: m.processor.second, with_time, after + 1)
    n_pixels = old.decoder.linear.weight.shape[1] // before
    read = (np.arange(n_pixels)[:, None] * after + channels).ravel()
    weight = places.decoder.linear.weight.along(1, read, n_pixels * after)
    return eqx.tree_at(lambda m: m.decoder.linear.weight, places, weight)


def _sizes(old: Array, fresh: Array, axis: int) -> tuple[int, int]:
    """Sizes before and after, which must grow."""
    before, after = old.shape[axis], fresh.shape[axis]
    if after <= before:
        raise ProblemError(f"A network of size {before} cannot grow to {after}.")
    return before, after
