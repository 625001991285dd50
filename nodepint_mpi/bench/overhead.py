"""`nodepint bench overhead`: one slice on one rank beside plain diffrax and optax."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.objective import mean_squared_error
from nodepint_mpi.core.observations import place_observations
from nodepint_mpi.core.propagators import FixedSteps, Propagator
from nodepint_mpi.core.stopping import JumpTolerance
from nodepint_mpi.errors import LayoutError
from nodepint_mpi.models.networks import make_dense
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.methods.serial import Serial
from nodepint_mpi.training.batch_model import BatchedField, split_model
from nodepint_mpi.training.line_problem import LineProblem
from nodepint_mpi.training.step import make_train_step
from nodepint_mpi.training.train_state import TrainState
from nodepint_mpi.training.update import Update

HORIZON, N_STEPS, SAMPLES, STEPS_PER_REPEAT = 5.0, 128, 32, 10


def run_overhead(comms: Comms, repeats: int) -> dict[str, Any]:
    """Time both steps in turn, and compare medians. One rank.

    The same network, data, solver, step size and optimizer. Plain diffrax comes twice: with its
    default checkpoints, and with one per step, as here.

    Raises:
        LayoutError: on all ranks, if there are several.
    """
    if comms.time.size > 1:
        raise LayoutError("`nodepint bench overhead` compares on one rank: start it without mpirun")
    model = make_dense(
        jax.random.key(0), input_shape=(2,), output_size=2, width=64, depth=2,
        activation="tanh", time_dependent=False, positive=False,
    )  # fmt: skip
    inputs = jax.random.normal(jax.random.key(1), (SAMPLES, 2))
    targets = jax.random.normal(jax.random.key(2), (SAMPLES, 1, 2))
    optimizer = optax.adam(1e-3)
    params, static = split_model(model)
    contenders = {
        "nodepint_mpi": _our_step(comms, params, static, optimizer),
        "diffrax, default checkpoints": _plain_step(static, optimizer, None),
        "diffrax, a checkpoint per step": _plain_step(static, optimizer, N_STEPS),
    }
    states = {name: (params, optimizer.init(params)) for name in contenders}
    states = jax.tree.map(jnp.array, states)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, step in contenders.items():
            began = time.perf_counter()
            for _ in range(STEPS_PER_REPEAT):
                *states[name], loss = step(*states[name], inputs, targets)
                losses[name] = float(loss)
            if repeat:
                times[name].append((time.perf_counter() - began) / STEPS_PER_REPEAT)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians.pop("nodepint_mpi")
    return {
        "step_s": {"nodepint_mpi": ours, **medians},
        "ratio": {name: ours / value for name, value in medians.items()},
        "final_loss": losses,
    }


def format_overhead(result: dict[str, Any]) -> str:
    """A table, a line per contender. Local."""
    lines = [f"{'step':32} {'ms':>8} {'ours / this':>12}"]
    for name, seconds in result["step_s"].items():
        ratio = result["ratio"].get(name)
        shown = "" if ratio is None else f"{ratio:12.2f}"
        lines.append(f"{name:32} {seconds * 1e3:8.2f} {shown}")
    return "\n".join(lines)


def _our_step(
    comms: Comms, params: Any, static: Any, optimizer: optax.GradientTransformation
) -> Callable:
    fine = Propagator(BatchedField(static.processor), FixedSteps(diffrax.Tsit5(), N_STEPS))
    solver = TimeSolver(fine, Serial(), JumpTolerance(1e-6), adjoint_tol=1e-6)
    observations = place_observations(np.array([HORIZON]), np.array([0.0, HORIZON]), 1, 0)
    problem = LineProblem(comms.time, static, solver, observations, mean_squared_error, {})
    take_step = make_train_step(problem, Update(comms.time, optimizer, params))

    def step(params, opt_state, inputs, targets):
        stepped = take_step(TrainState(params, opt_state), SampleBatch(inputs, targets), None)
        return *stepped.state, stepped.report.loss

    return step


def _plain_step(
    static: Any, optimizer: optax.GradientTransformation, checkpoints: int | None
) -> Callable:
    """What a user writes without us."""

    def loss(params, inputs, targets):
        model = eqx.combine(params, static)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, u, args: jax.vmap(lambda v: model.processor(t, v, None))(u)),
            diffrax.Tsit5(),
            t0=0.0,
            t1=HORIZON,
            dt0=HORIZON / N_STEPS,
            y0=inputs,
            max_steps=N_STEPS + 1,
            adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints),
        )
        assert solution.ys is not None  # the end state is saved by default
        return jnp.mean(jnp.square(solution.ys[0] - targets[:, 0]))

    def step(params, opt_state, inputs, targets):
        value, gradient = jax.value_and_grad(loss)(params, inputs, targets)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))
