"""ParaOpt: published tables, closed forms, SciPy's collocation, large states, failures."""

from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from nodepint_mpi.bench.paraopt import PARAOPT_CASES, format_paraopt, run_paraopt
from nodepint_mpi.errors import AgreementError, LayoutError, NonFiniteError, ProblemError
from nodepint_mpi.optimal_control.paraopt import solve_paraopt
from nodepint_mpi.optimal_control.paraopt_options import ParaOpt, ParaOptStatus
from nodepint_mpi.parallel.comms import alone, make_time_comm

pytestmark = pytest.mark.timeout_s(240)

ONE = pytest.mark.mpi(max_size=1)
ROWS = {
    ("lotka_volterra", 64): (1547.87825, {1: 6, 2: 8, 4: 10, 16: 19}),
    ("lotka_volterra", 256): (1555.70603, {1: 6, 2: 7, 4: 8, 16: 11, 64: 20}),
    ("decay", 64): (4.733144e-2, {4: 4, 16: 5, 64: 7}),
    ("growth", 64): (8.935682, {4: 8, 16: 14}),
}
"""Published: cost, and sweeps by fine steps for each coarse one."""


def row(name, n_steps, k, marks=()):
    cost, sweeps = ROWS[name, n_steps]
    return pytest.param(name, n_steps, k, sweeps[k], cost, marks=marks)


@pytest.mark.parametrize(
    "name, n_steps, k, sweeps, cost",
    [
        row("lotka_volterra", 64, 1, pytest.mark.mpi(sizes=(1, 3))),
        row("lotka_volterra", 64, 2, ONE),
        row("lotka_volterra", 64, 4, pytest.mark.mpi(max_size=4)),
        row("lotka_volterra", 64, 16, ONE),
        row("lotka_volterra", 256, 1, ONE),
        row("lotka_volterra", 256, 16, ONE),
        row("lotka_volterra", 256, 64, pytest.mark.mpi(max_size=2)),
        row("decay", 64, 4, ONE),
        row("decay", 64, 16, ONE),
        row("decay", 64, 64, pytest.mark.mpi(sizes=(1, 4))),
        row("growth", 64, 4, ONE),
        row("growth", 64, 16, pytest.mark.mpi(sizes=(1, 3))),
    ],
)
def test_sweeps_and_costs_are_those_published(comms, name, n_steps, k, sweeps, cost):
    found = PARAOPT_CASES[name].solve(ParaOpt(n_steps, Fraction(1, k)), comm=comms.time)
    assert found.status is ParaOptStatus.CONVERGED, found.reason
    assert found.sweeps == sweeps
    digits = 9 if cost > 100 else 7
    assert f"{found.cost:.{digits}g}" == f"{cost:.{digits}g}"
    assert found.jump < 1e-8 * max(1.0, cost)
    if (name, n_steps, k) == ("lotka_volterra", 256, 1):
        published = 7.4e1, 2.4e1, 8.3e-1, 2.3e-3, 4.5e-9
        np.testing.assert_allclose(found.updates[:5], published, rtol=0.03)
    if name == "lotka_volterra":
        end = (1.010822, 0.094264) if n_steps == 64 else (1.011451, 0.093599)
        np.testing.assert_allclose(found.states[-1], end, atol=6e-7)
    # Of the last sweeps; the estimate is that of the first.
    if k > 1 and name != "decay":
        last = (found.updates[-1] / found.updates[-4]) ** (1 / 3)
        assert 0.5 < found.contraction / last < 2


def test_diverging_ends_with_a_reason_on_all_ranks(comms):
    found = PARAOPT_CASES["lotka_volterra"].solve(ParaOpt(64, 1 / 64), comm=comms.time)
    assert found.status is ParaOptStatus.DIVERGED and found.contraction > 1
    assert "slice 0 (t from 0 to 0.125)" in found.reason and "`ratio`" in found.reason
    for part in (found.states, found.node_states, found.node_multipliers, found.controls):
        assert np.all(np.isfinite(part))
    reasons = comms.control.allgather((found.reason, found.states.tobytes()))
    assert len(set(reasons)) == 1


SIZES = 7, 5  # slices and steps: uneven on two, three and four ranks


