"""A mass that is pushed by the cube of the control, with a cost of one's own."""

import nodepint_mpi as nm

CONFIG = """
run = { name = "cubed_force", precision = "float64", n_steps = 2000 }
problem = { field = ":pushed", initial = [-4.0, 0.0] }
[control]
kind = "linear"
n_controls = 1
n_nodes = 801
initial = ":first_push"
cost = { name = ":mean_cost", options = { weight = 1.0 } }
[time]
horizon = [0.0, 8.0]
n_slices = 16
fine = { solver = "heun", n_steps = 50 }
coarse = { solver = "heun", n_steps = 5 }
stopping = { tol = 1e-10 }
"""


def pushed(t, u, c, args):
    """x'' = c^3; u is (x, x')."""
    return u[1], c[0] ** 3


def first_push(t):
    """First forward, then back. From zero, where the cube is flat, no gradient leads away."""
    return 1.5 - 2.5 * t / 8.0


def mean_cost(weight):
    """The mean of (4 - x)^2 + 2 x'^2 + weight c^2 over the horizon."""
    return nm.Cost(
        running=lambda t, u, c: ((4 - u[0]) ** 2 + 2 * u[1] ** 2 + weight * c[0] ** 2) / 8.0
    )
