"""A damped pendulum driven by a motor: its law of motion from irregular records with gaps."""

import numpy as np
from scipy.integrate import solve_ivp

CONFIG = """
run = { name = "pendulum", precision = "float64", n_steps = 600 }
network = { name = "mlp", width = 32, depth = 2 }
loss = { name = "mean_squared_error" }
optim = { learning_rate = 0.02, schedule = "cosine", decay_steps = 600 }
[data]
source = ":make_data"
initial = "start"
target = "state"
times = "time"
missing = "nan"
inputs = "torque"
input_times = "switched"
interpolation = "constant"
[time]
horizon = [0.0, 6.0]
n_slices = 8
fine = { solver = "rk4", n_steps = 8 }
coarse = { solver = "rk4", n_steps = 2 }
tracking = {}
"""


def simulate(start, switched, torque, times):
    """The angle and its velocity at some times, from one switching of the motor to the next."""
    found, state = np.empty((len(times), 2)), start
    ends = np.append(switched[1:], 6.0)
    for begin, end, force in zip(switched, ends, torque, strict=True):

        def motion(t, u, force=force):
            return [u[1], -np.sin(u[0]) - 0.2 * u[1] + force]

        here = (times > begin) & (times <= end)
        ts = np.append(times[here], end)
        solved = solve_ivp(motion, (begin, end), state, t_eval=ts, rtol=1e-9, atol=1e-9).y.T
        found[here], state = solved[:-1], solved[-1]
    return found


def make_data(n_train=48, n_test=16, seed=0):
    draw = np.random.default_rng(seed)

    def record(_):
        start = draw.uniform(-1.5, 1.5, 2)
        switched = np.append(0.0, np.sort(draw.choice(np.arange(1, 12), 6, replace=False)) / 2)
        torque = draw.uniform(-0.5, 0.5, len(switched))
        times = np.sort(draw.uniform(0.01, 6.0, draw.integers(15, 60)))
        state = simulate(start, switched, torque, times)
        state[draw.random(state.shape) < 0.2] = np.nan  # a sensor that fails now and then
        return {
            "start": start, "switched": switched, "torque": torque[:, None],
            "time": times, "state": state,
        }  # fmt: skip

    def split(n):
        records = [record(i) for i in range(n)]
        return {name: [one[name] for one in records] for name in records[0]}

    return {"train": split(n_train), "test": split(n_test)}