def oscillator(t, u, c, args):
    """With a force on its velocity, and a time of its own."""
    return args["matrix"] @ u + args["gain"] * jnp.stack([0 * c[0], c[0]]) + jnp.sin(t)


OSCILLATOR = {"matrix": np.array([[0.0, 1.0], [-2.0, -0.3]]), "gain": 1.5}
WEIGHT = np.diag([2.0, 1.0])


def solve_oscillator(comm, options, **others):
    return solve_paraopt(
        oscillator, np.array([1.0, -0.5]), np.linspace(0.0, 2.0, SIZES[0] + 1),
        running=lambda t, u, c: 0.5 * jnp.sum(u**2) + 0.2 * c[0] ** 2,
        terminal=lambda u: 0.5 * u @ jnp.asarray(WEIGHT) @ u, n_controls=1, options=options,
        args=OSCILLATOR, comm=comm, **others,
    )  # fmt: skip


@pytest.mark.mpi(2)
def test_every_number_of_ranks_finds_the_same(comms, on_one_rank):
    for options in (ParaOpt(6, 1 / 2), ParaOpt(5, coarse_steps=3, scheme="implicit_midpoint")):
        found = solve_oscillator(comms.time, options)
        wanted = on_one_rank(lambda o=options: solve_oscillator(make_time_comm(alone()), o))
        assert found.status is ParaOptStatus.CONVERGED
        assert (found.sweeps, found.status, found.reason) == (
            wanted.sweeps, wanted.status, wanted.reason,
        )  # fmt: skip
        names = ("states", "multipliers", "node_states", "node_multipliers", "controls", "costs")
        for name in (*names, "cost", "times", "control_times"):
            ours, right = getattr(found, name), getattr(wanted, name)
            np.testing.assert_allclose(ours, right, rtol=1e-12, atol=1e-12)
        everywhere = comms.control.allgather([getattr(found, name).tobytes() for name in names])
        assert all(each == everywhere[0] for each in everywhere)


def quadratic_program(matrix, weight, n_steps, horizon, start):
    """Minimum over piecewise constant controls of the oscillator stepped by the midpoint rule."""
    h = horizon / n_steps
    left, right = np.eye(2) + h / 2 * matrix, np.eye(2) - h / 2 * matrix
    state = np.linalg.solve  # of the affine map of all controls to all states
    maps, shifts = [np.zeros((2, n_steps))], [start]
    for i in range(n_steps):
        drive = np.zeros((2, n_steps))
        drive[1, i] = h * OSCILLATOR["gain"]
        maps.append(state(right, left @ maps[-1] + drive))
        shifts.append(state(right, left @ shifts[-1] + h * np.sin((i + 0.5) * h)))
    hessian, slope, constant = 0.4 * h * np.eye(n_steps), np.zeros(n_steps), 0.0
    parts = [(h * np.eye(2), (a + b) / 2, (p + q) / 2) for a, b, p, q in
             zip(maps[:-1], maps[1:], shifts[:-1], shifts[1:], strict=True)]  # fmt: skip
    for metric, gain, shift in [*parts, (weight, maps[-1], shifts[-1])]:
        hessian = hessian + gain.T @ metric @ gain
        slope = slope + gain.T @ metric @ shift
        constant += 0.5 * shift @ metric @ shift
    controls = -np.linalg.solve(hessian, slope)
    return controls, constant + 0.5 * slope @ controls


def test_midpoint_finds_the_minimum_of_the_discrete_cost_in_one_sweep(comms):
    n_slices, n_steps = SIZES
    found = solve_oscillator(comms.time, ParaOpt(n_steps, scheme="implicit_midpoint"))
    controls, cost = quadratic_program(
        OSCILLATOR["matrix"], WEIGHT, n_slices * n_steps, 2.0, np.array([1.0, -0.5])
    )
    assert found.sweeps == 2 and found.updates[1] < 1e-12  # the second finds nothing to change
    np.testing.assert_allclose(found.controls[:, 0], controls, atol=1e-11)
    assert found.cost == pytest.approx(cost, rel=1e-11)
    np.testing.assert_allclose(found.control_times, (found.times[1:] + found.times[:-1]) / 2)


