"""Controls found by `nm.control`, against closed forms, diffrax and differences."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import nodepint_mpi as nm
from nodepint_mpi.errors import NonFiniteError, ProblemError
from nodepint_mpi.optimal_control.gradients import with_gradient
from nodepint_mpi.optimal_control.objective import Objective, Penalty, separate
from nodepint_mpi.optimal_control.steered import state_control_problem

pytestmark = pytest.mark.timeout_s(180)
ALONE = pytest.mark.mpi(max_size=1)

EDGES = np.linspace(0.0, 1.0, 5)
START = (1.0, 0.5)
COST = nm.quadratic_cost(target=[1.0, 1.0], terminal=1.0, running=0.3, energy=0.5)
COARSE = nm.FixedSteps(diffrax.Euler(), 1)
TIGHT = nm.JumpTolerance(1e-13)


def pull(t, u, c, args):
    """Predator and prey, pulled at by a control that also enters by its square."""
    x, y = u
    drift = jnp.stack([x * (1.0 - 0.4 * y), y * (0.4 * x - 1.0)])
    return drift + c + 0.1 * jnp.sin(t) * c[::-1] ** 2


def make_control(kind):
    nodes = np.linspace(0.0, 1.0, 9)
    values = np.stack([np.sin(3 * nodes), np.cos(2 * nodes)], axis=1)
    if kind == "constant":
        return nm.PiecewiseConstant(nodes[:-1], values[:-1])
    if kind == "bounded":
        return nm.Bounded(nm.PiecewiseLinear(nodes, values), [-1.0, -2.0], 1.0 + np.ones(2))
    if kind == "linear":
        return nm.PiecewiseLinear(nodes, values)
    n_states = 2 if kind == "feedback" else None
    return nm.NetworkControl((0, 1), 2, n_states=n_states, width=4, key=jax.random.key(1))


def gradient_of(control, *, n_steps=8, solver=None, gradient="dp", **options):
    """The cost's value and gradient, as one row, by a converged solve."""
    steps = nm.FixedSteps(nm.RK4() if solver is None else solver, n_steps)
    options = {"method": "parareal", "coarse": COARSE, "stopping": TIGHT} | options
    options |= {"fine": with_gradient(steps, gradient), "adjoint_tol": 1e-13}
    problem = state_control_problem(
        pull, jnp.asarray(START), EDGES, COST, control, None, options, nm.world_time_comm()
    )
    variables, rest = separate(control, None, jointly=False)
    none = Penalty(jnp.zeros(0), jnp.zeros(()))
    value, found, _ = Objective(problem).converged(variables, rest, none, None)
    return float(value), np.asarray(ravel_pytree(found)[0])


def plain_cost(control, n_steps):
    """The same by one solve of diffrax, which knows no slices."""

    def field(t, state, control):
        u, c = state[:2], control(t, state[:2])
        along = 0.15 * jnp.sum((u - 1) ** 2) + 0.25 * jnp.sum(c**2)
        return jnp.append(pull(t, u, c, None), along)

    n = n_steps * (len(EDGES) - 1)
    ys = diffrax.diffeqsolve(
        diffrax.ODETerm(field), nm.RK4(), 0.0, 1.0, 1.0 / n, jnp.array([*START, 0.0]), control,
        max_steps=n + 2,
    ).ys  # fmt: skip
    assert ys is not None
    end = ys[-1]
    return end[2] + 0.5 * jnp.sum((end[:2] - 1) ** 2)


@pytest.mark.parametrize(
    "kind",
    ["linear", *(pytest.param(kind, marks=ALONE) for kind in ("bounded", "network", "feedback"))],
)
def test_value_and_gradient_are_those_of_plain_diffrax(kind):
    control = make_control(kind)
    value, gradient = gradient_of(control)
    params, static = eqx.partition(control, eqx.is_inexact_array)
    wanted, slope = jax.value_and_grad(lambda p: plain_cost(eqx.combine(p, static), 8))(params)
    slope = np.asarray(ravel_pytree(slope)[0])
    assert abs(value - float(wanted)) <= 1e-11
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-10 * np.max(np.abs(slope)))


@ALONE
@pytest.mark.parametrize("gradient", ["dp", "dal"])
def test_gradient_of_a_constant_control_is_that_of_differences(gradient):
    control = make_control("constant")
    _, slope = gradient_of(control, gradient=gradient)
    step = 1e-5
    for index in ((0, 0), (3, 1), (7, 0)):
        values = [
            gradient_of(
                eqx.tree_at(lambda c: c.values, control, control.values.at[index].add(sign * step))
            )[0]
            for sign in (1, -1)
        ]
        wanted = (values[0] - values[1]) / (2 * step)
        assert abs(slope[index[0] * 2 + index[1]] - wanted) <= 2e-8


