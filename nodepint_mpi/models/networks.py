"""Encoder, vector field and decoder as Equinox modules.

Each acts on one sample; batches are the caller's business. The vector field is called as
`processor(t, u, args)`, diffrax's convention, with `args = None`.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Real

from nodepint_mpi.core.basis import random_directions
from nodepint_mpi.core.sample_params import SampleArgs
from nodepint_mpi.errors import ProblemError


class EncodeProcessDecode(eqx.Module):
    """u(t0) = encoder(x), du/dt = processor(t, u, args), prediction = decoder(u(t))."""

    encoder: Callable
    processor: Callable
    decoder: Callable


class Identity(eqx.Module):
    """Hands its input on."""

    def __call__(self, x: Array) -> Array:
        return x


class LinearMap(eqx.Module):
    """A matrix: an encoder to coordinates on a basis, or the decoder back."""

    matrix: Float[Array, "out in"]

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.matrix @ x


class FlatLinear(eqx.Module):
    """An affine map of all numbers of a sample: an image to a vector, or a vector to logits."""

    linear: eqx.nn.Linear

    def __call__(self, x: Float[Array, "*sample"]) -> Float[Array, " out"]:
        return self.linear(x.ravel())


class Elementwise(eqx.Module):
    """A fixed function of every number, such as a logarithm."""

    function: Callable = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return self.function(x)


class DenseField(eqx.Module):
    """A vector field of vectors: a multi-layer perceptron, autonomous unless told otherwise.

    It sees the state, the time if it depends on it, and what a sample brings: its inputs at the
    time, and its features.
    """

    mlp: eqx.nn.MLP
    time_dependent: bool = eqx.field(static=True)

    def __call__(
        self, t: Real[Array, ""], u: Float[Array, " state"], args: SampleArgs | None
    ) -> Float[Array, " state"]:
        seen = [u]
        if self.time_dependent:
            seen.append(t.astype(u.dtype)[None])
        if args is not None and args.inputs is not None:
            seen.append(args.inputs.evaluate(t).astype(u.dtype))
        if args is not None and args.static is not None:
            seen.append(args.static.astype(u.dtype))
        return self.mlp(u if len(seen) == 1 else jnp.concatenate(seen))

    def on_basis(self, basis: Float[Array, "rank state"]) -> "DenseField":
        """The field V^T f(t, V c) of coordinates c, with V inside the outer layers. Local."""

        def absorb(mlp):
            first = mlp.layers[0].weight
            states, rest = first[:, : basis.shape[1]], first[:, basis.shape[1] :]
            first = jnp.concatenate([_product(states, basis.T), rest], axis=1)
            mlp = eqx.tree_at(lambda m: m.layers[0].weight, mlp, first)
            last = mlp.layers[-1]
            mlp = eqx.tree_at(lambda m: m.layers[-1].weight, mlp, _product(basis, last.weight))
            if last.bias is None:
                return mlp
            return eqx.tree_at(lambda m: m.layers[-1].bias, mlp, _product(basis, last.bias))

        return DenseField(absorb(self.mlp), self.time_dependent)


class Conv3x3(eqx.Module):
    """A 3 x 3 convolution of channel-last images, padded with zeros, as one matrix product.

    Inside a loop, where a vector field lives, XLA's own convolution is about ten times slower on
    a CPU than this (measured; outside a loop they are equal).
    """

    weight: Float[Array, "patch out_channels"]
    bias: Float[Array, " out_channels"]
    stride: int = eqx.field(static=True)

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, key: PRNGKeyArray):
        bound = (9 * in_channels) ** -0.5
        shape = (9 * in_channels, out_channels)
        self.weight = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        self.bias = jnp.zeros(out_channels)
        self.stride = stride

    def __call__(
        self, image: Float[Array, "rows columns channels"]
    ) -> Float[Array, "out_rows out_columns out_channels"]:
        rows, columns, _ = image.shape
        padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
        step = self.stride
        patches = [
            padded[i : i + rows : step, j : j + columns : step] for i in range(3) for j in range(3)
        ]
        return jnp.concatenate(patches, axis=-1) @ self.weight + self.bias[None, None]


class ConvField(eqx.Module):
    """A vector field of images: two 3 x 3 convolutions with time as one more channel."""

    first: Conv3x3
    second: Conv3x3

    def __call__(
        self, t: Real[Array, ""], u: Float[Array, "rows columns channels"], args: Any
    ) -> Float[Array, "rows columns channels"]:
        del args
        return self.second(_with_time(t, jnp.tanh(self.first(_with_time(t, u)))))


class LayeredField(eqx.Module):
    """A vector field with weights of its own in each unit of time: layer n from t = n to n + 1.

    One Euler step a layer, u + f_n(u), is a residual network; slices of time are then blocks of
    its layers. A layer sees the time since its beginning.
    """

    layers: eqx.Module
    """A vector field whose arrays have one more leading axis, that of the layers."""
    n_layers: int = eqx.field(static=True)

    def __call__(self, t: Real[Array, ""], u: Float[Array, "*state"], args: Any) -> Array:
        # Edges of slices are rounded; a layer begins at its integer all the same.
        index = jnp.clip(jnp.floor(t + 1e-4).astype(int), 0, self.n_layers - 1)
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        layer: Any = eqx.combine(jax.tree.map(lambda leaf: leaf[index], arrays), rest)
        return layer(t - index.astype(jnp.result_type(t)), u, args)


class ConvEncoder(eqx.Module):
    """A gray image to a state of many small images: two convolutions, each halving the sides."""

    first: Conv3x3
    second: Conv3x3

    def __call__(
        self, x: Float[Array, "rows columns"]
    ) -> Float[Array, "state_rows state_columns channels"]:
        return self.second(jax.nn.relu(self.first(x[..., None])))


class ConvDecoder(eqx.Module):
    """A state of small images to one number per class."""

    linear: eqx.nn.Linear

    def __call__(self, u: Float[Array, "rows columns channels"]) -> Float[Array, " classes"]:
        return self.linear(jax.nn.relu(u).ravel())


ACTIVATIONS: dict[str, Callable] = {
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


def make_dense(
    key: PRNGKeyArray,
    *,
    input_shape: tuple[int, ...],
    output_size: int,
    width: int,
    depth: int,
    activation: str,
    time_dependent: bool,
    positive: bool,
    latent: int | None = None,
    n_given: int = 0,
) -> EncodeProcessDecode:
    """A dense vector field: on the observed state itself, or between an encoder and logits. Local.

    Args:
        key: Random key.
        input_shape: Shape of one observation, `(state,)`, or of any sample that has a label.
        output_size: Length of one prediction: the observed state's, or the number of classes.
        width: Width of the hidden layers.
        depth: Number of hidden layers.
        activation: A name in `ACTIVATIONS`.
        time_dependent: Whether the field sees the time.
        positive: Evolve the logarithm of the observed state, which then stays positive.
        latent: Evolve so many coordinates on a learned basis instead, which begins orthonormal;
            of a sample with a label, so many affine functions.
        n_given: How many numbers the field gets of a sample: channels of its inputs, and features.

    Raises:
        ProblemError: if predictions are of another shape than samples and there is no `latent`, or
            the basis has more directions than the state.
    """

    def make_field(size: int) -> DenseField:
        mlp = eqx.nn.MLP(
            size + time_dependent + n_given, size, width, depth,
            activation=ACTIVATIONS[activation], key=key,
        )  # fmt: skip
        return DenseField(mlp, time_dependent)

    if input_shape != (output_size,):
        if latent is None:
            raise ProblemError(
                f"The network 'mlp' evolves the observed vector itself, but samples have shape "
                f"{input_shape} and predictions {output_size} entries; set `network.latent`, or "
                "use 'conv' or your own network."
            )
        first, second = jax.random.split(jax.random.fold_in(key, 1))
        encoder = FlatLinear(eqx.nn.Linear(math.prod(input_shape), latent, key=first))
        decoder = FlatLinear(eqx.nn.Linear(latent, output_size, key=second))
        return EncodeProcessDecode(encoder, make_field(latent), decoder)
    (size,) = input_shape
    encoder, decoder = Identity(), Identity()
    if latent is not None:
        if latent > size:
            raise ProblemError(
                f"`network.latent` is {latent}, but observations have {size} entries; choose at "
                f"most {size}."
            )
        directions = random_directions(jax.random.fold_in(key, 1), latent, (size,), float)
        encoder, decoder = LinearMap(directions), LinearMap(directions.T)
        size = latent
    if positive:
        encoder, decoder = Elementwise(jnp.log), Elementwise(jnp.exp)
    return EncodeProcessDecode(encoder, make_field(size), decoder)


def make_conv(
    key: PRNGKeyArray,
    *,
    input_shape: tuple[int, ...],
    output_size: int,
    channels: int,
    layers: int | None = None,
) -> EncodeProcessDecode:
    """Convolutional encoder, vector field and decoder for gray images. Local.

    Args:
        key: Random key.
        input_shape: `(rows, columns)` of an image.
        output_size: Number of classes.
        channels: Channels of the state.
        layers: Weights of their own for so many units of time, instead of the same at all times.

    Raises:
        ProblemError: if samples are not gray images.
    """
    if len(input_shape) != 2:
        raise ProblemError(
            f"The network 'conv' takes gray images (rows, columns), but samples have shape "
            f"{input_shape}."
        )
    keys = jax.random.split(key, 5)
    halves = [-(-side // 2) for side in input_shape]
    quarters = [-(-side // 2) for side in halves]
    encoder = ConvEncoder(
        Conv3x3(1, channels, stride=2, key=keys[0]),
        Conv3x3(channels, channels, stride=2, key=keys[1]),
    )

    def make_field(first: PRNGKeyArray, second: PRNGKeyArray) -> ConvField:
        return ConvField(
            Conv3x3(channels + 1, channels, key=first), Conv3x3(channels + 1, channels, key=second)
        )

    if layers is None:
        processor = make_field(keys[2], keys[3])
    else:
        split = (jax.random.split(one, layers) for one in keys[2:4])
        processor = LayeredField(eqx.filter_vmap(make_field)(*split), layers)
    decoder = ConvDecoder(
        eqx.nn.Linear(channels * quarters[0] * quarters[1], output_size, key=keys[4])
    )
    return EncodeProcessDecode(encoder, processor, decoder)


def _product(left: Array, right: Array) -> Array:
    """A matrix product in full precision on any device."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _with_time(t: Array, u: Array) -> Array:
    """Append the time as a constant channel."""
    channel = jnp.broadcast_to(t.astype(u.dtype), (*u.shape[:-1], 1))
    return jnp.concatenate([u, channel], axis=-1)
