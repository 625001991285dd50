"""An Ornstein-Uhlenbeck process, found from its paths: dX = (mu t - theta X) dt + sigma t dW.

The data of diffrax's example of a neural SDE: mu = 0.02, theta = 0.1, sigma = 0.8 / 63, X(0)
between -1 and 1, seen at 64 times. Four simulated paths are compared with each one that was seen.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import nodepint_mpi as nm

CONFIG = """
run = { name = "ornstein_uhlenbeck", n_steps = 1200 }
data = { source = ":make_data", input = "seen", target = "seen", times = "time", batch_size = 128 }
network = { name = ":make_model" }
noise = { calculus = "ito", additive = true, n_paths = 4 }
loss = { name = "energy_score" }
optim = { learning_rate = 0.05, schedule = "cosine", decay_steps = 1200 }
[time]
horizon = [0.0, 63.0]
n_slices = 21
fine = { solver = "euler", n_steps = 30 }
coarse = { solver = "euler", n_steps = 3 }
tracking = {}
"""
TRUE = {"mu": 0.02, "theta": 0.1, "sigma": 0.8 / 63}


def make_data(n_train=1024, n_test=128, seed=0):
    draw, times, n_fine = np.random.default_rng(seed), np.arange(64.0), 10

    def split(n):
        x, seen = draw.uniform(-1.0, 1.0, n), []
        for t in times:
            seen.append(x)
            for k in range(n_fine):
                now, h = t + k / n_fine, 1 / n_fine
                noise = TRUE["sigma"] * now * np.sqrt(h) * draw.normal(size=n)
                x = x + h * (TRUE["mu"] * now - TRUE["theta"] * x) + noise
        return {"time": np.tile(times, (n, 1)), "seen": np.stack(seen, axis=1)[..., None]}

    return {"train": split(n_train), "test": split(n_test)}


class Process(eqx.Module):
    """Three numbers; drift and diffusion in units in which all of them are about one."""

    mu: jnp.ndarray
    theta: jnp.ndarray
    sigma: jnp.ndarray

    def __call__(self, t, u, args):
        return 0.02 * self.mu * t - 0.1 * self.theta * u

    def diffusion(self, t, u, args):
        return 0.01 * self.sigma * t * jnp.ones_like(u)


def make_model(key, *, input_shape, output_size):
    process = Process(jnp.array(0.3), jnp.array(2.0), jnp.array(3.0))
    return nm.EncodeProcessDecode(eqx.nn.Identity(), process, eqx.nn.Identity())


def found(model):
    """Its parameters in the units of the data."""
    of = model.processor
    return {"mu": 0.02 * of.mu, "theta": 0.1 * of.theta, "sigma": 0.01 * jnp.abs(of.sigma)}
