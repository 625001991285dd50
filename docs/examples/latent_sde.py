"""A latent SDE: a stochastic Lorenz system, seen through noise, as in torchsde's example.

A recurrent network reads a series and chooses where the latent path begins and what pulls it along
(the context). The drift that it then follows, of the posterior, is held near one that knows nothing
of the series, the prior: what that costs is integrated as one more state.

Li, Wong, Chen, Duvenaud (2020), AISTATS, "Scalable gradients for stochastic differential
equations".
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import nodepint_mpi as nm

CONFIG = """
run = { name = "latent_sde", n_steps = 800 }
data = { source = ":make_data", input = "seen", target = "seen", times = "time", batch_size = 64 }
network = { name = ":make_model", options = { latent = 4, context = 8, width = 32 } }
noise = { calculus = "ito", paths = "fresh" }
optim = { learning_rate = 0.01, schedule = "cosine", decay_steps = 800 }
[loss]
name = ":bound"
metrics = [":distance"]
[time]
horizon = [0.0, 2.0]
n_slices = 10
fine = { solver = "euler", n_steps = 10 }
coarse = { solver = "euler", n_steps = 2 }
stopping = { tol = 1e-4 }
"""
SPREAD = 0.05  # of the noise in what is seen
LAST = 2.0


def make_data(n_train=1024, n_test=128, n_seen=41, seed=0):
    draw, n_fine = np.random.default_rng(seed), 20
    times = np.linspace(0.0, LAST, n_seen)
    h = LAST / (n_seen - 1) / n_fine

    def split(n):
        x, seen = draw.normal(size=(n, 3)), []
        for _ in times:
            seen.append(x)
            for _ in range(n_fine):
                a, b, c = x.T
                drift = np.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], axis=1)
                noise = np.array([0.1, 0.28, 0.3]) * x * np.sqrt(h) * draw.normal(size=x.shape)
                x = x + h * drift + noise
        seen = np.stack(seen, axis=1)
        seen = (seen - seen.mean((0, 1))) / seen.std((0, 1))
        seen = seen + SPREAD * draw.normal(size=seen.shape)
        # A fourth number, for the divergence of the path, which nobody observes.
        seen = np.concatenate([seen, np.zeros((*seen.shape[:2], 1))], axis=2)
        return {"time": np.tile(times, (n, 1)), "seen": seen}

    return {"train": split(n_train), "test": split(n_test)}


class Reader(eqx.Module):
    """From a series, read backward, to the first latent state, the context, and the divergence of
    the former's distribution from the prior one."""

    cell: eqx.nn.GRUCell
    to_state: eqx.nn.Linear
    prior_mean: jax.Array
    prior_log_spread: jax.Array

    def __call__(self, seen, *, times, key):
        def read(hidden, row):
            return self.cell(row, hidden), None

        rows = jnp.concatenate([seen[:, :3], times[:, None]], axis=1)
        hidden, _ = jax.lax.scan(read, jnp.zeros(self.cell.hidden_size), rows, reverse=True)
        latent = len(self.prior_mean)
        mean, log_spread, context = jnp.split(self.to_state(hidden), [latent, 2 * latent])
        start = mean
        if key is not None:
            start = mean + jnp.exp(log_spread) * jax.random.normal(key, mean.shape)
        ratio = jnp.exp(2 * (log_spread - self.prior_log_spread))
        offset = jnp.square((mean - self.prior_mean) / jnp.exp(self.prior_log_spread))
        divergence = jnp.sum((ratio + offset - 1) / 2 + self.prior_log_spread - log_spread)
        return jnp.concatenate([start, context, divergence[None]])


class Field(eqx.Module):
    """Posterior drift of the latent state, constant context, and the rate of the divergence."""

    posterior: eqx.nn.MLP
    prior: eqx.nn.MLP
    spread: eqx.nn.MLP
    latent: int = eqx.field(static=True)

    def spreads(self, z):
        return 0.05 + jax.nn.softplus(jax.vmap(self.spread)(z[:, None])[:, 0])

    def __call__(self, t, u, args):
        z, context = u[: self.latent], u[self.latent : -1]
        drift = self.posterior(jnp.concatenate([z, context, jnp.array([t])]))
        rate = jnp.sum(jnp.square((drift - self.prior(z)) / self.spreads(z))) / 2
        return jnp.concatenate([drift, jnp.zeros_like(context), rate[None]])

    def diffusion(self, t, u, args):
        g = self.spreads(u[: self.latent])
        return jnp.concatenate([g, jnp.zeros(len(u) - self.latent)])


class Decoder(eqx.Module):
    linear: eqx.nn.Linear
    latent: int = eqx.field(static=True)

    def __call__(self, u):
        return jnp.concatenate([self.linear(u[: self.latent]), u[-1:]])


def make_model(key, *, input_shape, output_size, latent, context, width):
    keys = jax.random.split(key, 6)
    reader = Reader(
        eqx.nn.GRUCell(4, width, key=keys[0]),
        eqx.nn.Linear(width, 2 * latent + context, key=keys[1]),
        jnp.zeros(latent),
        jnp.zeros(latent),
    )
    field = Field(
        eqx.nn.MLP(latent + context + 1, latent, width, 1, jax.nn.softplus, key=keys[2]),
        eqx.nn.MLP(latent, latent, width, 1, jax.nn.softplus, key=keys[3]),
        eqx.nn.MLP(1, 1, 8, 1, jax.nn.softplus, key=keys[4]),
        latent,
    )
    return nm.EncodeProcessDecode(
        reader, field, Decoder(eqx.nn.Linear(latent, 3, key=keys[5]), latent)
    )


def bound(predictions, targets, times):
    """Minus the evidence lower bound per observed number, but for a constant."""
    squares = nm.mean_squared_error(predictions[..., :3], targets[..., :3])
    divergence = jnp.sum(jnp.where(times == LAST, predictions[..., 3], 0.0))
    return nm.Mean(squares.sum / (2 * SPREAD**2) + divergence, squares.count)


def distance(predictions, targets):
    """The mean squared error of what is seen."""
    return nm.mean_squared_error(predictions[..., :3], targets[..., :3])
