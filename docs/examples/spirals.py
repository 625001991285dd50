"""A latent ODE: spirals seen at a few irregular times, through noise, read by a recurrent network.

Chen, Rubanova, Bettencourt, Duvenaud (2018), NeurIPS, section 5; Rubanova, Chen, Duvenaud (2019).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import nodepint_mpi as nm

CONFIG = """
run = { name = "spirals", n_steps = 600 }
data = { source = ":make_data", input = "seen", target = "seen", times = "time", batch_size = 64 }
network = { name = ":make_model", options = { latent = 4, width = 20 } }
optim = { learning_rate = 0.01, schedule = "cosine", decay_steps = 600 }
[loss]
name = ":unlikelihood"
metrics = [":distance"]
terms = [{ name = ":divergence", weight = 0.05 }]
[time]
horizon = [0.0, 6.0]
n_slices = 8
fine = { solver = "rk4", n_steps = 3 }
coarse = { solver = "rk4", n_steps = 1 }
"""
NOISE = 0.1


def make_data(n_train=256, n_test=64, seed=0):
    draw = np.random.default_rng(seed)

    def spiral(_):
        times = np.sort(draw.uniform(0.01, 6.0, draw.integers(10, 30)))
        turn = draw.choice([-1.0, 1.0]) * times + draw.uniform(0, 2 * np.pi)
        radius = draw.uniform(0.3, 0.6) + 0.15 * times
        path = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
        return times, path + NOISE * draw.normal(size=path.shape)

    def split(n):
        times, seen = zip(*map(spiral, range(n)), strict=True)
        return {"time": list(times), "seen": list(seen)}

    return {"train": split(n_train), "test": split(n_test)}


class Reader(eqx.Module):
    """Reads a series from its end to its beginning; an encoder that asks for `mask` gets all."""

    cell: eqx.nn.GRUCell
    to_state: eqx.nn.Linear

    def distribution(self, seen, times, mask):
        def read(hidden, row):
            there, entries = row
            return jnp.where(there, self.cell(entries, hidden), hidden), None

        entries = jnp.concatenate([seen, times[:, None]], axis=1)
        first = jnp.zeros(self.cell.hidden_size)
        hidden, _ = jax.lax.scan(read, first, (mask.any(axis=1), entries), reverse=True)
        return jnp.split(self.to_state(hidden), 2)

    def __call__(self, seen, *, times, mask, key):
        mean, log_spread = self.distribution(seen, times, mask)
        if key is None:  # outside training
            return mean
        return mean + jnp.exp(log_spread) * jax.random.normal(key, mean.shape)


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, u, args):
        return self.mlp(u)


def make_model(key, *, input_shape, output_size, latent, width):
    keys = jax.random.split(key, 4)
    cell = eqx.nn.GRUCell(input_shape[0] + 1, width, key=keys[0])
    reader = Reader(cell, eqx.nn.Linear(width, 2 * latent, key=keys[1]))
    field = Field(eqx.nn.MLP(latent, latent, width, 1, jnp.tanh, key=keys[2]))
    return nm.EncodeProcessDecode(
        reader, field, eqx.nn.MLP(latent, output_size, width, 1, key=keys[3])
    )


def unlikelihood(predictions, targets, mask):
    """Minus the logarithm of the likelihood of an observation, but for a constant."""
    squares = nm.mean_squared_error(predictions, targets, mask=mask)
    return nm.Mean(squares.sum / (2 * NOISE**2), squares.count)


def divergence(model, batch):
    """Of the distribution of initial states from a standard normal one, for each sample."""
    mean, log_spread = jax.vmap(model.encoder.distribution)(batch.targets, batch.times, batch.mask)
    each = (mean**2 + jnp.exp(2 * log_spread) - 1) / 2 - log_spread
    return each.sum(axis=1)


def distance(predictions, targets, mask):
    """The mean squared error."""
    return nm.mean_squared_error(predictions, targets, mask=mask)