@ALONE
@pytest.mark.parametrize(("solver", "order"), [(diffrax.Euler(), 1), (nm.RK4(), 4)])
@pytest.mark.parametrize("kind", ["constant", "network"])
def test_both_gradients_differ_by_the_order_of_the_solver(kind, solver, order):
    control, gaps = make_control(kind), []
    for n_steps in (4, 8):
        pulled, looped = (
            gradient_of(control, n_steps=n_steps, solver=solver, gradient=gradient)[1]
            for gradient in ("dp", "dal")
        )
        gaps.append(np.linalg.norm(pulled - looped) / np.linalg.norm(pulled))
    assert abs(np.log2(gaps[0] / gaps[1]) - order) <= 0.3
    if order == 4:
        assert gaps[-1] <= 1e-6


def riccati_cost(rate, weight, horizon):
    """min 1/2 int x^2 + c^2, x(0) = 1, x' = rate x + c: half the solution of Riccati's equation."""
    root = np.sqrt(rate**2 + weight)
    tanh = np.tanh(root * horizon)
    return 0.5 * weight * tanh / (root - rate * tanh)


@pytest.mark.parametrize("rate", [-1.0, pytest.param(0.7, marks=ALONE)])
def test_linear_quadratic_cost_is_that_of_riccati(rate):
    nodes = np.linspace(0.0, 1.0, 33)
    told = []
    found = nm.control(
        lambda t, u, c, args: args["rate"] * u + c, jnp.ones(1), EDGES,
        control=nm.PiecewiseLinear(nodes, np.zeros((33, 1))), args={"rate": rate},
        cost=nm.quadratic_cost(running=1.0, energy=1.0), fine=nm.FixedSteps(nm.RK4(), 8),
        coarse=COARSE, stopping=nm.JumpTolerance(1e-11), report=told.append,
    )  # fmt: skip
    assert abs(found.cost / riccati_cost(rate, 1.0, 1.0) - 1) <= 1e-6
    assert found.status.startswith("converged")
    assert [row["cost"] for row in told] == found.costs
    # The multiplier is the derivative of the cost, twice the value over x = 1 at the start.
    np.testing.assert_allclose(found.multipliers[0, 0], 2 * found.cost, rtol=1e-5)
    np.testing.assert_allclose(found.controls[:, 0], -found.multipliers[:, 0], atol=2e-3)
    if nm.world_time_comm().size > 1:
        alike = nm.world_time_comm().control.allgather((found.cost, tuple(found.costs)))
        assert len(set(alike)) == 1


@ALONE
def test_target_is_reached_by_the_least_energy():
    matrix = jnp.array([[0.0, 1.0], [1.0, 0.0]])

    def field(t, u, c, args):
        return matrix @ u + jnp.array([1.0, 0.0]) * c[0]

    found = nm.control(
        field, jnp.array([0.5, 0.5]), EDGES,
        control=nm.PiecewiseLinear(np.linspace(0, 1, 33), np.zeros((33, 1))),
        cost=nm.quadratic_cost(target=[1.0, -1.0], energy=2.0, reach=True),
        fine=nm.FixedSteps(nm.RK4(), 8), coarse=COARSE, stopping=nm.JumpTolerance(1e-11),
        constraint_tol=1e-5,
    )  # fmt: skip
    assert np.max(np.abs(found.gap)) <= 1e-5
    np.testing.assert_allclose(found.states[-1], [1.0, -1.0], atol=1.1e-5)
    assert abs(found.cost / 70.4432414804 - 1) <= 1e-4


def steer_line(**others):
    """x' = c from 0 to 1, by values at nodes; the best cost is 1 / 4."""
    given = {
        "control": nm.PiecewiseLinear(np.linspace(0, 1, 5), np.zeros((5, 1))),
        "cost": nm.quadratic_cost(target=1.0, terminal=1.0, energy=1.0),
        "fine": nm.FixedSteps(nm.RK4(), 4),
        "coarse": COARSE,
    }
    return nm.control(lambda t, u, c, args: c, jnp.zeros(1), EDGES, **given | others)


@pytest.mark.mpi(max_size=2)
def test_tracked_steps_of_optax_find_the_same_control():
    found = steer_line(optimizer=optax.adam(0.1), steps=150, tracking=True)
    assert abs(found.cost - 0.25) <= 1e-4
    assert len(found.costs) == 150 and set(found.sweeps) == {1}


