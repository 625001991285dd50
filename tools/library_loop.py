"""What a training loop of one's own costs: its tracked step beside that of `nodepint train`.

Run on an idle machine, one core a rank, with nothing else on it:

    nodepint data prepare lotka_volterra
    taskset -c 0 python tools/library_loop.py
    mpirun -n 2 --bind-to core python -m mpi4py tools/library_loop.py

The model, the data and the optimizer of configs/lotka_volterra_long.toml, from the same parameters.
Steps alternate, and medians are compared; steps that `nodepint train` takes with a serial gradient
besides are left out.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import nodepint_mpi as nm
from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.parallel.comms import Comms, make_comms, world
from nodepint_mpi.training.batch_model import split_model
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.setup import Experiment, fresh_state, set_up

CONFIG = Path(__file__).parents[1] / "configs" / "lotka_volterra_long.toml"
N_STEPS, WARM = 200, 5


def make_library_step(experiment: Experiment) -> tuple[Any, list[Any]]:
    """The step of a user who has the model, without the training command, and what it takes at
    first. Local to make."""
    params, static = split_model(experiment.model)
    solver, edges = experiment.train_problem.solver, experiment.train_problem.observations.owned
    method: Any = solver.method  # parareal
    read = experiment.train.times > edges.all_edges[0]  # the initial state is given
    optimizer = experiment.update.optimizer

    def field(t, u, processor):
        whole = eqx.combine(processor, static.processor)
        return jax.vmap(lambda sample: whole(t, sample, None))(u)

    def loss(params, carry, inputs, targets):
        model = eqx.combine(params, static)
        solution = nm.solve(
            field, jax.vmap(model.encoder)(inputs), edges.all_edges, args=params.processor,
            fine=solver.fine.integrator, coarse=method.coarse.integrator, carry=carry,
            ts=experiment.train.times[read], slices_at_once=solver.slices_at_once,
            comm=experiment.comms.time,
        )  # fmt: skip
        made = jax.vmap(jax.vmap(model.decoder))(solution.ys)  # times, samples
        return jnp.mean((jnp.swapaxes(made, 0, 1) - targets[:, read]) ** 2)

    @jax.jit
    def step(params, opt_state, carry, inputs, targets):
        value, gradient, carry = nm.value_and_grad(loss)(params, carry, inputs, targets)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, carry, value

    return step, [params, optimizer.init(params), nm.SolveCarry()]


def compare(config: Config, comms: Comms, n_steps: int) -> dict[str, Any]:
    """Median seconds of both steps, their ratio, and the losses they end with. Collective."""
    experiment = set_up(config, comms)
    stepper, state = make_stepper(experiment), fresh_state(experiment)
    data = experiment.batch(0).data
    step, kept = make_library_step(experiment)
    inputs, targets = jnp.asarray(data.initial), jnp.asarray(data.targets)
    seconds: dict[str, list[float]] = {"train": [], "library": []}
    loss, serial = {}, False
    for k in range(n_steps + WARM):
        for name in ("train", "library") if k % 2 else ("library", "train"):
            comms.control.Barrier()
            began = time.perf_counter()
            if name == "train":
                taken = stepper.take(state, experiment.batch(k), k)
                state, loss[name], serial = taken.state, float(taken.report.loss), taken.serial
            else:
                *kept, value = step(*kept, inputs, targets)
                loss[name] = float(value)
            if k >= WARM and not (name == "train" and serial):
                seconds[name].append(time.perf_counter() - began)
    step_s = comms.control.bcast({name: statistics.median(s) for name, s in seconds.items()})
    return {"step_s": step_s, "ratio": step_s["library"] / step_s["train"], "loss": loss}


def main(n_steps: int) -> None:
    """Compare, and have rank 0 print a line. Collective over the world."""
    config = read_config(CONFIG)
    jax.config.update("jax_enable_x64", config.run.precision == "float64")
    comms = make_comms(world())
    found = compare(config, comms, n_steps)
    if comms.control.rank == 0:
        train, library = (1e3 * found["step_s"][name] for name in ("train", "library"))
        losses = [found["loss"][name] for name in ("train", "library")]
        print(
            f"ranks {comms.time.size}: nodepint train {train:.2f} ms a step, library loop "
            f"{library:.2f} ms, ratio {found['ratio']:.3f}; losses {losses[0]:.6e} and "
            f"{losses[1]:.6e} after {n_steps} steps"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else N_STEPS)
