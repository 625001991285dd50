"""The transposed sweep against `jax.grad` of serial diffrax and against central differences."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import nodepint_mpi as nm
from nodepint_mpi.bench.cases import (
    GRADIENT_CASES,
    HORIZON,
    N_SLICES,
    STEPS_PER_SLICE,
    TIMES,
    GradientCase,
    make_gradient_case,
    make_model_and_data,
)
from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.core.problems import PROBLEMS
from nodepint_mpi.training.batch_model import split_model
from nodepint_mpi.training.step import gradient_part, summed

LV = PROBLEMS["lotka_volterra"]
ARGS = {name: jnp.asarray(value) for name, value in LV.args.items()}
EDGES = np.linspace(0.0, 3.0, 8)
# `nodepint bench gradients` runs all twenty; compiling them takes longer than running them. Here
# every method, and parareal with every loss and every kind of steps; on several ranks what they
# send for it, and on one the others: how a slice is stepped through does not depend on the ranks.
MOST_RANKS: dict[tuple[str, ...], int] = {
    ("trajectory", "fixed", "parareal"): 3,
    ("trajectory", "fixed", "reduced"): 2,
    ("end state", "fixed", "parareal"): 2,
}
TESTED = [
    pytest.param(case, marks=pytest.mark.mpi(min(n, 2), n), id="-".join(case))
    for case, n in ((case, MOST_RANKS.get(tuple(case), 1)) for case in GRADIENT_CASES)
    if case[:2] == ("trajectory", "fixed")
    or (case.method == "parareal" and case[:2] != ("end state", "adaptive"))
]


@functools.cache  # the same for all methods
def serial_gradient(loss: str, steps: str):
    """Loss and gradient by one diffrax solve over the whole horizon, with its own adjoint."""
    model, inputs, targets = make_model_and_data(TIMES[loss])
    params, static = eqx.partition(model, eqx.is_inexact_array)
    equal = np.linspace(0.0, HORIZON, N_SLICES * STEPS_PER_SLICE + 1)
    controller = (
        diffrax.StepTo(jnp.asarray(equal))
        if steps == "fixed"
        else diffrax.PIDController(rtol=1e-12, atol=1e-12)
    )

    def loss_of(params):
        model = eqx.combine(params, static)

        def trajectory(start):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, u, _: model.processor(t, u, None)), diffrax.Tsit5(),
                0.0, HORIZON, None if steps == "fixed" else 0.01, model.encoder(start),
                stepsize_controller=controller, max_steps=4096,
                saveat=diffrax.SaveAt(ts=jnp.asarray(TIMES[loss])),
            )  # fmt: skip
            return jax.vmap(model.decoder)(solution.ys)

        return jnp.mean((jax.vmap(trajectory)(inputs) - targets) ** 2)

    return jax.jit(jax.value_and_grad(loss_of))(params)


@pytest.mark.timeout_s(300)
@pytest.mark.parametrize("case", TESTED)
def test_training_gradient_equals_serial_diffrax(comms, case: GradientCase):
    model, inputs, targets = make_model_and_data(TIMES[case.loss])
    params, static = split_model(model)
    problem = make_gradient_case(comms, case, static)
    ours, report = jax.jit(lambda batch: summed(comms.time, gradient_part(problem, params, batch)))(
        SampleBatch(inputs, targets)
    )
    loss, wanted = serial_gradient(case.loss, case.steps)
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-8)
    found, right = (ravel_pytree(tree)[0] for tree in (ours, wanted))
    assert jnp.linalg.norm(found - right) <= 1e-8 * jnp.linalg.norm(right)
    assert case.method == "serial" or report.adjoint_sweeps >= 1


@pytest.mark.timeout_s(240)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param("parareal", marks=pytest.mark.mpi(2, 2)),
        pytest.param("picard", marks=pytest.mark.mpi(max_size=1)),
        pytest.param("serial", marks=pytest.mark.mpi(max_size=1)),
    ],
)
def test_gradient_through_solve(comms, method):
    """Every rank computes the same loss and gets the whole gradient."""

    def loss(args, u0):
        solution = nm.solve(
            LV.field, u0, EDGES, args=args, method=method, comm=comms.time,
            fine=nm.FixedSteps(nm.RK4(), 10), coarse=nm.FixedSteps(nm.RK4(), 2),
            stopping=nm.JumpTolerance(1e-13), adjoint_tol=1e-13,
        )  # fmt: skip
        return jnp.sum(jnp.sin(solution.interface))

    u0 = jnp.asarray(LV.initial)
    gradient = jax.grad(loss, (0, 1))(ARGS, u0)
    everywhere = comms.control.allgather(jax.tree.map(np.asarray, gradient))
    jax.tree.map(np.testing.assert_array_equal, everywhere[0], everywhere[-1])
    direction = jax.tree.map(jnp.ones_like, (ARGS, u0))
    slope = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(gradient))
    h = 1e-5
    ahead, behind = (
        loss(*jax.tree.map(lambda x, d, sign=sign: x + sign * h * d, (ARGS, u0), direction))
        for sign in (1, -1)
    )
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-7)
