"""Batches given as to `jax.vmap`: every sample as `jax.vmap` of plain diffrax solves it."""

import itertools
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.errors import NonFiniteError, ProblemError

EDGES = np.linspace(0.0, 5.0, 8)
TS = np.array([0.31, EDGES[2], 4.9])
STEPS = 8
FINE, COARSE = nm.FixedSteps(nm.RK4(), STEPS), nm.FixedSteps(nm.RK4(), 2)
TIGHT = dict(stopping=nm.JumpTolerance(1e-12), adjoint_tol=1e-12)
U0 = {"x": jnp.array([1.0, 2.0, 0.3]), "v": jnp.array([[0.0, 0.1, 0.2]])}
PUSH, FLAGS = jnp.array([0.5, 0.2, 0.9]), jnp.array([True, False, True])
SHARED = jnp.array(0.7)
AXES = {"x": 0, "v": 1}, {"push": 0, "flag": 0, "shared": None, "n": None, "nothing": None}


def pendulum(t, u, args):
    """Of one sample; `n` is known while it compiles."""
    push = jnp.where(args["flag"], 1.0, 2.0) * args["push"] * jnp.cos(args["shared"] * t)
    return {"x": u["v"][0], "v": push[None] - args["n"] * 0.5 * jnp.sin(u["x"])[None]}


def arguments(push, shared):
    return {"push": push, "flag": FLAGS, "shared": shared, "n": 2, "nothing": None}


def loss_of(ys):
    return jnp.sum(jnp.sin(ys["x"])) + jnp.sum(jnp.cos(ys["v"]) ** 2)


def plain_states(u0, push, shared):
    ends = [np.linspace(a, b, STEPS + 1)[:-1] for a, b in itertools.pairwise(EDGES)]
    steps = diffrax.StepTo(jnp.asarray(np.concatenate([*ends, EDGES[-1:]])))

    def one(u0, push, flag):
        args = {"push": push, "flag": flag, "shared": shared}
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, u, args: pendulum(t, u, args | {"n": 2})), nm.RK4(),
            0.0, EDGES[-1], None, u0, args, saveat=diffrax.SaveAt(ts=jnp.asarray(TS)),
            stepsize_controller=steps,
        ).ys  # fmt: skip

    return jax.vmap(one, in_axes=(AXES[0], 0, 0), out_axes=1)(u0, push, FLAGS)


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(240)
def test_samples_with_arguments_of_their_own_are_those_of_a_mapped_diffrax(comms):
    """States that are trees, arguments of every kind, states and gradients to 1e-10."""

    def states(u0, push, shared):
        solution = nm.solve(
            pendulum, u0, EDGES, args=arguments(push, shared), in_axes=AXES, ts=TS, fine=FINE,
            coarse=COARSE, comm=comms.time, **TIGHT,
        )  # fmt: skip
        return solution.ys, solution

    def pair(states):
        def loss(*variables):
            ys, *solution = states(*variables)
            return loss_of(ys), (ys, *solution)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(U0, PUSH, SHARED)

    (_, (ys, solution)), found = pair(states)
    (_, (wanted_ys,)), wanted = pair(lambda *variables: (plain_states(*variables),))
    assert solution.interface["v"].shape == (8, 3, 1) and ys["x"].shape == (3, 3)
    for one, other in ((ys, wanted_ys), (found, wanted)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), one, other)
    assert np.shape(solution.sample_sweeps) == (3,)


@pytest.mark.mpi(max_size=1)
def test_every_sample_takes_its_own_steps(comms):
    """Error control, slice by slice: as plain diffrax from the same start."""
    rates, edges = jnp.array([1.0, 30.0]), np.linspace(0.0, 1.0, 3)
    solution = nm.solve(
        lambda t, u, rate: -rate * (u - jnp.cos(t)), jnp.ones(1), edges, args=rates,
        in_axes=(None, 0), fine=nm.AdaptiveSteps(diffrax.Tsit5(), 1e-4, 1e-4), method="serial",
        comm=comms.time,
    )  # fmt: skip
    for i, rate in enumerate(rates):
        u = jnp.ones(1)
        for k, (left, right) in enumerate(itertools.pairwise(edges)):
            ys = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, u, a, t0=left: -a * (u - jnp.cos(t0 + t))),
                diffrax.Tsit5(), 0.0, right - left, None, u, rate,
                stepsize_controller=diffrax.PIDController(1e-4, 1e-4),
            ).ys  # fmt: skip
            assert ys is not None  # the end is saved
            u = ys[0]
            np.testing.assert_allclose(solution.interface[k + 1, i], u, rtol=0, atol=1e-12)


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(240)
@pytest.mark.parametrize("method, n_batch_axes", [("tangent", 0), ("reduced", 1)])
def test_methods_with_a_basis_take_a_batch(comms, method, n_batch_axes):
    solution = nm.solve(
        pendulum, U0, EDGES, args=arguments(PUSH, SHARED), in_axes=AXES, ts=TS, fine=FINE,
        coarse=COARSE, comm=comms.time, method=method, stopping=nm.JumpTolerance(1e-11),
        basis=nm.SharedBasis("pod", 2, 1, n_batch_axes=n_batch_axes),
    )  # fmt: skip
    wanted: Any = plain_states(U0, PUSH, SHARED)
    assert solution.status is nm.Status.CONVERGED
    np.testing.assert_allclose(solution.ys["x"], wanted["x"], rtol=0, atol=1e-9)


@pytest.mark.mpi(max_size=2)
def test_the_sample_that_fails_is_named(comms):
    with pytest.raises(NonFiniteError, match=r"of the state \['x'\] of sample 2"):
        nm.solve(
            lambda t, u, a: {"v": u["v"], "x": a * u["x"] ** 2},
            {"x": jnp.ones(3), "v": jnp.ones(3)}, EDGES, args=jnp.array([0.01, 0.02, 1.0]),
            in_axes=0, fine=FINE, coarse=COARSE, comm=comms.time,
        )  # fmt: skip


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "in_axes, options, message",
    [
        ((0, {"a": 0, "b": None}), {}, r"`u0` has 3 samples and `args\['a'\]` has 2"),
        ((0, {"a": 1, "b": None}), {}, r"`args\['a'\]` has shape \(2,\) and so no axis 1"),
        ((0, 0), {}, r"`args\['b'\]` has shape \(\) and so no axis 0"),
        ((0, (0, None)), {}, "does not fit `args`"),
        ((None, None), {}, "names no axis"),
        ((0, "a"), {}, "expected axes or None"),
        ("all", {}, r"expected axes of `\(u0, args\)`"),
        ((0, None), dict(n_batch_axes=1), "leave `n_batch_axes` out"),
        ((0, None), dict(guess=np.zeros((8, 2))), r"one state of each sample .*\(8, 3\)"),
    ],
)
def test_batches_that_do_not_fit_are_refused(comms, in_axes, options, message):
    with pytest.raises(ProblemError, match=message):
        nm.solve(
            lambda t, u, args: -u, jnp.ones(3), EDGES, args={"a": jnp.ones(2), "b": 1.0},
            in_axes=in_axes, fine=FINE, coarse=COARSE, comm=comms.time, **options,
        )  # fmt: skip