@ONE
def test_schemes_have_their_orders_against_the_matrix_exponential():
    """y' = a y + c with 1/2 y^2 + 1/2 c^2: the published optimal cost, a = 1, T = 1."""
    exact = 0.844749195797
    for scheme, order in (("implicit_euler", 1), ("implicit_midpoint", 2)):
        errors = []
        for n_steps in (16, 32):
            found = solve_paraopt(
                lambda t, u, c, args: u + c, [1.0], [0.0, 0.3, 1.0], n_controls=1,
                running=lambda t, u, c: 0.5 * jnp.sum(u**2) + 0.5 * jnp.sum(c**2),
                terminal=lambda u: 0.0 * jnp.sum(u), options=ParaOpt(n_steps, scheme=scheme),
            )  # fmt: skip
            errors.append(abs(found.cost - exact))
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@ONE
def test_lotka_volterra_is_that_of_collocation():
    case = PARAOPT_CASES["lotka_volterra"]

    def slopes(t, both):
        x, y, p, q = both
        return np.stack([
            x * (10 - 0.2 * y) - p / 0.5, y * (0.2 * x - 10) - q / 0.5,
            -p * (10 - 0.2 * y) - q * 0.2 * y, p * 0.2 * x - q * (0.2 * x - 10),
        ])  # fmt: skip

    found = case.solve(ParaOpt(128, 1 / 8, scheme="implicit_midpoint"))
    assert found.status is ParaOptStatus.CONVERGED
    start = np.concatenate([found.node_states, found.node_multipliers], axis=1).T
    right = scipy.integrate.solve_bvp(
        slopes,
        lambda a, b: np.array([a[0] - 20, a[1] - 15, b[2] - b[0] + 1, b[3] - b[1] + 1]),
        found.times, start, tol=1e-8, max_nodes=20000,
    )  # fmt: skip
    assert right.success
    both = right.sol(found.times)
    scale = np.max(np.abs(both[:2]))
    assert np.max(np.abs(both[:2].T - found.node_states)) < 3e-4 * scale
    controls = -right.sol(found.control_times)[2:].T / 0.5
    assert np.max(np.abs(controls - found.controls)) < 1e-3 * np.max(np.abs(controls))


@ONE
def test_a_control_that_is_no_quadratic_minimum_is_found_by_newton():
    """cosh(c) instead of c^2 / 2, against SciPy's boundary values."""
    found = solve_paraopt(
        lambda t, u, c, args: -u + c, [2.0], np.linspace(0.0, 1.0, 4), n_controls=1,
        running=lambda t, u, c: jnp.sum(jnp.cosh(c)), terminal=lambda u: 2.0 * jnp.sum(u**2),
        options=ParaOpt(40, scheme="implicit_midpoint"),
    )  # fmt: skip
    right = scipy.integrate.solve_bvp(
        lambda t, v: np.stack([-v[0] - np.arcsinh(v[1]), v[1]]),
        lambda a, b: np.array([a[0] - 2.0, b[1] - 4 * b[0]]),
        np.linspace(0, 1, 50), np.ones((2, 50)), tol=1e-9,
    )  # fmt: skip
    wanted = -np.arcsinh(right.sol(found.control_times)[1])
    np.testing.assert_allclose(found.controls[:, 0], wanted, atol=2e-4)


# ---- Large states ------------------------------------------------------------------------------


def heat(n, comm, options, **others):
    """u_t = 0.05 u_xx + c at all points, from one bump to another."""
    x = np.linspace(0.0, 1.0, n + 2)[1:-1]
    start, target = np.sin(np.pi * x), np.exp(-40 * (x - 0.6) ** 2)

    def field(t, u, c, args):
        padded = jnp.pad(u, 1)
        return 0.05 * (n + 1) ** 2 * (padded[2:] - 2 * u + padded[:-2]) + c

    return solve_paraopt(
        field, start, np.linspace(0.0, 1.0, 5), n_controls=n, target=target, comm=comm,
        running=lambda t, u, c: 0.05 * jnp.sum(c**2) / n, options=options,
        terminal=lambda u: 0.5 * jnp.sum((u - jnp.asarray(target)) ** 2) / n, **others,
    )  # fmt: skip


