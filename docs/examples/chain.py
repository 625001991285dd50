"""Beads between two walls, joined by rubber bands: how hard does a stretched band pull?"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.experimental.ode import odeint

import nodepint_mpi as nm

CONFIG = """
run = { name = "chain", precision = "float64", n_steps = 80 }
data = { source = ":make_data", input = "state", target = "state", times = "time" }
network = { name = ":make_field", options = { width = 16 } }
loss = { name = ":relative_error", metrics = [":accuracy"] }
optim = { learning_rate = 0.1, schedule = "cosine", decay_steps = 80 }
[time]
horizon = [0.0, 6.0]
n_slices = 8
fine = { solver = "rk4", n_steps = 5 }
coarse = { solver = "rk4", n_steps = 1 }
tracking = {}
"""


def motion(u, pull):
    positions, velocities = jnp.split(u, 2)
    return jnp.concatenate([velocities, jnp.diff(pull(jnp.diff(positions, prepend=0, append=0)))])


def make_data(n_beads=12, n_train=16, n_test=4, seed=0):
    def simulate(start):  # with the law that has to be found
        return odeint(lambda u, t: motion(u, lambda s: s / jnp.sqrt(1 + s**2)), start, times)

    times, bead = jnp.linspace(0.0, 6.0, 21), jnp.arange(1, n_beads + 1) / (n_beads + 1)
    waves = 1.5 * jax.random.normal(jax.random.key(seed), (n_train + n_test, 2))
    starts = waves @ jnp.sin(jnp.pi * jnp.outer(jnp.array([1, 2]), bead))
    states = jax.vmap(simulate)(jnp.pad(starts, ((0, 0), (0, n_beads))))  # begin at rest
    parts = {"train": states[:n_train], "test": states[n_train:]}
    return {k: {"time": jnp.tile(times, (len(u), 1)), "state": u} for k, u in parts.items()}


class Bands(eqx.Module):
    pull: eqx.nn.MLP

    def __call__(self, t, u, args):
        return motion(u, jax.vmap(self.pull))


def make_field(key, *, input_shape, output_size, width):
    return Bands(eqx.nn.MLP("scalar", "scalar", width, 1, jnp.tanh, key=key))


def relative_error(predictions, targets):
    return nm.Mean(jnp.sum((predictions - targets) ** 2), jnp.sum(targets**2))


def accuracy(predictions, targets):
    errors = jnp.linalg.norm(predictions - targets, axis=-1) / jnp.linalg.norm(targets, axis=-1)
    return nm.Mean(jnp.sum(1 - errors), jnp.asarray(errors.size, errors.dtype))
