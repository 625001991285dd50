"""A training loop of one's own that goes on, in every step, from where the last one ended.

mpirun -n 2 python -m mpi4py docs/examples/tracked_loop.py
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nodepint_mpi as nm

jax.config.update("jax_enable_x64", True)

times = np.linspace(0.25, 6.0, 24)  # observed at these, and started at t = 0
phases = jnp.linspace(0.0, 3.0, 6)  # six swings
start = jnp.stack([jnp.cos(phases), -jnp.sin(phases)], axis=1)
turned = times[:, None] + phases
observed = jnp.stack([jnp.cos(turned), -jnp.sin(turned)], axis=2)
observed = observed * jnp.exp(-0.1 * times)[:, None, None]  # times, swings, 2


class Swing(eqx.Module):
    """What accelerates it is not known."""

    force: eqx.nn.MLP

    def __call__(self, u):
        return jnp.stack([u[1], self.force(u)])


def loss(model, carry):
    solution = nm.solve(
        diffrax.ODETerm(lambda t, u, model: model(u)),  # of one swing
        start,
        np.linspace(0.0, 6.0, 9),  # eight slices, dealt out to the ranks
        fine=nm.FixedSteps(nm.RK4(), 24),  # steps per slice
        coarse=nm.FixedSteps(nm.RK4(), 2),
        args=model,
        in_axes=(0, None),  # swings have starts of their own, and one model
        ts=times,
        carry=carry,
    )
    return jnp.mean((solution.ys - observed) ** 2)


@eqx.filter_jit
def step(model, state, carry):
    value, gradient, carry = nm.value_and_grad(loss)(model, carry)
    updates, state = optimizer.update(gradient, state)
    return eqx.apply_updates(model, updates), state, carry, value


model = Swing(eqx.nn.MLP(2, "scalar", 16, 1, jnp.tanh, key=jax.random.key(0)))
optimizer = optax.adam(0.02)
state, carry = optimizer.init(eqx.filter(model, eqx.is_array)), nm.SolveCarry()
for k in range(1, 201):
    model, state, carry, value = step(model, state, carry)
    if k in (1, 10, 200) and nm.world_time_comm().rank == 0:
        print(f"step {k}: mean squared error {value:.1e}")
misfit = float(carry.jump + carry.residual)  # of states and cotangents
if nm.world_time_comm().rank == 0:
    print(f"the last sweeps missed by {misfit:.0e}")