@pytest.mark.mpi(max_size=2)
def test_few_directions_do_for_heat_control(comms):
    """Against the closed form: the last multiplier solves a linear system of all points."""
    n, n_steps = 24, 4
    few = heat(n, comms.time, ParaOpt(n_steps, 1 / 2, basis=8))
    assert few.status is ParaOptStatus.CONVERGED, few.reason
    assert few.sweeps < 10 and few.contraction < 0.8
    x, h, n_all = np.linspace(0.0, 1.0, n + 2)[1:-1], 1 / 16, 16
    matrix = 0.05 * (n + 1) ** 2 * (np.eye(n, k=1) - 2 * np.eye(n) + np.eye(n, k=-1))
    step = np.linalg.inv(np.eye(n) - h * matrix)
    power = np.linalg.matrix_power
    start, target = np.sin(np.pi * x), np.exp(-40 * (x - 0.6) ** 2)
    reached = sum(power(step, 2 * k + 1) for k in range(n_all)) * h * n / 0.1
    free = power(step, n_all) @ start
    last = np.linalg.solve(n * np.eye(n) + reached, free - target)
    np.testing.assert_allclose(few.multipliers[-1], last, atol=1e-9)
    np.testing.assert_allclose(few.states[-1], free - reached @ last, atol=1e-8)
    np.testing.assert_allclose(few.controls[0], -power(step, n_all - 1) @ last * n / 0.1, atol=1e-8)
    one = heat(n, comms.time, ParaOpt(n_steps, 1 / 2, basis=1, max_sweeps=few.sweeps))
    assert one.contraction > few.contraction and one.status is not ParaOptStatus.CONVERGED


@ONE
def test_a_full_basis_is_no_basis():
    options: dict[str, Any] = dict(n_steps=4, ratio=1 / 2)
    plain = heat(6, None, ParaOpt(**options))
    full = heat(6, None, ParaOpt(**options, basis=np.random.default_rng(0).normal(size=(6, 6))))
    assert full.sweeps == plain.sweeps
    np.testing.assert_allclose(full.updates[:-1], plain.updates[:-1], rtol=1e-6)
    np.testing.assert_allclose(full.states, plain.states, atol=1e-11)


# ---- Starts, and what is refused ---------------------------------------------------------------


@pytest.mark.mpi(max_size=2)
def test_starts_nearer_to_the_solution_take_fewer_sweeps(comms):
    case = PARAOPT_CASES["growth"]
    options: dict[str, Any] = dict(n_steps=16, ratio=1 / 4)
    line = case.solve(ParaOpt(**options), comm=comms.time)
    coarse = case.solve(ParaOpt(**options, start="coarse"), comm=comms.time)
    noted = []
    again = case.solve(
        ParaOpt(**options), comm=comms.time, guess=(line.states, line.multipliers),
        on_estimate=noted.append, on_sweep=lambda *sweep: noted.append(sweep),
    )  # fmt: skip
    assert again.sweeps == 1 < coarse.sweeps < line.sweeps
    assert noted == [again.contraction, (1, again.updates[0], again.costs[0])]
    assert coarse.cost == pytest.approx(line.cost, rel=1e-9)
    # The cheaper derivatives are the same where the field is linear.
    fine = case.solve(ParaOpt(**options, linearize="fine"), comm=comms.time)
    np.testing.assert_allclose(fine.updates[:3], line.updates[:3], rtol=1e-9)


def test_too_few_sweeps_are_a_result(comms):
    found = PARAOPT_CASES["growth"].solve(ParaOpt(16, 1 / 4, max_sweeps=2), comm=comms.time)
    assert found.status is ParaOptStatus.MAX_SWEEPS and found.sweeps == 2
    assert "max_sweeps" in found.reason and np.isfinite(found.cost)


