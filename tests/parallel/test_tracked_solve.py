"""A carry in a training loop of one's own: the steps of `nodepint train`, and where they lead."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.bench.cases import (
    HORIZON,
    N_SLICES,
    STEPS_PER_SLICE,
    TIMES,
    GradientCase,
    make_gradient_case,
    make_model_and_data,
)
from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.training.batch_model import split_model
from nodepint_mpi.training.step import summed, tracked_part
from tests.parallel.test_saved_times import (
    ARGS,
    BASIS,
    EDGES,
    OPTIONS,
    TS,
    U0,
    loss_of,
    pendulum,
    plain,
)


@pytest.mark.mpi(2, 2)
@pytest.mark.timeout_s(240)
def test_losses_and_gradients_are_those_of_a_tracked_training(comms):
    """Step after step, with parameters that move: to 1e-12 of what `nodepint train` computes."""
    times = TIMES["trajectory"]
    model, inputs, targets = make_model_and_data(times)
    params, static = split_model(model)
    case = GradientCase("trajectory", "fixed", "parareal")
    problem = make_gradient_case(comms, case, static)
    coarse = nm.FixedSteps(diffrax.Midpoint(), 2)  # as there

    def field(t, u, processor):
        return jax.vmap(lambda u: processor(t, u, None))(u)

    def loss(model, carry):
        solution = nm.solve(
            field, jax.vmap(model.encoder)(inputs), np.linspace(0.0, HORIZON, N_SLICES + 1),
            args=model.processor, fine=nm.FixedSteps(diffrax.Tsit5(), STEPS_PER_SLICE),
            coarse=coarse, ts=times, carry=carry, comm=comms.time,
        )  # fmt: skip
        made = jax.vmap(jax.vmap(model.decoder))(solution.ys)
        return jnp.mean((jnp.swapaxes(made, 0, 1) - targets) ** 2)

    @jax.jit
    def train(params, carry):
        part, carry = tracked_part(problem, params, carry, SampleBatch(inputs, targets))
        return *summed(comms.time, part), carry

    step = eqx.filter_jit(nm.value_and_grad(loss))
    state = jax.ShapeDtypeStruct((4, 2), float)
    theirs = problem.solver.method.carry_like(problem.observations.owned.n_owned, state)
    ours, found = nm.SolveCarry(), None
    for _ in range(4):
        wanted, report, theirs = train(params, theirs)
        value, found, ours = step(eqx.combine(params, static), ours)
        np.testing.assert_allclose(value, report.loss, rtol=1e-12)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            scale = np.max(np.abs(other))
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * max(scale, 1e-3))
        np.testing.assert_allclose(ours.jump, report.jump, rtol=1e-6, atol=1e-14)
        np.testing.assert_allclose(ours.residual, report.adjoint_residual, rtol=1e-6, atol=1e-14)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, wanted)
    everywhere = comms.control.allgather(jax.tree.map(np.asarray, jax.tree.leaves(found)))
    jax.tree.map(np.testing.assert_array_equal, everywhere[0], everywhere[-1])


@pytest.mark.timeout_s(240)
@pytest.mark.parametrize(
    "method, options",
    [
        pytest.param("picard", {}, marks=pytest.mark.mpi(max_size=3)),
        pytest.param("tangent", BASIS, marks=pytest.mark.mpi(max_size=2)),
        pytest.param("reduced", BASIS, marks=pytest.mark.mpi(max_size=1)),
    ],
)
def test_steps_at_the_same_parameters_arrive_at_the_gradient_of_diffrax(comms, method, options):
    """With what is no number among the parameters, and something beside the value."""

    def loss(params, carry, scale):
        solution = nm.solve(
            pendulum, params["u0"], EDGES, args=params["args"], ts=TS, carry=carry, method=method,
            comm=comms.time, **OPTIONS, **options,
        )  # fmt: skip
        return scale * loss_of(solution.ys), solution

    step = eqx.filter_jit(nm.value_and_grad(loss, has_aux=True))
    carry, params = nm.SolveCarry(), {"u0": U0, "args": ARGS, "name": "pendulum"}
    assert np.isnan(carry.jump)
    (value, solution), gradient, carry = step(params, carry, 1.0)
    assert carry.jump + carry.residual > 1e-6
    for _ in range(2 * len(EDGES)):
        (value, solution), gradient, carry = step(params, carry, 1.0)
    (wanted_value, ys), wanted = plain(tuple(TS))
    assert carry.jump <= 1e-12 and carry.residual <= 1e-12
    assert solution.status is nm.Status.TRACKED and solution.sweeps == 1
    np.testing.assert_allclose(value, wanted_value, rtol=1e-11)
    np.testing.assert_allclose(solution.ys, ys, rtol=0, atol=1e-11)
    assert gradient.pop("name") is None
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10),
        gradient,
        {"u0": wanted[0], "args": wanted[1]},
    )


@pytest.mark.mpi(max_size=1)
def test_without_jit_it_is_the_same(comms):
    def loss(u0, carry):
        solution = nm.solve(
            lambda t, u, args: -u, u0, EDGES, carry=carry, comm=comms.time, **OPTIONS
        )
        return jnp.sum(solution.interface[-1])

    value, gradient, carry = nm.value_and_grad(loss)(jnp.ones(1), nm.SolveCarry())
    for _ in range(14):
        value, gradient, carry = nm.value_and_grad(loss)(jnp.ones(1), carry)
    np.testing.assert_allclose([value, gradient[0]], np.exp(-5.0), rtol=1e-4)


@pytest.mark.mpi(max_size=1)
def test_a_step_that_is_not_finite_says_so(comms):
    """It does not raise: what was carried may be at fault. The next begins with an empty carry."""

    def loss(u0, carry):
        solution = nm.solve(
            lambda t, u, args: u * u, u0, EDGES, carry=carry, comm=comms.time, **OPTIONS
        )
        return jnp.sum(solution.interface), solution

    (value, solution), _, carry = nm.value_and_grad(loss, has_aux=True)(
        jnp.ones(1), nm.SolveCarry()
    )
    assert not np.isfinite(value) and solution.status is nm.Status.NON_FINITE
    assert not np.isfinite(carry.jump)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_solves=0), "exactly once.*does not"),
        (dict(n_solves=2), "exactly once.*again"),
        (dict(method="serial"), "Serial does no sweeps"),
        (dict(guess=np.zeros((8, 1))), "`guess` is given together with `carry`"),
        (dict(stopping=nm.FixedSweeps(1)), "`stopping` is given together with `carry`"),
        (dict(stale=True), "holds ends of 99 slices"),
    ],
)
def test_misuse_is_refused(comms, change, message):
    options = dict(n_solves=1, stale=False) | change
    n_solves, stale = options.pop("n_solves"), options.pop("stale")

    def loss(u0, carry):
        for _ in range(n_solves):
            nm.solve(
                lambda t, u, args: -u, u0, EDGES, carry=carry, comm=comms.time,
                **(OPTIONS | options),
            )  # fmt: skip
        return jnp.sum(u0)

    held = nm.Carry({"ends": jnp.zeros((99, 1))} if stale else {}, {})
    with pytest.raises(ProblemError, match=message):
        nm.value_and_grad(loss)(jnp.ones(1), nm.SolveCarry(held))
