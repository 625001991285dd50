"""Stochastic equations by `nm.solve` against loops written out by hand with the same increments."""

import functools
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.noise import draw_increments, path_key
from nodepint_mpi.errors import NonFiniteError, ProblemError

# diffrax's Milstein methods multiply times of one type by arrays of another.
pytestmark = [pytest.mark.standard_promotion]
N_SLICES, N_FINE, LAST = 6, 8, 1.5
EDGES = np.linspace(0.0, LAST, N_SLICES + 1)
EULER = diffrax.Euler()
MATRIX = np.array([[0.3, 0.1, 0.0], [0.0, 0.2, 0.4]])


def drift(t, u, args):
    return -args["rate"] * u + jnp.sin(t)


DIFFUSIONS: dict[str, Any] = {
    "diagonal": (lambda t, u, args: args["sigma"] * jnp.sqrt(1 + u**2), (2,), {}),
    "scalar": (lambda t, u, args: args["sigma"] * u, (), {}),
    "additive": (lambda t, u, args: args["sigma"] * (1 + t) + 0 * u, (2,), {"additive": True}),
    "general": (
        lambda t, u, args: args["sigma"] * jnp.asarray(MATRIX) * (1 + jnp.sum(u**2)), (3,),
        {"kind": "general", "n_dims": 3},
    ),
}  # fmt: skip
DIFFUSIONS["scalar"][2]["kind"] = "scalar"
ARGS = {"rate": jnp.array(0.8), "sigma": jnp.array(0.5)}
STARTS = jnp.array([[1.0, -0.5], [0.3, 0.7], [0.0, 0.2]])
METHODS: dict[str, dict[str, Any]] = {
    "serial": {},
    "picard": {},
    "parareal": {},
    "parareal, Milstein": {"coarse": nm.FixedSteps(diffrax.ItoMilstein(), 1)},
    "tangent": {"basis": nm.SharedBasis("identity")},
    "reduced": {"basis": nm.SharedBasis("pod", 2, 1, n_batch_axes=1)},
    "reduced, complement": {
        "basis": nm.SharedBasis("pod", 1, 1, n_batch_axes=1), "complement": True
    },
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def by_hand(name, starts, args):
    """Euler-Maruyama, step by step over the whole horizon: (edges, paths, *state)."""
    diffusion, shape, _ = DIFFUSIONS[name]
    n_steps, width = N_SLICES * N_FINE, LAST / (N_SLICES * N_FINE)

    def one(start, path):
        noise = draw_increments(path_key(11, path), 0, n_steps, jnp.asarray(width), shape).w

        def step(u, row):
            t, dw = row
            g = diffusion(t, u, args)
            moved = jnp.tensordot(g, dw, axes=1) if name == "general" else g * dw
            u = u + width * drift(t, u, args) + moved
            return u, u

        rows = jnp.arange(n_steps) * width, noise
        states = jax.lax.scan(step, start, rows)[1]
        return jnp.concatenate([start[None], states[N_FINE - 1 :: N_FINE]])

    return jax.vmap(one, out_axes=1)(starts, jnp.arange(len(starts)))


def solved(comm, name, starts, args, **options):
    diffusion, _, more = DIFFUSIONS[name]
    given = {
        "fine": nm.FixedSteps(EULER, N_FINE), "coarse": nm.FixedSteps(EULER, 1),
        "noise": nm.Noise(11, jnp.arange(len(starts)), **more), "in_axes": (0, None),
        "stopping": nm.JumpTolerance(1e-13), "comm": comm,
    } | options  # fmt: skip
    return nm.solve(drift, starts, EDGES, diffusion=diffusion, args=args, **given)


# Every method and every kind of noise, but not each with each. Ranks draw the noise of their slices
# in one way, whatever its kind; what they send is the method's own. The others are on one rank.
CASES = [
    pytest.param(name, method, marks=pytest.mark.mpi(min(n, 2), n))
    for n, name, method in [
        (3, "diagonal", "parareal"), (3, "diagonal", "reduced"), (2, "diagonal", "picard"),
        (2, "diagonal", "tangent"), (2, "general", "parareal"), (1, "diagonal", "serial"),
        (1, "diagonal", "parareal, Milstein"), (1, "scalar", "parareal"), (1, "scalar", "reduced"),
        (1, "additive", "parareal"), (1, "additive", "reduced, complement"),
        (1, "general", "tangent"),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_method_finds_the_serial_path(comms, name, method):
    options = METHODS[method] | {"method": method.split(",")[0]}
    solution = solved(comms.time, name, STARTS, ARGS, **options)
    wanted = by_hand(name, STARTS, ARGS)
    np.testing.assert_allclose(solution.interface, wanted, rtol=0, atol=1e-12)
    assert solution.sweeps <= N_SLICES and solution.status is nm.Status.CONVERGED


def read(interface):
    return jnp.sum(interface[-1] ** 2) + jnp.sum(jnp.sin(interface[2]))


@pytest.mark.mpi(2, 2)
def test_a_tracked_loop_comes_to_the_serial_path(comms):
    """One sweep each way a step, with parameters that stay; and a solve from a guess does none."""

    def loss(args, carry):
        options = {"carry": carry, "stopping": None, "check_ranks": False}
        return read(solved(comms.time, "diagonal", STARTS, args, **options).interface)

    step = jax.jit(nm.value_and_grad(loss))
    value, gradient, carry = step(ARGS, nm.SolveCarry())
    for _ in range(2 * N_SLICES):
        value, gradient, carry = step(ARGS, carry)
    wanted = by_hand("diagonal", STARTS, ARGS)
    np.testing.assert_allclose(value, read(wanted), rtol=1e-12)
    expected = jax.grad(lambda args: read(by_hand("diagonal", STARTS, args)))(ARGS)
    for name, of_name in expected.items():
        np.testing.assert_allclose(gradient[name], of_name, rtol=1e-8)
    with pytest.raises(ProblemError, match="leave one of them out"):
        fresh = {"noise": nm.Noise(11, jnp.arange(3), step=0), "stopping": None}
        nm.value_and_grad(
            lambda args, carry: jnp.sum(
                solved(comms.time, "diagonal", STARTS, args, carry=carry, **fresh).interface
            )
        )(ARGS, nm.SolveCarry())
    warm = solved(comms.time, "diagonal", STARTS, ARGS, guess=wanted)
    assert warm.sweeps == 0
    np.testing.assert_allclose(warm.interface, wanted, rtol=0, atol=1e-12)


GRADIENTS = [
    pytest.param(name, method, marks=pytest.mark.mpi(min(n, 2), n))
    for n, name, method in [
        (3, "diagonal", "parareal"), (2, "general", "tangent"), (2, "diagonal", "reduced"),
        (1, "scalar", "parareal"), (1, "additive", "picard"), (1, "diagonal", "serial"),
        (1, "diagonal", "parareal, Milstein"),
    ]
]  # fmt: skip


@pytest.mark.timeout_s(240)
@pytest.mark.parametrize(("name", "method"), GRADIENTS)
def test_the_gradient_is_that_of_the_path(comms, name, method):
    options = METHODS[method] | {"method": method.split(",")[0], "check_ranks": False}

    def loss(starts, args):
        return read(solved(comms.time, name, starts, args, **options).interface)

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(STARTS, ARGS)
    expected = jax.grad(lambda *given: read(by_hand(name, *given)), argnums=(0, 1))(STARTS, ARGS)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.mpi(max_size=1)
def test_within_ten_tolerances_of_the_serial_path(comms):
    for tol in (1e-3, 1e-6):
        solution = solved(comms.time, "diagonal", STARTS, ARGS, stopping=nm.JumpTolerance(tol))
        assert solution.sweeps < N_SLICES
        error = np.max(np.abs(solution.interface - by_hand("diagonal", STARTS, ARGS)))
        assert 0 < error <= 10 * tol


@pytest.mark.mpi(max_size=1)
def test_a_path_alone_is_that_of_the_batch(comms):
    options = {"noise": nm.Noise(11, 1), "in_axes": None}
    alone = solved(comms.time, "diagonal", STARTS[1], ARGS, **options).interface
    np.testing.assert_allclose(alone, by_hand("diagonal", STARTS, ARGS)[:, 1], rtol=0, atol=1e-12)


@pytest.mark.mpi(max_size=1)
def test_states_at_times_inside_slices_are_interpolated_between_fine_steps(comms):
    """diffrax's Euler interpolates linearly."""
    ts = np.array([EDGES[1] + 0.75 * LAST / 48, LAST])
    solution = solved(comms.time, "scalar", STARTS, ARGS, ts=ts)
    steps = draw_increments(path_key(11, 0), N_FINE, 1, jnp.asarray(LAST / 48), ()).w[0]
    start = by_hand("scalar", STARTS, ARGS)[1, 0]
    moved = LAST / 48 * drift(EDGES[1], start, ARGS) + ARGS["sigma"] * start * steps
    np.testing.assert_allclose(solution.ys[0, 0], start + 0.75 * moved, rtol=0, atol=1e-12)
    np.testing.assert_allclose(solution.ys[1], solution.interface[-1], rtol=0, atol=1e-13)


def cubic(t, u, args):
    return args * (u - u**3)


@pytest.mark.mpi(max_size=2)
def test_iterates_that_pass_through_nan_are_guarded(comms):
    """A coarse step that overshoots: states leave the numbers, in some samples and for a while.

    The others are not held up, and what comes out is the serial path.
    """
    n, starts = 16, jnp.linspace(-2.0, 2.0, 24)
    given: dict[str, Any] = {
        "diffusion": lambda t, u, args: 0.5 * jnp.ones_like(u), "args": jnp.array(1.0),
        "noise": nm.Noise(3, jnp.arange(24), additive=True), "in_axes": (0, None),
        "fine": nm.FixedSteps(EULER, 32), "comm": comms.time,
    }  # fmt: skip
    steep = np.linspace(0.0, 20.0, n + 1)
    found = nm.solve(
        cubic, starts, steep, coarse=nm.FixedSteps(EULER, 1), stopping=nm.JumpTolerance(1e-10),
        **given,
    )  # fmt: skip
    serial = nm.solve(cubic, starts, steep, method="serial", **given)
    assert found.status is nm.Status.CONVERGED and int(found.record.n_guarded) > 0
    assert np.all(np.isfinite(found.interface))
    np.testing.assert_allclose(found.interface, serial.interface, rtol=0, atol=1e-8)
    # With the samples that never overshoot alone, as many sweeps as among the others.
    assert found.sample_sweeps is not None
    good = np.flatnonzero(found.sample_sweeps == np.min(found.sample_sweeps))
    given["noise"] = nm.Noise(3, jnp.asarray(good), additive=True)
    alone = nm.solve(
        cubic, starts[good], steep, coarse=nm.FixedSteps(EULER, 1), **given,
        stopping=nm.JumpTolerance(1e-10),
    )  # fmt: skip
    np.testing.assert_array_equal(alone.sample_sweeps, found.sample_sweeps[good])


REFUSED = [
    ({"noise": None}, "with a `diffusion` pass"),
    ({"noise": nm.Noise(11, jnp.arange(3), calculus="stratonovich")}, "take `EulerHeun"),
    ({"noise": nm.Noise(11, jnp.arange(3), calculus="Ito")}, "choose from 'ito'"),
    ({"noise": nm.Noise(11, jnp.arange(3), kind="general")}, "kind 'general', which needs it"),
    ({"noise": nm.Noise(11, jnp.arange(3), kind="general", n_dims=0)}, "at least one"),
    ({"noise": nm.Noise(11, jnp.arange(3), kind="general", n_dims=3)}, r"expected \(2, 3\)"),
    ({"noise": nm.Noise(11, jnp.arange(3), n_dims=2)}, "belongs to kind 'general'"),
    ({"noise": nm.Noise(11, jnp.arange(3), kind="diag")}, "choose from 'diagonal'"),
    ({"noise": nm.Noise(11, jnp.array([0, -1, 2]))}, "negative numbers"),
    ({"noise": nm.Noise(11, 0.5)}, "must be a whole number"),
    ({"noise": nm.Noise(11, np.array([0, 1, 2**32]))}, "count from zero"),
    ({"noise": nm.Noise(11, jnp.arange(3), step=-1)}, "`noise.step` holds negative"),
    ({"noise": nm.Noise(11, jnp.arange(4))}, "`noise.paths` has 4|and `noise.paths` has 4"),
    ({"noise": nm.Noise(1.5, jnp.arange(3))}, "expected a whole number"),
    ({"noise": nm.Noise(np.nan, jnp.arange(3))}, "expected a whole number"),
    ({"coarse": nm.FixedSteps(EULER, 3)}, "the one must divide the other"),
    ({"coarse": nm.FixedSteps(diffrax.Heun(), 1)}, "`coarse`: Heun converges .* Stratonovich"),
    ({"fine": nm.FixedSteps(diffrax.Tsit5(), 8)}, "Tsit5 is not a solver for equations"),
    ({"fine": nm.AdaptiveSteps(diffrax.Tsit5(), 1e-6, 1e-6)}, "needs `FixedSteps"),
    ({"fine": nm.FixedSteps(EULER, 8, "continuous")}, "needs the discrete adjoint"),
    ({"fine": nm.FixedSteps(diffrax.SRA1(), 8)}, "SRA1 is for additive noise"),
    (
        {"coarse": None, "method": nm.Parareal(nm.Propagator(drift, nm.FixedSteps(EULER, 5)))},
        "`method` takes 5 steps",
    ),
]


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_what_does_not_fit_is_refused(comms, change, said):
    with pytest.raises(ProblemError, match=said):
        solved(comms.time, "diagonal", STARTS, ARGS, **change)


@pytest.mark.mpi(max_size=1)
def test_a_diffusion_of_another_shape_or_with_nan_is_refused(comms):
    given: dict[str, Any] = {
        "fine": nm.FixedSteps(EULER, 2), "noise": nm.Noise(0), "method": "serial",
        "args": ARGS, "comm": comms.time,
    }  # fmt: skip
    with pytest.raises(ProblemError, match=r"diffusion returned shape \(3,\); expected \(2,\)"):
        nm.solve(drift, STARTS[0], EDGES, diffusion=lambda t, u, args: jnp.ones(3), **given)
    with pytest.raises(NonFiniteError, match="slice 0"):
        nm.solve(drift, STARTS[0], EDGES, diffusion=lambda t, u, args: u * jnp.nan, **given)
