"""Steer predator and prey towards (1, 1) with the least energy, by the adjoint and by ParaOpt.

mpirun -n 2 python -m mpi4py docs/examples/steer.py
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import nodepint_mpi as nm

jax.config.update("jax_enable_x64", True)


def field(t, u, c, args):
    x, y = u
    return jnp.stack([x * (10 - 0.2 * y), y * (0.2 * x - 10)]) + c


start, edges = jnp.array([20.0, 15.0]), np.linspace(0, 1, 9)  # eight slices
cost = nm.quadratic_cost(target=[1.0, 1.0], terminal=1.0, energy=0.5)
nodes = np.linspace(0, 1, 64, endpoint=False)
pushed = nm.PiecewiseConstant(nodes, np.full((64, 2), -10.0))  # a first guess
steps = {"fine": nm.FixedSteps(diffrax.Heun(), 32), "coarse": nm.FixedSteps(diffrax.Heun(), 4)}

found = nm.control(field, start, edges, control=pushed, cost=cost, **steps)
newton = nm.control(
    field, start, edges, control=pushed, cost=cost, method=nm.ParaOpt(64, 1 / 4), **steps
)
if nm.world_time_comm().rank == 0:
    for name, one in (("adjoint", found), ("ParaOpt", newton)):
        print(f"{name}: cost {one.cost:.6g} at {np.round(one.states[-1], 3)}: {one.status}")
