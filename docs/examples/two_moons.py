"""A continuous normalizing flow: the density of two moons, learned from samples.

Chen, Rubanova, Bettencourt, Duvenaud (2018), NeurIPS; Grathwohl, Chen, Bettencourt, Sutskever,
Duvenaud (2019), ICLR, for the estimate of the trace by a random vector.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import make_moons

import nodepint_mpi as nm

CONFIG = """
run = { name = "two_moons", n_steps = 400 }
data = { source = ":make_data", input = "point", target = "none", batch_size = 512 }
network = { name = ":make_model", options = { width = 32, exact = true } }
loss = { name = ":unlikelihood" }
optim = { learning_rate = 0.01, schedule = "cosine", decay_steps = 400, clip_norm = 10.0 }
[time]
horizon = [0.0, 1.0]
n_slices = 8
fine = { solver = "rk4", n_steps = 2 }
coarse = { solver = "rk4", n_steps = 1 }
"""


def make_data(n_train=2048, n_test=1024, seed=0):
    points = make_moons(n_train + n_test, noise=0.05, random_state=seed)[0]

    def split(some):
        noise = np.random.default_rng(seed).choice([-1.0, 1.0], some.shape)  # for the trace
        rows = np.concatenate([some, noise], axis=1)
        return {"point": rows, "none": np.zeros(len(some), int)}

    return {"train": split(points[:n_train]), "test": split(points[n_train:])}


class Flow(eqx.Module):
    """Moves a point to the normal distribution, and its log density with it.

    The state holds the point, the integral of the divergence, and the random vector, which stays.
    """

    mlp: eqx.nn.MLP
    exact: bool = eqx.field(static=True)

    def velocity(self, t, x):
        return self.mlp(jnp.append(x, t))

    def __call__(self, t, u, args):
        x, vector = u[:2], u[3:]
        t = jnp.asarray(t, u.dtype)
        if self.exact:
            slope, trace = (
                self.velocity(t, x),
                jnp.trace(jax.jacfwd(lambda x: self.velocity(t, x))(x)),
            )
        else:  # Hutchinson's estimate
            slope, along = jax.jvp(lambda x: self.velocity(t, x), (x,), (vector,))
            trace = vector @ along
        return jnp.concatenate([slope, trace[None], jnp.zeros_like(vector)])


class Begin(eqx.Module):
    def __call__(self, row):
        return jnp.concatenate([row[:2], jnp.zeros_like(row[:1]), row[2:]])


class LogDensity(eqx.Module):
    """Of the point that has arrived: normal, plus the integral of the divergence."""

    def __call__(self, u):
        return -0.5 * jnp.sum(u[:2] ** 2) - jnp.log(2 * jnp.pi) + u[2]


def make_model(key, *, input_shape, output_size, width, exact):
    mlp = eqx.nn.MLP(3, 2, width, 2, jnp.tanh, key=key)
    return nm.EncodeProcessDecode(Begin(), Flow(mlp, exact), LogDensity())


def unlikelihood(log_densities, targets):
    """Minus the mean log density."""
    return nm.Mean(-jnp.sum(log_densities), jnp.asarray(log_densities.size, log_densities.dtype))
