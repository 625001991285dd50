"""Train an Equinox field of one's own, parallel in time, in a training loop of one's own.

mpirun -n 2 python -m mpi4py docs/examples/own_field.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nodepint_mpi as nm

jax.config.update("jax_enable_x64", True)

times = np.linspace(0.0, 6.0, 13)
phases = jnp.linspace(0.0, 3.0, 6)[:, None]  # six swings, observed at 13 times
observed = jnp.stack([jnp.cos(times + phases), -jnp.sin(times + phases)], axis=-1)
observed = jnp.swapaxes(observed * jnp.exp(-0.1 * times)[:, None], 0, 1)  # times, swings, 2


class Swing(eqx.Module):
    """What accelerates it is not known."""

    force: eqx.nn.MLP

    def __call__(self, u):
        return jnp.stack([u[1], self.force(u)])


def field(t, u, model):
    return jax.vmap(model)(u)  # the swings are solved as one state


def loss(model):
    solution = nm.solve(
        field,
        observed[0],
        times,  # a slice ends at each observation
        fine=nm.FixedSteps(nm.RK4(), 8),
        coarse=nm.FixedSteps(nm.RK4(), 2),
        stopping=nm.JumpTolerance(1e-6),
        adjoint_tol=1e-6,
        args=model,
    )
    return jnp.mean((solution.interface - observed) ** 2)


@eqx.filter_jit
def step(model, state):
    value, gradient = eqx.filter_value_and_grad(loss)(model)  # equal on all ranks
    updates, state = optimizer.update(gradient, state)
    return eqx.apply_updates(model, updates), state, value


model = Swing(eqx.nn.MLP(2, "scalar", 16, 1, jnp.tanh, key=jax.random.key(0)))
optimizer = optax.adam(0.03)
state = optimizer.init(eqx.filter(model, eqx.is_array))
for k in range(1, 101):
    model, state, value = step(model, state)
    if k in (1, 10, 100) and nm.world_time_comm().rank == 0:
        print(f"step {k}: mean squared error {value:.1e}")
