"""A neural controlled differential equation: which way does a spiral turn, from irregular glances?

Kidger, Morrill, Foster, Lyons (2020), NeurIPS: du = f(u) dX, driven by the interpolated series X.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import nodepint_mpi as nm

CONFIG = """
run = { name = "cde", n_steps = 250 }
network = { name = ":make_model", options = { hidden = 8, width = 32 } }
loss = { name = "cross_entropy" }
optim = { learning_rate = 0.01, schedule = "cosine", decay_steps = 250 }
[data]
source = ":make_data"
initial = "first"
target = "turn"
inputs = "seen"
input_times = "time"
interpolation = "cubic"
batch_size = 64
[time]
horizon = [0.0, 6.0]
n_slices = 8
fine = { solver = "rk4", n_steps = 4 }
coarse = { solver = "rk4", n_steps = 1 }
"""


def make_data(n_train=256, n_test=128, seed=0):
    draw = np.random.default_rng(seed)

    def spiral(_):
        times = np.append(0.0, np.sort(draw.uniform(0.1, 6.0, draw.integers(8, 25))))
        turn = draw.integers(2)
        angle = (2 * turn - 1) * draw.uniform(0.5, 1.5) * times + draw.uniform(0, 2 * np.pi)
        path = (0.5 + 0.1 * times[:, None]) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        path += 0.1 * draw.normal(size=path.shape)
        return times, np.concatenate([times[:, None], path], axis=1), turn  # time is a channel

    def split(n):
        times, seen, turn = zip(*map(spiral, range(n)), strict=True)
        first = np.array([one[0] for one in seen])
        return {"time": list(times), "seen": list(seen), "first": first, "turn": np.array(turn)}

    return {"train": split(n_train), "test": split(n_test)}


class Driven(eqx.Module):
    """du/dt = f(u) dX/dt; behind its last glance a series stands still, and u with it."""

    mlp: eqx.nn.MLP

    def __call__(self, t, u, args):
        slope = args.inputs.derivative(t)
        return self.mlp(u).reshape(u.size, slope.size) @ slope


def make_model(key, *, input_shape, output_size, n_inputs, hidden, width):
    keys = jax.random.split(key, 3)
    mlp = eqx.nn.MLP(hidden, hidden * n_inputs, width, 1, jax.nn.softplus, jnp.tanh, key=keys[0])
    encoder = eqx.nn.Linear(input_shape[0], hidden, key=keys[1])
    return nm.EncodeProcessDecode(
        encoder, Driven(mlp), eqx.nn.Linear(hidden, output_size, key=keys[2])
    )