@pytest.mark.mpi(max_size=2)
def test_a_control_is_the_mean_best_of_a_batch():
    starts = jnp.array([[-1.0], [1.0], [0.6]])  # of mean 0.2: the energy falls on the mean gap
    found = nm.control(
        lambda t, u, c, args: c, starts, EDGES, in_axes=(0, None), coarse=COARSE,
        control=nm.PiecewiseLinear([0.0, 1.0], np.zeros((2, 1))),
        cost=nm.quadratic_cost(target=1.0, terminal=1.0, energy=1.0),
        fine=nm.FixedSteps(nm.RK4(), 4),
    )  # fmt: skip
    # c minimizes mean (x + c - 1)^2 / 2 + c^2 / 2: half of 1 less the mean.
    np.testing.assert_allclose(found.controls[:, :, 0], 0.4, atol=1e-5)
    assert found.states.shape == (5, 3, 1) and found.multipliers is None


@ALONE
def test_a_control_against_noise_takes_the_mean_over_paths():
    found = nm.control(
        lambda t, u, c, args: c, jnp.zeros(1), EDGES, coarse=COARSE,
        diffusion=lambda t, u, args: 0.5 * jnp.ones_like(u), noise=nm.Noise(3, np.arange(16)),
        control=nm.PiecewiseLinear([0.0, 1.0], np.zeros((2, 1))),
        cost=nm.quadratic_cost(target=1.0, terminal=1.0, energy=1.0),
        fine=nm.FixedSteps(diffrax.Euler(), 4),
    )  # fmt: skip
    ends = np.asarray(found.states)[-1, :, 0]
    # On these paths, the same in every iteration: c = 1 - mean end.
    np.testing.assert_allclose(np.asarray(found.controls)[:, 0, 0], 1 - ends.mean(), atol=1e-4)
    assert ends.std() > 0.1


def true_field(t, u, c, args):
    return -args["rate"] * u + c


def recorded():
    times = np.array([0.3, 0.55, 1.0])
    starts = np.array([[1.0], [-0.5]])
    return starts, times, starts[:, None] * np.exp(-1.3 * times)[None, :, None]


@pytest.mark.parametrize(
    ("schedule", "gradients"),
    [
        pytest.param("alternating", ("dp", "dal"), marks=pytest.mark.mpi(max_size=2)),
        pytest.param("alternating", ("dal", "dp"), marks=ALONE),
        pytest.param("joint", ("dp", "dp"), marks=ALONE),
        pytest.param("joint", ("dal", "dal"), marks=ALONE),
    ],
)
def test_a_field_is_learned_and_steered(schedule, gradients):
    starts, times, states = recorded()
    steps = nm.FixedSteps(nm.RK4(), 4)
    loss = nm.trajectory_loss(
        true_field, starts, times, states, edges=EDGES, fine=steps, n_controls=1, coarse=COARSE,
        gradient=gradients[0],
    )  # fmt: skip
    learning = nm.Learning(
        loss, optax.adam(0.05), 200, schedule, rounds=2 if schedule == "alternating" else 1,
        weight=1e-6,
    )  # fmt: skip
    found = nm.control(
        true_field, jnp.ones(1), EDGES, args={"rate": jnp.array(0.5)}, learning=learning,
        control=nm.PiecewiseLinear(np.linspace(0, 1, 17), np.zeros((17, 1))), fine=steps,
        coarse=COARSE, gradient=gradients[1], steps=200,
        cost=nm.quadratic_cost(running=1.0, energy=1.0),
        optimizer="lbfgs" if schedule == "alternating" else optax.adam(0.05),
    )  # fmt: skip
    assert abs(float(found.model["rate"]) - 1.3) <= 5e-3
    assert abs(found.cost / riccati_cost(-1.3, 1.0, 1.0) - 1) <= 5e-3
    assert len(found.losses) == 200


@ALONE
def test_learning_before_hands_a_converged_model_on():
    starts, times, states = recorded()
    loss = nm.trajectory_loss(
        true_field, starts, times, states, edges=EDGES, fine=nm.FixedSteps(nm.RK4(), 4),
        n_controls=1, method="serial",
    )  # fmt: skip
    assert float(loss({"rate": jnp.array(1.3)})) <= 1e-12
    assert float(loss({"rate": jnp.array(0.0)})) == pytest.approx(
        np.mean((states - starts[:, None]) ** 2)
    )


