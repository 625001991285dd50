"""`nodepint bench gradients`: the time-parallel gradient beside `jax.grad` of serial diffrax."""

import functools
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.objective import mean_squared_error
from nodepint_mpi.core.observations import place_observations
from nodepint_mpi.core.propagators import AdaptiveSteps, FixedSteps, Propagator
from nodepint_mpi.core.stopping import JumpTolerance
from nodepint_mpi.models.networks import EncodeProcessDecode, make_dense
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.methods.parareal import Parareal
from nodepint_mpi.parallel.methods.picard import Picard
from nodepint_mpi.parallel.methods.reduced import Reduced
from nodepint_mpi.parallel.methods.serial import Serial
from nodepint_mpi.parallel.methods.tangent import Tangent
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.training.setup import reduction_of
from nodepint_mpi.training.step import (
    LineProblem,
    batched_field,
    loss_and_gradient,
    split_model,
)

HORIZON, N_SLICES, STEPS_PER_SLICE = 3.0, 7, 6
TIGHT = 1e-12
TIMES = {
    "end state": np.array([HORIZON]),
    "trajectory": np.array([0.13, 0.4, HORIZON / 7, 1.0, 1.71, 2.2, 2.9, HORIZON]),
}


class GradientCase(NamedTuple):
    """What the loss reads, and how slices are stepped and swept."""

    loss: str
    steps: str
    method: str


CASES = [
    GradientCase(loss, steps, method)
    for loss in TIMES
    for steps in ("fixed", "adaptive")
    for method in ("parareal", "tangent", "reduced", "picard", "serial")
]


def run_gradients(comms: Comms) -> list[dict[str, Any]]:
    """Relative gradient errors of all cases. Collective over `comms`; equal on all ranks."""
    return [
        {**case._asdict(), "n_ranks": comms.time.size, **gradient_error(comms, case)}
        for case in CASES
    ]


def gradient_error(comms: Comms, case: GradientCase) -> dict[str, float]:
    """|ours - serial| / |serial| over all parameters, and the sweeps. Collective; needs x64."""
    model, inputs, targets = _model_and_data(TIMES[case.loss])
    params, static = split_model(model)
    problem = make_case(comms, case, static)
    ours, report = jax.jit(
        lambda inputs, targets: loss_and_gradient(problem, params, inputs, targets)
    )(inputs, targets)
    loss, wanted = _serial_gradient(case.loss, case.steps)
    difference = jax.tree.map(jnp.subtract, ours, wanted)
    norms = [
        jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
        for tree in (difference, wanted)
    ]
    return {
        "gradient_error": float(norms[0] / norms[1]),
        "loss_error": float(jnp.abs(report.loss - loss) / loss),
        "sweeps": int(report.sweeps),
        "adjoint_sweeps": int(report.adjoint_sweeps),
    }


def make_case(comms: Comms, case: GradientCase, static: EncodeProcessDecode) -> LineProblem:
    """One case as a training problem with tight tolerances. Local."""
    field = batched_field(static.processor)
    fine = FixedSteps(diffrax.Tsit5(), STEPS_PER_SLICE)
    if case.steps == "adaptive":
        fine = AdaptiveSteps(diffrax.Tsit5(), rtol=TIGHT, atol=TIGHT)
    coarse = Propagator(field, FixedSteps(diffrax.Midpoint(), 2))
    methods: dict[str, AbstractMethod] = {
        "parareal": Parareal(coarse),
        "tangent": Tangent(SharedBasis("jumps", rank=2, n_new=1, n_batch_axes=1), coarse),
        "reduced": Reduced(
            SharedBasis("pod", rank=1, n_batch_axes=1),
            coarse,
            reduction_of(static.processor, field),
        ),
        "picard": Picard(),
        "serial": Serial(),
    }
    solver = TimeSolver(
        Propagator(field, fine), methods[case.method], JumpTolerance(TIGHT), adjoint_tol=TIGHT
    )
    edges = np.linspace(0.0, HORIZON, N_SLICES + 1)
    observations = place_observations(TIMES[case.loss], edges, comms.time.size, comms.time.rank)
    return LineProblem(comms.time, static, solver, observations, mean_squared_error, {})


def format_gradients(rows: list[dict[str, Any]]) -> str:
    """A table, a line per case. Local."""
    lines = [f"{'loss':12} {'steps':9} {'method':9} {'gradient error':>14} {'sweeps':>7}"]
    for row in rows:
        sweeps = f"{row['sweeps']} + {row['adjoint_sweeps']}"
        lines.append(
            f"{row['loss']:12} {row['steps']:9} {row['method']:9} {row['gradient_error']:14.1e} "
            f"{sweeps:>7}"
        )
    return "\n".join(lines)


@functools.cache  # the same for all methods, and it takes longer to compile than some of them
def _serial_gradient(loss: str, steps: str):
    """The same loss and gradient by one plain diffrax solve."""
    model, inputs, targets = _model_and_data(TIMES[loss])
    params, static = split_model(model)

    @jax.jit
    def solve(params):
        return jax.value_and_grad(_serial_loss)(params, static, loss, steps, inputs, targets)

    return solve(params)


def _serial_loss(params, static, loss: str, steps: str, inputs, targets):
    """The same loss by one plain diffrax solve over the whole horizon."""
    model, times = eqx.combine(params, static), TIMES[loss]
    if steps == "fixed":
        grid = np.linspace(0.0, HORIZON, N_SLICES * STEPS_PER_SLICE + 1)
        controller = diffrax.StepTo(jnp.asarray(grid))
    else:
        controller = diffrax.PIDController(rtol=TIGHT, atol=TIGHT)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, u, args: jax.vmap(lambda v: model.processor(t, v, None))(u)),
        diffrax.Tsit5(),
        t0=0.0,
        t1=HORIZON,
        dt0=None,
        y0=jax.vmap(model.encoder)(inputs),
        saveat=diffrax.SaveAt(ts=jnp.asarray(times)),
        stepsize_controller=controller,
    )
    predictions = jax.vmap(jax.vmap(model.decoder))(solution.ys)
    return jnp.mean(jnp.square(predictions - jnp.moveaxis(targets, 1, 0)))


def _model_and_data(times: np.ndarray):
    """A small network in logarithmic coordinates, and four trajectories to miss."""
    keys = jax.random.split(jax.random.key(0), 3)
    model = make_dense(
        keys[0], input_shape=(2,), output_size=2, width=16, depth=2,
        activation="tanh", time_dependent=True, positive=True,
    )  # fmt: skip
    inputs = jax.random.uniform(keys[1], (4, 2), minval=0.5, maxval=2.0)
    targets = jax.random.uniform(keys[2], (4, len(times), 2), minval=0.5, maxval=2.0)
    return model, inputs, targets
