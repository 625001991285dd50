"""States at times of one's own, forward and back, against plain diffrax with the same steps."""

import functools
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.errors import NonFiniteError, ProblemError

EDGES = np.linspace(0.0, 5.0, 8)  # 7 slices: uneven on 2, 3 and 4 ranks
STEPS = 8
# At the start and the end, on an edge and within rounding of one, inside steps, two in one step.
TS = np.array([0.0, 0.31, EDGES[2], 2.2, 2.21, EDGES[4] + 1e-13, 4.9, 5.0])
U0, ARGS = jnp.array([1.0, 0.2]), {"push": jnp.array(0.5)}
OPTIONS = dict(fine=nm.FixedSteps(nm.RK4(), STEPS), coarse=nm.FixedSteps(nm.RK4(), 2))
TIGHT = dict(stopping=nm.JumpTolerance(1e-12), adjoint_tol=1e-12)
BASIS = dict(basis=nm.SharedBasis("identity"))


def pendulum(t, u, args):
    return jnp.stack([u[1], args["push"] * jnp.cos(0.7 * t) - jnp.sin(u[0])])


def loss_of(ys):
    weights = np.random.default_rng(1).normal(size=ys.shape)
    return jnp.sum(jnp.sin(ys) * weights)


@functools.cache
def plain(ts: tuple[float, ...]):
    """Saved states, and the gradient of a loss of them, by one diffrax solve."""
    ends = [np.linspace(a, b, STEPS + 1)[:-1] for a, b in itertools.pairwise(EDGES)]
    steps = diffrax.StepTo(jnp.asarray(np.concatenate([*ends, EDGES[-1:]])))

    def loss(u0, args):
        ys = diffrax.diffeqsolve(
            diffrax.ODETerm(pendulum), nm.RK4(), 0.0, EDGES[-1], None, u0, args,
            saveat=diffrax.SaveAt(ts=jnp.asarray(ts)), stepsize_controller=steps,
        ).ys  # fmt: skip
        return loss_of(ys), ys

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(U0, ARGS)


def check_against_plain(comm, ts, **options):
    def loss(u0, args):
        solution = nm.solve(
            pendulum, u0, EDGES, args=args, ts=ts, comm=comm, **(OPTIONS | TIGHT | options)
        )
        return loss_of(solution.ys), solution

    (_, solution), found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(U0, ARGS)
    (_, ys), wanted = plain(tuple(ts))
    np.testing.assert_allclose(solution.ts, ts, rtol=0, atol=1e-12)
    np.testing.assert_allclose(solution.ys, ys, rtol=0, atol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found, wanted)
    return solution


@pytest.mark.timeout_s(240)
@pytest.mark.parametrize(
    "method, options",
    [
        pytest.param("parareal", {}, marks=pytest.mark.mpi(2, 3)),
        pytest.param("picard", {}, marks=pytest.mark.mpi(max_size=1)),
        pytest.param("serial", {}, marks=pytest.mark.mpi(max_size=1)),
        pytest.param("tangent", BASIS, marks=pytest.mark.mpi(max_size=1)),
        pytest.param("reduced", BASIS, marks=pytest.mark.mpi(max_size=1)),
    ],
)
def test_saved_states_and_their_gradient_are_those_of_diffrax(comms, method, options):
    solution = check_against_plain(comms.time, TS, method=method, **options)
    np.testing.assert_array_equal(solution.ys[2], solution.interface[2])
    np.testing.assert_array_equal(solution.ys[0], U0)
    held = comms.control.allgather(solution.held)
    assert held[0].start == 0 and held[-1].stop == len(TS)
    assert all(left.stop == right.start for left, right in itertools.pairwise(held))


@pytest.mark.timeout_s(240)
@pytest.mark.parametrize(
    "ts",
    [
        pytest.param([3.3], marks=pytest.mark.mpi(2, 3)),  # one rank has it, the others none
        pytest.param([0.0, *EDGES[1:3]], marks=pytest.mark.mpi(max_size=1)),
    ],
    ids=["one", "edges alone"],
)
def test_ranks_may_have_no_saved_times(comms, ts):
    solution = check_against_plain(comms.time, ts)
    sizes = comms.control.allgather(len(range(len(ts))[solution.held]))
    assert sum(sizes) == len(ts) and (comms.time.size < 3 or min(sizes) == 0)


