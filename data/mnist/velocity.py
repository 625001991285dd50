"""The velocity that carries noise to digits of a class: a network of one's own.

`network.name = "data/mnist/velocity.py:make_velocity"`, with the label as `data.static`. The state
is an image, flat, from -1 (background) to 1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

N_CLASSES = 10
N_WAVES = 8
N_CONDITIONS = 128
LEAST_LEFT = 0.05
"""Of the time left to the data, where it divides."""
DROPPED = 0.1
"""Share of training samples whose class is not said, so that the field also knows digits of any."""


class ToState(eqx.Module):
    """An image with gray levels 0 to 1 as a state."""

    def __call__(self, image: Float[Array, "rows columns"]) -> Float[Array, " pixels"]:
        return 2 * image.reshape(-1) - 1


class ToImage(eqx.Module):
    """And back."""

    shape: tuple[int, int] = eqx.field(static=True)

    def __call__(self, state: Float[Array, " pixels"]) -> Float[Array, "rows columns"]:
        return (state.reshape(self.shape) + 1) / 2


class Block(eqx.Module):
    """A residual perceptron whose normalized input is scaled and shifted by time and class."""

    norm: eqx.nn.LayerNorm
    modulate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(width, use_weight=False, use_bias=False)
        self.modulate = _at_rest(eqx.nn.Linear(N_CONDITIONS, 3 * width, key=keys[0]))
        self.up = eqx.nn.Linear(width, width, key=keys[1])
        self.down = eqx.nn.Linear(width, width, key=keys[2])

    def __call__(self, h: Array, condition: Array) -> Array:
        scale, shift, gate = jnp.split(self.modulate(condition), 3)
        inner = jax.nn.silu(self.up(self.norm(h) * (1 + scale) + shift))
        return h + gate * self.down(inner)


class ClassVelocity(eqx.Module):
    """Velocity of an image of a class: `args.static` holds the label, or -1 for any.

    On the straight line the mean velocity is (y - u) / (1 - t), y the mean image that the state
    leads to. A perceptron can say y, which is on few directions, but not the noise, which is on
    all.

    Reference:
        Li, He (2025), Back to basics: let denoising generative models denoise.
    """

    into: eqx.nn.Linear
    of_time: eqx.nn.Linear
    of_class: Float[Array, "classes conditions"]
    blocks: tuple[Block, ...]
    out: eqx.nn.Linear

    def __call__(self, t: Array, u: Array, args, *, key: PRNGKeyArray | None = None) -> Array:
        label = args.static[0].astype(int)
        if key is not None:
            label = jnp.where(jax.random.bernoulli(key, DROPPED), -1, label)
        known = jnp.where(label < 0, N_CLASSES, label)
        phases = jnp.pi * jnp.asarray(t, u.dtype) * jnp.arange(1, N_WAVES + 1, dtype=u.dtype)
        waves = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)])
        condition = jax.nn.silu(self.of_time(waves) + self.of_class[known])
        h = self.into(u)
        for block in self.blocks:
            h = block(h, condition)
        return (self.out(h) - u) / jnp.maximum(1 - jnp.asarray(t, u.dtype), LEAST_LEFT)


class Velocity(eqx.Module):
    """Encoder, velocity and decoder."""

    encoder: ToState
    processor: ClassVelocity
    decoder: ToImage


def make_velocity(
    key: PRNGKeyArray,
    *,
    input_shape: tuple[int, int],
    output_size: int,
    width: int = 512,
    depth: int = 4,
) -> Velocity:
    """A velocity that leads to gray, and can be trained. Local."""
    del output_size
    keys = jax.random.split(key, depth + 4)
    n_pixels = input_shape[0] * input_shape[1]
    field = ClassVelocity(
        into=eqx.nn.Linear(n_pixels, width, key=keys[0]),
        of_time=eqx.nn.Linear(2 * N_WAVES, N_CONDITIONS, key=keys[1]),
        of_class=jax.random.normal(keys[2], (N_CLASSES + 1, N_CONDITIONS)),
        blocks=tuple(Block(width, one) for one in keys[4:]),
        out=_at_rest(eqx.nn.Linear(width, n_pixels, key=keys[3])),
    )
    return Velocity(ToState(), field, ToImage(input_shape))


def _at_rest(layer: eqx.nn.Linear) -> eqx.nn.Linear:
    return jax.tree.map(jnp.zeros_like, layer)
