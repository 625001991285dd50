"""Prey and predators whose law of motion is unknown: learned from records, and steered."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

CONFIG = """
run = { name = "learn_and_steer", precision = "float64", n_steps = 300 }
problem = { field = "learned", initial = [20.0, 15.0] }
network = { name = ":make_network" }
optim = { learning_rate = 0.01, schedule = "cosine", decay_steps = 2000 }
data = { source = ":make_data", input = "populations", target = "populations", times = "time" }
[control]
kind = "linear"
n_nodes = 65
initial = -10.0
matrix = [[1.0, 0.0], [0.0, 1.0]]
cost = { target = 1.0, terminal = 1.0, energy = 0.5 }
learning = { n_steps = 2000, schedule = "before" }
[time]
horizon = [0.0, 1.0]
n_slices = 8
fine = { solver = "rk4", n_steps = 32 }
coarse = { solver = "rk4", n_steps = 4 }
"""


def law_of_motion(t, u):
    """What is not known."""
    x, y = u
    return np.array([x * (10.0 - 0.2 * y), y * (0.2 * x - 10.0)])


def make_data(n_train=64, n_test=8, seed=0):
    """Records over a quarter of the time that the control has, without a control."""
    draw, times = np.random.default_rng(seed), np.linspace(0.0, 0.25, 17)

    def split(n):
        starts = draw.uniform(0.5, 90.0, size=(n, 2))
        records = [
            solve_ivp(law_of_motion, (0.0, 0.25), start, "DOP853", times, rtol=1e-10).y.T
            for start in starts
        ]
        return {"time": np.tile(times, (n, 1)), "populations": np.stack(records)}

    return {"train": split(n_train), "test": split(n_test)}


class Rates(eqx.Module):
    """x' = x r1(x, y), y' = y r2(x, y), with rates by a network: populations stay positive."""

    rates: eqx.nn.MLP

    def __call__(self, t, u, args):
        return u * 10 * self.rates(u / 50 - 1)


def make_network(key, *, input_shape, output_size):
    return Rates(eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, key=key))


def cost_of(trajectory):
    """Of the control in the file that a run has left, on the true system."""
    run = np.load(trajectory)
    times, controls = run["control_times"], run["controls"]

    def steered(t, state):
        c = np.array([np.interp(t, times, column) for column in controls.T])
        return np.append(law_of_motion(t, state[:2]) + c, 0.25 * c @ c)

    end = solve_ivp(steered, (0, 1), [20.0, 15.0, 0.0], rtol=1e-9, max_step=1 / 64).y[:, -1]
    return 0.5 * np.sum((end[:2] - 1) ** 2) + end[2]


if __name__ == "__main__":
    print(f"cost on the true system: {cost_of('runs/learn_and_steer/trajectory.npz'):.2f}")
