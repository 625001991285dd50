"""Paths between two wells, dX = (X - X^3) dt + sigma dW: a forecast, and the solve.

mpirun -n 2 nodepint solve docs/examples/double_well.py --error
"""

import jax.numpy as jnp

CONFIG = """
run = { name = "double_well", precision = "float64" }
problem = { field = ":process", initial = [1.0], args = { sigma = 0.5 } }
noise = { n_paths = 200 }
[time]
horizon = [0.0, 10.0]
n_slices = 32
fine = { solver = "euler", n_steps = 64 }
coarse = { solver = "euler", n_steps = 4 }
stopping = { tol = 1e-6 }
"""


class DoubleWell:
    def __call__(self, t, u, args):
        return u - u**3

    def diffusion(self, t, u, args):
        return args["sigma"] * jnp.ones_like(u)


process = DoubleWell()
