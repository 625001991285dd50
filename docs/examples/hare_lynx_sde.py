"""Hare and lynx, 1900 to 1920, as a stochastic equation: how sure is a forecast of four years?

Pelts traded by the Hudson's Bay Company, in thousands (sources: data/hare_lynx/README.md). Windows
of four years are trained on up to 1912, and scored on from there. In logarithms x of hares and y of
lynxes the drift is that of Lotka and Volterra with a small network beside it, and a network says
how strong the noise is.

nodepint train docs/examples/hare_lynx_sde.py
nodepint train docs/examples/hare_lynx_sde.py --set network.options.kind=ode --out runs/ode
nodepint train docs/examples/hare_lynx_sde.py --set network.options.kind=walk --out runs/walk
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import nodepint_mpi as nm

CONFIG = """
run = { name = "hare_lynx_sde", n_steps = 1500 }
data = { source = ":make_data", input = "seen", target = "seen", times = "time" }
network = { name = ":make_model", options = { kind = "sde" } }
noise = { calculus = "ito", paths = "fresh", n_paths = 16 }
loss = { name = "energy_score" }
optim = { learning_rate = 0.01, schedule = "cosine", decay_steps = 1500 }
[time]
horizon = [0.0, 4.0]
n_slices = 8
fine = { solver = "euler", n_steps = 8 }
coarse = { solver = "euler", n_steps = 2 }
stopping = { tol = 1e-4 }
"""
HARE = [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1]
HARE += [40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
LYNX = [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4]
LYNX += [8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
N_YEARS, LAST_TRAINED = 4, 12  # years since 1900
TYPICAL = np.array([30.0, 15.0])


def make_data():
    series = np.log(np.stack([HARE, LYNX], axis=1) / TYPICAL)

    def split(starts):
        seen = np.stack([series[start : start + N_YEARS + 1] for start in starts])
        return {"time": np.tile(np.arange(N_YEARS + 1.0), (len(seen), 1)), "seen": seen}

    return {
        "train": split(range(LAST_TRAINED - N_YEARS + 1)),
        "test": split(range(LAST_TRAINED, len(series) - N_YEARS)),
    }


class Populations(eqx.Module):
    """`kind`: "sde", "ode" without noise, or "walk", noise of constant strength and no drift."""

    rates: jax.Array
    strengths: jax.Array
    drift: eqx.nn.MLP
    noise: eqx.nn.MLP
    kind: str = eqx.field(static=True)

    def __call__(self, t, u, args):
        if self.kind == "walk":
            return jnp.zeros_like(u)
        x, y = u
        a, b, c, d = jnp.exp(self.rates)
        known = jnp.stack([a - b * jnp.exp(y), d * jnp.exp(x) - c])
        return known + 0.1 * self.drift(u)

    def diffusion(self, t, u, args):
        if self.kind == "ode":
            return jnp.zeros_like(u)
        more = 0.0 if self.kind == "walk" else 0.1 * self.noise(u)
        return jax.nn.softplus(self.strengths + more)


def make_model(key, *, input_shape, output_size, kind):
    keys = jax.random.split(key)
    field = Populations(
        jnp.log(jnp.array([0.5, 0.5, 0.8, 0.8])),
        jnp.full(2, -1.0),
        eqx.nn.MLP(2, 2, 8, 1, jnp.tanh, key=keys[0]),
        eqx.nn.MLP(2, 2, 8, 1, jnp.tanh, key=keys[1]),
        kind,
    )
    return nm.EncodeProcessDecode(eqx.nn.Identity(), field, eqx.nn.Identity())
