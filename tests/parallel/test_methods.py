"""Tangent and reduced sweeps: to the serial solution and gradient, with the costs they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.problems import PROBLEMS
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import alone, make_time_comm
from nodepint_mpi.parallel.shared_basis import SharedBasis
from tests.by_hand import slice_ends

pytestmark = pytest.mark.timeout_s(300)  # many programs to compile

FINE, COARSE = nm.FixedSteps(nm.RK4(), 12), nm.FixedSteps(nm.RK4(), 4)
BURGERS = PROBLEMS["burgers"]
LORENZ = PROBLEMS["lorenz"]._replace(initial=np.array([20.0, 5.0, -5.0]))

SWING = np.linspace(0.0, 6.0, 8)
WEIGHTS = np.random.default_rng(0).normal(size=(8, 2))

METHODS = {
    "identity": dict(method="tangent", basis=SharedBasis("identity"), recycle=False),
    "recycled": dict(method="tangent", basis=SharedBasis("identity", n_new=1), tangents=COARSE),
    "jumps": dict(method="tangent", basis=SharedBasis("jumps", 8, 4), tangents=COARSE),
    "float32": dict(
        method="tangent", basis=SharedBasis("jumps", 8, 4), tangents=COARSE, precision="float32"
    ),
    "random": dict(method="tangent", basis=SharedBasis("random", 2, 1)),
    "pod": dict(method="tangent", basis=SharedBasis("pod", 2), recycle=False),
    "complement": dict(method="tangent", basis=SharedBasis("jumps", 2, 2), complement=True),
    "reduced": dict(method="reduced", basis=SharedBasis("pod", 2, 1)),
    "reduced-complement": dict(method="reduced", basis=SharedBasis("pod", 2), complement=True),
}


def small(rank_limit, options):
    """The same options with a basis that fits a state of so many entries."""
    basis = options["basis"]
    if basis.rank is None or basis.rank <= rank_limit:
        return options
    fits = SharedBasis(basis.kind, rank_limit, min(basis.n_new, rank_limit))
    return options | {"basis": fits}


def solve(comm, problem, edges, *, initial=None, **options):
    args = {name: jnp.asarray(value) for name, value in problem.args.items()}
    initial = jnp.asarray(problem.initial if initial is None else initial)
    steps = dict(fine=FINE, coarse=COARSE)
    return nm.solve(problem.field, initial, edges, args=args, comm=comm, **(steps | options))


def relative_distance(one, other):
    return float(np.max(np.abs(one - other)) / np.max(np.abs(other)))


# Several ranks compile for minutes: on them what sends messages of its own, on one the others.
MOST_RANKS = {"recycled": 2, "pod": 2, "complement": 2, "reduced-complement": 3}


@functools.cache  # the same for all methods
def serial_states_and_gradient():
    """Those of the next test, by a solve that is written out."""
    problem = PROBLEMS["fitzhugh_nagumo"]
    args = {name: jnp.asarray(value) for name, value in problem.args.items()}

    def loss(initial):
        states = slice_ends(problem.field, initial, SWING, 12, args)
        return jnp.sum(jnp.sin(states) * WEIGHTS), states

    return jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(problem.initial))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.mpi(min(n, 2), n))
        for name, n in ((name, MOST_RANKS.get(name, 1)) for name in METHODS)
    ],
)
def test_every_method_reaches_the_serial_solution_and_gradient(comms, name):
    problem = PROBLEMS["fitzhugh_nagumo"]
    options = small(2, METHODS[name]) | dict(stopping=nm.JumpTolerance(1e-11), adjoint_tol=1e-11)

    def loss(initial):
        solution = solve(comms.time, problem, SWING, initial=initial, **options)
        return jnp.sum(jnp.sin(solution.interface) * WEIGHTS), solution

    (gradient, solution) = jax.grad(loss, has_aux=True)(jnp.asarray(problem.initial))
    (wanted, serial) = serial_states_and_gradient()
    assert solution.status is nm.Status.CONVERGED
    assert relative_distance(solution.interface, serial) <= 1e-8
    assert relative_distance(gradient, wanted) <= 1e-8
    assert int(solution.record.n_fallbacks) == 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.mpi(2, 3 if name == "complement" else 2))
        for name in ("jumps", "complement", "reduced", "random")
    ],
)
def test_same_iterates_on_any_rank_count(comms, on_one_rank, name):
    problem, edges = BURGERS, np.linspace(0.0, 0.4, 8)
    options = METHODS[name] | dict(stopping=nm.FixedSweeps(2), fine=nm.FixedSteps(nm.RK4(), 8))
    together = solve(comms.time, problem, edges, **options)
    emulated = on_one_rank(lambda: solve(make_time_comm(alone()), problem, edges, **options))
    np.testing.assert_allclose(together.interface, emulated.interface, rtol=0, atol=1e-9)
    np.testing.assert_allclose(together.jumps, emulated.jumps, rtol=0, atol=1e-9)
    busiest = -(-7 // comms.time.size)
    assert int(together.work.tangents) * 7 == int(emulated.work.tangents) * busiest


@pytest.mark.mpi(max_size=1)
def test_newton_converges_quadratically(comms):
    solution = solve(
        comms.time, PROBLEMS["fitzhugh_nagumo"], np.linspace(0.0, 6.0, 8),
        method="tangent", basis=SharedBasis("identity"), recycle=False,
        stopping=nm.JumpTolerance(1e-12),
    )  # fmt: skip
    jumps = solution.jumps
    assert 2 <= solution.sweeps <= 4
    for before, after in zip(jumps[:-1], jumps[1:], strict=True):
        assert after <= 20 * before**2 + 1e-11  # round-off


@pytest.mark.mpi(max_size=1)
def test_a_basis_of_jumps_beats_parareal_on_burgers(comms):
    """d = 128, nu = 0.02, N = 32, r = 16: four sweeps to 1e-5 where parareal has 2e-3."""
    import diffrax
    import optimistix

    newton = optimistix.Newton(rtol=1e-10, atol=1e-12, norm=optimistix.max_norm)
    problem = BURGERS._replace(args=BURGERS.args | {"nu": 0.02})
    options = dict(
        coarse=nm.FixedSteps(diffrax.ImplicitEuler(root_finder=newton), 1),
        fine=nm.FixedSteps(nm.RK4(), 16),
        stopping=nm.FixedSweeps(4),
    )
    edges = np.linspace(0.0, 2.0, 33)
    basis = dict(method="tangent", basis=SharedBasis("jumps", 16, 16), complement=True)
    serial = solve(comms.time, problem, edges, method="serial", **options)
    error = {
        name: relative_distance(
            solve(comms.time, problem, edges, **method, **options).interface, serial.interface
        )
        for name, method in {"tangent": basis, "parareal": {}}.items()
    }
    assert error["tangent"] <= 1e-5 and error["parareal"] >= 1e-3


@pytest.mark.mpi(max_size=2)
def test_newton_without_a_bound_on_a_chaotic_flow_is_guarded(comms):
    """Exact Jacobians on Lorenz blow up; damping or the fallback bring the solve home."""
    import diffrax

    edges = np.linspace(0.0, 2.0, 101)
    steps = dict(fine=nm.FixedSteps(diffrax.Euler(), 20), coarse=nm.FixedSteps(diffrax.Euler(), 2))
    options = dict(method="tangent", basis=SharedBasis("identity"), recycle=False)
    serial = solve(comms.time, LORENZ, edges, method="serial", **steps)
    for trust in (0.5, None):
        solution = solve(comms.time, LORENZ, edges, trust=trust, **options, **steps)
        assert solution.status is nm.Status.CONVERGED
        assert int(solution.record.n_damped) + int(solution.record.n_fallbacks) > 0
        assert relative_distance(solution.interface, serial.interface) <= 1e-7
        assert solution.sweeps < 40


@pytest.mark.mpi(max_size=1)
def test_an_image_state_and_a_batch_share_a_basis(comms, key):
    """Three samples of a small image each: as one solve and one by one."""
    mixing = 0.3 * jax.random.normal(key, (4, 4))

    def field(t, u, args):
        return jnp.tanh(jnp.einsum("...xyc,cd->...xyd", u, args)) - 0.1 * u

    initial = jax.random.normal(key, (3, 2, 3, 4))
    edges = np.linspace(0.0, 3.0, 8)
    common = dict(args=mixing, fine=FINE, coarse=nm.FixedSteps(nm.RK4(), 1), comm=comms.time)
    tight = dict(stopping=nm.JumpTolerance(1e-11))
    basis = SharedBasis("jumps", 12, 6, n_batch_axes=1)
    solution = nm.solve(field, initial, edges, method="tangent", basis=basis, **common, **tight)
    serial = nm.solve(field, initial, edges, method="serial", **common)
    assert solution.status is nm.Status.CONVERGED
    assert relative_distance(solution.interface, serial.interface) <= 1e-9


@pytest.mark.mpi(max_size=2)
def test_finished_slices_are_not_propagated_again(comms):
    """Picard on 7 slices, one at a time: 7 + 6 + ... fine solves, dealt over the ranks."""
    edges = np.linspace(0.0, 3.0, 8)
    problem = PROBLEMS["lotka_volterra"]
    solution = solve(
        comms.time, problem, edges, method="picard", stopping=nm.FixedSweeps(7), slices_at_once=1
    )
    together = solve(comms.time, problem, edges, method="picard", stopping=nm.FixedSweeps(7))
    np.testing.assert_allclose(solution.interface, together.interface, rtol=1e-12)
    if comms.time.size == 1:
        assert int(solution.work.fine) == 7 * 8 // 2
        assert int(together.work.fine) == 7 * 7
    assert int(solution.work.fine) <= int(together.work.fine)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="tangent"), "needs `basis`"),
        (dict(method="tangent", basis=("pod", 3)), "larger than the state of 2 entries"),
        (dict(method="tangent", basis=("pod",)), "needs a rank"),
        (dict(method="tangent", basis=("jumps", 2, 0)), "at least 1"),
        (dict(method="tangent", basis=("pod", 2, 3)), "do not fit"),
        (dict(method="reduced", basis=("jumps", 2, 1)), "needs a basis that holds states"),
        (dict(method="reduced", basis=("pod", 2), coarse=None), "needs `coarse`"),
        (dict(method="tangent", basis=("pod", 2), coarse=None, complement=True), "complement"),
    ],
)
def test_a_basis_that_does_not_fit_is_refused(comms, options, message):
    def make_and_solve(basis=None, **given):
        basis = None if basis is None else SharedBasis(*basis)
        problem, edges = PROBLEMS["lotka_volterra"], np.linspace(0.0, 3.0, 8)
        solve(comms.time, problem, edges, basis=basis, **given)

    with pytest.raises(ProblemError, match=message):
        make_and_solve(**options)


@pytest.mark.mpi(max_size=1)
def test_dependent_snapshots_are_no_error(comms):
    """A state that never moves has no jumps at all, and a POD basis of one direction."""
    options = dict(fine=FINE, coarse=COARSE, comm=comms.time, method="tangent")
    for basis in (SharedBasis("pod", 3), SharedBasis("jumps", 3, 2)):
        solution = nm.solve(
            lambda t, u, args: 0 * u, jnp.ones(3), np.linspace(0, 1, 8), basis=basis, **options
        )
        assert solution.status is nm.Status.CONVERGED and solution.sweeps == 0
