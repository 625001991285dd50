"""Train without a config file: model, data, loss and optimizer are objects of this program.

mpirun -n 2 python -m mpi4py docs/examples/objects.py
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nodepint_mpi as nm

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "runs/swings"
times = np.linspace(0.0, 6.0, 25)


def swings(n, seed):
    """Damped swings that start at random: angle and velocity at 25 times."""
    draw = np.random.default_rng(seed)
    amplitude, phase = draw.uniform(0.5, 1.5, (n, 1)), draw.uniform(-0.5, 0.5, (n, 1))
    z = amplitude * np.exp((-0.1 + 1j) * times + 1j * phase)
    return {"t": np.tile(times, (n, 1)), "u": np.stack([z.real, ((-0.1 + 1j) * z).real], axis=-1)}


class Swing(eqx.Module):
    """What accelerates it is not known."""

    force: eqx.nn.MLP

    def __call__(self, t, u, args):
        return jnp.stack([u[1], self.force(u)])


def relative_error(predictions, targets):
    error = jnp.linalg.norm(predictions - targets, axis=-1)
    return nm.Mean(jnp.sum(error), jnp.sum(jnp.linalg.norm(targets, axis=-1)))


class Print(nm.Callback):
    """Called on the first rank alone."""

    def on_record(self, numbers):
        print(f"step {numbers['step']}: loss {numbers['loss']:.1e}")


model = Swing(eqx.nn.MLP(2, "scalar", 16, 2, jnp.tanh, key=jax.random.key(0)))
config = nm.Config(
    run=nm.RunSection(name="swings", n_steps=600),
    time=nm.PararealSection(
        horizon=[0.0, 6.0],
        n_slices=6,
        fine=nm.StepsSection(solver="rk4", n_steps=4),
        coarse=nm.StepsSection(solver="rk4", n_steps=1),
    ),
    data=nm.DataSection(input="u", target="u", times="t"),
    output=nm.OutputSection(log_every=200),
)
result = nm.train(
    config,
    out=FOLDER,
    model=model,
    data={"train": swings(32, seed=0), "test": swings(16, seed=1)},
    loss=nm.mean_squared_error,
    metrics=[relative_error],
    optimizer=optax.adam(optax.cosine_decay_schedule(0.03, 600)),
    callbacks=[Print()],
)

trained = nm.load_model(FOLDER, model=model)  # an Equinox module, of no rank
start = np.array([[[1.0, 0.0]]])  # one swing, one observation: the first
predicted = nm.predict(FOLDER, {"t": times[None], "u": start}, model=model)