@ONE
@pytest.mark.parametrize(
    "options, words",
    [
        (dict(n_steps=6, ratio=1 / 4), "not a whole number of coarse steps"),
        (dict(n_steps=6, ratio=1.5), "above 0 and at most 1"),
        (dict(n_steps=6, coarse_steps=7), "from 1 to `n_steps` = 6"),
        (dict(n_steps=6, coarse_steps=2, ratio=0.5), "not both"),
        (dict(n_steps=0), "1 or more"),
        (dict(n_steps=6, scheme="euler"), "implicit_euler, implicit_midpoint"),
        (dict(n_steps=6, tol=0.0), "positive"),
        (dict(n_steps=6, tol=1e-17), "cannot be reached"),
        (dict(n_steps=6, basis=3), "from 1 to 2"),
        (dict(n_steps=6, basis=np.ones((2, 2))), "linearly dependent"),
        (dict(n_steps=6, basis=np.ones((3, 1))), "must be"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ProblemError, match=words):
        solve_oscillator(None, ParaOpt(**options))


@ONE
def test_problems_that_do_not_fit_are_refused():
    def solve(**changes: Any):
        given: dict[str, Any] = dict(
            field=lambda t, u, c, args: -u + c, u0=[1.0], edges=[0.0, 0.5, 1.0], n_controls=1,
            running=lambda t, u, c: 0.5 * jnp.sum(c**2), terminal=lambda u: jnp.sum(u**2),
            options=ParaOpt(4),
        )  # fmt: skip
        return solve_paraopt(**(given | changes))

    with pytest.raises(ProblemError, match="needs a term in every control"):
        solve(running=lambda t, u, c: jnp.sum(u**2))
    with pytest.raises(ProblemError, match="`field` returns"):
        solve(field=lambda t, u, c, args: jnp.stack([u[0], c[0]]))
    with pytest.raises(ProblemError, match="`running` returns"):
        solve(running=lambda t, u, c: c**2)
    with pytest.raises(ProblemError, match="`guess` has shape"):
        solve(guess=(np.ones((2, 1)), np.ones((3, 1))))
    with pytest.raises(ProblemError, match="`target` has shape"):
        solve(target=np.ones(2))
    with pytest.raises(NonFiniteError, match="`u0` holds NaN"):
        solve(u0=[np.nan])
    with pytest.raises(NonFiniteError, match="`guess` holds NaN"):
        solve(guess=(np.ones((3, 1)), np.full((3, 1), np.nan)))


@ONE
def test_a_field_that_fails_is_a_reason_and_not_a_number_in_silence():
    found = solve_paraopt(
        lambda t, u, c, args: jnp.sqrt(0.5 - t) * u + c, [1.0], [0.0, 0.4, 1.0], n_controls=1,
        running=lambda t, u, c: 0.5 * jnp.sum(c**2), terminal=lambda u: jnp.sum(u**2),
        options=ParaOpt(4),
    )  # fmt: skip
    assert found.status is ParaOptStatus.DIVERGED and np.isnan(found.cost)
    assert "slice 1 (t from 0.4 to 1)" in found.reason
    assert np.all(np.isfinite(found.states)) and np.all(np.isfinite(found.node_states))


@pytest.mark.mpi(2, 2)
@pytest.mark.parametrize("name", ["guess", "options", "target"])
def test_what_differs_between_ranks_is_refused_on_all(comms, name):
    def different(of, value):
        return value + 0.5 * comms.time.rank * (of == name)

    at_edges = np.ones((5, 1))
    with pytest.raises(AgreementError, match=f"`{name}"):
        solve_paraopt(
            lambda t, u, c, args: c - u, np.ones(1), np.linspace(0.0, 1.0, 5),
            running=lambda t, u, c: jnp.sum(c**2), terminal=lambda u: jnp.sum(u**2), n_controls=1,
            options=ParaOpt(4, 0.25 + 0.75 * comms.time.rank * (name == "options")),
            target=different("target", np.zeros(1)),
            guess=(different("guess", at_edges), at_edges), comm=comms.time,
        )  # fmt: skip


@pytest.mark.mpi(min_size=3)
def test_more_ranks_than_slices_are_refused(comms):
    with pytest.raises(LayoutError, match="cannot share 2 time slices"):
        solve_paraopt(
            lambda t, u, c, args: -u + c, [1.0], [0.0, 0.5, 1.0], n_controls=1, comm=comms.time,
            running=lambda t, u, c: 0.5 * jnp.sum(c**2), terminal=lambda u: jnp.sum(u**2),
            options=ParaOpt(4),
        )  # fmt: skip


@ONE
def test_the_table_shows_what_was_found(comms):
    said = []
    rows = run_paraopt(comms, [("decay", 64, [Fraction(1, 64)])], report=said.append)
    assert len(said) == 1 and "converged" in said[0]
    assert "| decay | 64 | 1/64 | 7 | 0.0473314399 | (0.256998) |" in format_paraopt(rows)