@pytest.mark.mpi(max_size=1)
def test_the_initial_state_alone_can_be_saved(comms):
    def loss(u0):
        options = OPTIONS | dict(method="serial")
        return jnp.sum(
            nm.solve(pendulum, u0, EDGES, args=ARGS, ts=[0.0], comm=comms.time, **options).ys ** 2
        )

    np.testing.assert_array_equal(jax.grad(loss)(U0), 2 * U0)


@pytest.mark.mpi(max_size=1)
def test_steps_of_error_control_and_the_continuous_adjoint(comms):
    """u' = -k u with trees: u(t) = exp(-k t), and its derivative."""
    ts = np.array([0.2, 0.5, 0.55, 0.9])

    def total(k):
        solution = nm.solve(
            lambda t, u, k: {"u": -k * u["u"]}, {"u": jnp.ones(1)}, np.linspace(0, 1, 4), args=k,
            ts=ts, comm=comms.time, method="serial",
            fine=nm.AdaptiveSteps(diffrax.Tsit5(), 1e-8, 1e-8, adjoint="continuous"),
        )  # fmt: skip
        return jnp.sum(solution.ys["u"]), solution.ys["u"]

    (_, ys), slope = jax.value_and_grad(total, has_aux=True)(0.7)
    np.testing.assert_allclose(ys[:, 0], np.exp(-0.7 * ts), rtol=1e-6)
    np.testing.assert_allclose(slope, np.sum(-ts * np.exp(-0.7 * ts)), rtol=1e-6)


@pytest.mark.mpi(max_size=2)
def test_saved_states_end_where_the_solution_does(comms):
    """u' = u^2 has a pole at t = 1, in the third slice."""
    edges, ts = np.linspace(0.0, 3.0, 8), [0.3, 0.8, 1.5, 2.0, 3.0]

    def solve(throw):
        return nm.solve(
            lambda t, u, args: u * u, jnp.ones(1), edges, ts=ts, comm=comms.time, throw=throw,
            fine=nm.FixedSteps(nm.RK4(), 40), coarse=nm.FixedSteps(nm.RK4(), 2),
        )  # fmt: skip

    solution = solve(False)
    broken = int(solution.record.broken)
    np.testing.assert_allclose(solution.ys[0], 1 / 0.7, rtol=1e-5)
    assert np.isfinite(solution.ys[:, 0]).tolist() == [bool(t <= edges[broken]) for t in ts]
    with pytest.raises(NonFiniteError, match=f"in slice {broken}"):
        solve(True)


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(
    "ts, message",
    [
        ([1.0, 0.5], "strictly increasing: 1 is followed by 0.5"),
        ([1.0, 1.0], "strictly increasing"),
        ([EDGES[1], EDGES[1] + 1e-13], "strictly increasing"),
        ([0.5, np.nan], "holds NaN"),
        ([0.5, 5.1], r"holds 5.1, outside the horizon \[0, 5\]"),
        ([-0.1, 0.5], "holds -0.1, outside"),
        ([], "at least one time"),
        ([[0.5]], r"shape \(1, 1\)"),
        ("now", "not a list of times"),
    ],
)
def test_times_that_cannot_be_saved_are_refused(comms, ts, message):
    with pytest.raises(ProblemError, match=message):
        nm.solve(pendulum, U0, EDGES, args=ARGS, ts=ts, comm=comms.time, **OPTIONS)


@pytest.mark.mpi(max_size=1)
def test_traced_times_are_refused(comms):
    with pytest.raises(ProblemError, match="`ts` is traced"):
        jax.jit(
            lambda ts: (
                nm.solve(pendulum, U0, EDGES, args=ARGS, ts=ts, comm=comms.time, **OPTIONS).ys
            )
        )(TS)