WRONG = {
    "control of two axes": (
        {"control": lambda t, u: jnp.zeros((1, 1))}, "expected a row of numbers",
    ),
    "field that does not fit": ({"cost": None}, "`cost` is a NoneType"),
    "unknown option": ({"coars": COARSE}, "did you mean"),
    "unknown gradient": ({"gradient": "dpp"}, "choose 'dp' or 'dal'"),
    "unknown optimizer": ({"optimizer": "adam"}, "expected 'lbfgs' or one of optax's"),
    "tracking with L-BFGS": ({"tracking": True}, "line search of L-BFGS"),
    "no steps": ({"steps": 0}, "`steps` is 0"),
    "steps of a solver": ({"fine": nm.Stay()}, "expected steps such as"),
    "learning of nothing": ({"learning": "adam"}, "pass `nm.Learning"),
    "terminal of two numbers": (
        {"cost": nm.Cost(terminal=lambda u: jnp.zeros(2))}, "not a number",
    ),
}  # fmt: skip


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_on_all_ranks(name):
    others, message = WRONG[name]
    with pytest.raises(ProblemError, match=message):
        steer_line(**others)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nm.PiecewiseLinear([0.0, 0.0], np.zeros((2, 1))), "strictly increasing"),
        (lambda: nm.PiecewiseLinear([0.0, 1.0], np.zeros(2)), "one row for each"),
        (lambda: nm.PiecewiseConstant([np.nan], np.zeros((1, 1))), "finite times"),
        (lambda: nm.Bounded(lambda t, u: u, 1.0, 1.0), "low < high"),
        (lambda: nm.quadratic_cost(), "weight above zero"),
        (lambda: nm.quadratic_cost(energy=-1.0), "`energy`"),
        (lambda: nm.Cost(), "needs `terminal` or `running`"),
        (lambda: nm.Learning(print, optax.sgd(1.0), 0).check(), "`learning.steps`"),
        (lambda: nm.Learning(print, optax.sgd(1.0), 3, rounds=2).check(), "'alternating'"),
    ],
)
def test_wrong_parts_are_refused(make, message):
    with pytest.raises(ProblemError, match=message):
        make()


@pytest.mark.mpi(max_size=2)
def test_a_start_that_is_not_finite_is_refused():
    def explode(t, u, c, args):
        return u**3 * 1e6 + c

    with pytest.raises(NonFiniteError, match="slice"):
        nm.control(
            explode, jnp.ones(1), EDGES, cost=nm.quadratic_cost(energy=1.0),
            control=nm.PiecewiseLinear([0.0, 1.0], np.zeros((2, 1))),
            fine=nm.FixedSteps(nm.RK4(), 4), coarse=COARSE,
        )  # fmt: skip


@ALONE
def test_a_trial_that_explodes_is_stepped_back_from():
    # du/dt = u^2 + c from 1 blows up at t = 1 without control, just behind the horizon.
    found = nm.control(
        lambda t, u, c, args: u**2 + c, jnp.full(1, 0.9), EDGES,
        control=nm.PiecewiseLinear([0.0, 1.0], np.zeros((2, 1))),
        cost=nm.quadratic_cost(target=0.0, terminal=1e4, energy=1e-4),
        fine=nm.FixedSteps(nm.RK4(), 16), coarse=COARSE,
    )  # fmt: skip
    assert np.isfinite(found.cost) and found.cost < 1e-2 * found.costs[0]


@ALONE
def test_other_starts_are_rougher_or_faster_and_otherwise_the_same():
    nodes = np.linspace(0.0, 1.0, 2001)
    smooth = nm.PiecewiseLinear(nodes, np.ones((2001, 1)))
    rough = nm.roughened(smooth, 0.3, jax.random.key(0))
    assert rough.times == smooth.times
    noise = np.asarray(rough.values - smooth.values)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 0.3) < 0.03
    again = nm.roughened(smooth, 0.3, jax.random.key(0))
    np.testing.assert_array_equal(again.values, rough.values)
    with pytest.raises(ProblemError, match="above zero"):
        nm.roughened(smooth, 0.0, jax.random.key(0))
    slow, fast = (
        nm.NetworkControl((0, 1), 1, width=4, pace=pace, key=jax.random.key(1))
        for pace in (1.0, 5.0)
    )
    slow, fast = (jax.tree.leaves(eqx.filter(one, eqx.is_array)) for one in (slow, fast))
    for number, (one, five) in enumerate(zip(slow, fast, strict=True)):
        np.testing.assert_array_equal(five, (5.0 if number < 2 else 1.0) * one)
