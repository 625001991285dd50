"""The ladder of the time-parallel solve, on any number of ranks."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
import scipy.integrate

import nodepint_mpi as nm
from nodepint_mpi.core.problems import PROBLEMS
from nodepint_mpi.errors import LayoutError, NonFiniteError, ProblemError
from nodepint_mpi.parallel.comms import alone, make_time_comm

LV = PROBLEMS["lotka_volterra"]
ARGS = {name: jnp.asarray(value) for name, value in LV.args.items()}
EDGES = np.linspace(0.0, 3.0, 8)
STEPS = dict(fine=nm.FixedSteps(nm.RK4(), 10), coarse=nm.FixedSteps(diffrax.Midpoint(), 2))
METHODS = [
    pytest.param("parareal", marks=pytest.mark.mpi(2, 2)),
    pytest.param("picard", marks=pytest.mark.mpi(max_size=1)),
]


def solve(comm, **options):
    return nm.solve(
        LV.field, jnp.asarray(LV.initial), options.pop("edges", EDGES), args=ARGS, comm=comm,
        **(STEPS | options),
    )  # fmt: skip


@pytest.mark.mpi(max_size=2)
def test_one_slice_equals_the_serial_solve_exactly(comms):
    if comms.time.size > 1:
        with pytest.raises(LayoutError, match="cannot share 1 time slices"):
            solve(comms.time, edges=EDGES[[0, -1]])
        return
    parallel, serial = (
        solve(comms.time, edges=EDGES[[0, -1]], method=method) for method in ("parareal", "serial")
    )
    np.testing.assert_array_equal(parallel.interface, serial.interface)


@pytest.mark.mpi(2, 3)
@pytest.mark.timeout_s(120)
@pytest.mark.parametrize("method", ["parareal", "picard", "serial"])
def test_same_iterates_on_any_rank_count(comms, on_one_rank, method):
    options = dict(method=method, stopping=nm.FixedSweeps(3))
    together = solve(comms.time, **options)
    emulated = on_one_rank(lambda: solve(make_time_comm(alone()), **options))
    np.testing.assert_allclose(together.interface, emulated.interface, rtol=0, atol=1e-12)
    np.testing.assert_allclose(together.jumps, emulated.jumps, rtol=0, atol=1e-12)
    assert together.fronts.tolist() == emulated.fronts.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_sweeps_converge_to_the_serial_solution(comms, method):
    solution = solve(comms.time, method=method, stopping=nm.JumpTolerance(1e-11))
    serial = solve(comms.time, method="serial")
    assert solution.status is nm.Status.CONVERGED
    assert solution.jumps[-1] <= 1e-11 or solution.sweeps == 7  # as many as slices: exact
    np.testing.assert_allclose(solution.interface, serial.interface, rtol=0, atol=1e-9)


@pytest.mark.mpi(max_size=1)
def test_a_solution_agrees_with_scipy(comms):
    solution = solve(comms.time, fine=nm.FixedSteps(nm.RK4(), 60), stopping=nm.JumpTolerance(1e-10))
    wanted = scipy.integrate.solve_ivp(
        lambda t, u: np.asarray([1.5 * u[0] - u[0] * u[1], u[0] * u[1] - 3 * u[1]]),
        (0.0, 3.0), LV.initial, method="DOP853", t_eval=EDGES, rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(solution.interface, wanted.y.T, atol=1e-7)


@pytest.mark.mpi(max_size=2)
def test_started_at_the_solution_nothing_jumps(comms):
    serial = solve(comms.time, method="serial")
    again = solve(comms.time, guess=serial.interface, stopping=nm.JumpTolerance(1e-12))
    assert again.sweeps == 0 and again.jumps[0] <= 1e-13
    assert again.status is nm.Status.CONVERGED


@pytest.mark.timeout_s(240)  # many programs to compile
@pytest.mark.parametrize("method", METHODS)
def test_after_k_sweeps_the_first_k_slices_are_serial(comms, method):
    serial = solve(comms.time, method="serial")
    for k in (1, 4, 7):
        iterate = solve(comms.time, method=method, stopping=nm.FixedSweeps(k))
        error = np.max(np.abs(iterate.interface - serial.interface), axis=1)
        assert np.all(error[: k + 1] <= 1e-13)
        assert k == 7 or method == "parareal" or error[k + 1] > 1e-6
        assert iterate.fronts.tolist() == list(range(1, k + 1))


@pytest.mark.mpi(max_size=1)
def test_too_few_sweeps_are_a_result_with_a_reason(comms):
    solution = solve(comms.time, stopping=nm.JumpTolerance(1e-12, max_sweeps=1))
    assert solution.status is nm.Status.MAX_SWEEPS and "not converged" in solution.status.value
    assert np.all(np.isfinite(solution.interface))


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(240)  # many programs to compile
def test_errors_of_dahlquist_are_the_published_ones(comms):
    """Backward Euler, 20 fine steps and 1 coarse step a slice, N = 10: the table of the problem."""
    chord = diffrax.VeryChord(rtol=1e-14, atol=1e-14, norm=optimistix.max_norm)
    euler = diffrax.ImplicitEuler(root_finder=chord)
    options = dict(fine=nm.FixedSteps(euler, 20), coarse=nm.FixedSteps(euler, 1), comm=comms.time)
    edges = np.linspace(0.0, 1.0, 11)
    serial = nm.solve(lambda t, u, args: -u, jnp.ones(1), edges, method="serial", **options)
    published = [1.6746e-2, 3.3661e-4, 3.9934e-6, 3.1040e-8, 1.6530e-10]
    for k, wanted in enumerate(published):
        iterate = nm.solve(
            lambda t, u, args: -u, jnp.ones(1), edges, stopping=nm.FixedSweeps(k), **options
        )
        error = float(np.max(np.abs(iterate.interface - serial.interface)))
        assert error == pytest.approx(wanted, rel=1e-3 if k < 4 else 3e-3)


@pytest.mark.mpi(max_size=2)
def test_fields_of_trees_and_images(comms):
    def field(t, u, args):
        return {"x": u["v"], "v": -u["x"] * args}

    u0 = {"x": jnp.ones((2, 3)), "v": jnp.zeros((2, 3))}
    solution = nm.solve(field, u0, EDGES, args=jnp.array(4.0), comm=comms.time, **STEPS)
    wanted = np.cos(2 * EDGES)[:, None, None] * np.ones((2, 3))
    np.testing.assert_allclose(solution.interface["x"], wanted, atol=1e-4)


@pytest.mark.mpi(max_size=2)
def test_a_true_blow_up_ends_the_states_there(comms):
    """u' = u^2 has a pole at t = 1, in the third slice."""
    solution = nm.solve(
        lambda t, u, args: u * u, jnp.ones(1), np.linspace(0.0, 3.0, 8), comm=comms.time,
        throw=False, **STEPS,
    )  # fmt: skip
    broken = int(solution.record.broken)
    assert solution.status is nm.Status.NON_FINITE and broken >= 2
    finite = np.isfinite(solution.interface[:, 0])
    assert np.all(finite[: broken + 1]) and not np.any(finite[broken + 1 :])


@pytest.mark.mpi(max_size=2)
def test_a_coarse_blow_up_is_stepped_around(comms):
    """A coarse step far beyond its stability limit overflows; the fine solve does not."""
    overflow = nm.FixedSteps(diffrax.Euler(), 60)
    solution = nm.solve(
        lambda t, u, args: -1e8 * u, jnp.ones(1), np.linspace(0.0, 1e-6, 8), comm=comms.time,
        fine=nm.FixedSteps(nm.RK4(), 40),
        coarse=nm.Propagator(lambda t, u, args: -1e13 * u, overflow),
    )  # fmt: skip
    assert solution.status is nm.Status.CONVERGED and int(solution.record.n_guarded) > 0
    np.testing.assert_allclose(
        solution.interface[:, 0], np.exp(-1e8 * np.linspace(0, 1e-6, 8)), atol=1e-5
    )


@pytest.mark.mpi(max_size=1)
def test_a_nan_in_the_field_is_said(comms):
    solution = nm.solve(
        lambda t, u, args: u * jnp.nan, jnp.ones(1), EDGES, comm=comms.time, throw=False, **STEPS
    )
    assert solution.status is nm.Status.NON_FINITE and solution.sweeps == 0


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(field=lambda t, u, args: u[:1]), ProblemError, r"shape \(1,\)"),
        (dict(field=lambda t, u, args: (u, u)), ProblemError, "du/dt must have"),
        (dict(u0=jnp.array([1.0, np.nan])), NonFiniteError, "`u0` holds NaN"),
        (dict(u0=np.ones(2) * 1j), ProblemError, "complex"),
        (dict(u0=jnp.zeros(0)), ProblemError, "empty"),
        (dict(edges=[0.0, 2.0, 1.0]), ProblemError, "strictly increasing"),
        (
            dict(method="newton"),
            ProblemError,
            "'parareal', 'tangent', 'reduced', 'picard' or 'serial'",
        ),
        (dict(coarse=None), ProblemError, "needs `coarse`"),
        (dict(guess=jnp.zeros((3, 2))), ProblemError, "one state per slice boundary"),
        (dict(guess=jnp.full((8, 2), np.inf)), NonFiniteError, "`guess` holds"),
    ],
)
def test_problems_that_do_not_fit_are_refused(comms, change, error, message):
    problem = dict(field=lambda t, u, args: -u, u0=jnp.ones(2), edges=EDGES, **STEPS) | change
    with pytest.raises(error, match=message):
        nm.solve(
            problem.pop("field"),
            problem.pop("u0"),
            problem.pop("edges"),
            comm=comms.time,
            **problem,
        )


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(240)  # many programs to compile
def test_published_counts_and_updates_of_lorenz(comms):
    """Gattiglio et al. (2024): 15 sweeps, and the largest change by each of them."""
    from nodepint_mpi.bench.accuracy import repeat_run
    from nodepint_mpi.bench.cases import PUBLISHED_RUNS

    run = repeat_run(comms, PUBLISHED_RUNS["lorenz"])
    assert run["sweeps"] == 15
    published = [1.656, 1.549, 1.632, 1.552, 1.427, 1.792, 1.438, 0.8874, 0.3717, 0.1537,
                 2.742e-2, 2.904e-3, 1.891e-4, 8.325e-6, 2.118e-7]  # fmt: skip
    np.testing.assert_allclose(run["updates"], published, rtol=1e-3)
    assert run["error"] == pytest.approx(1.2e-3, rel=0.05)


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(240)
@pytest.mark.parametrize("name", ["fitzhugh_nagumo", "fitzhugh_nagumo_start", "burgers"])
def test_published_counts(comms, name):
    from nodepint_mpi.bench.accuracy import repeat_run
    from nodepint_mpi.bench.cases import PUBLISHED_RUNS

    run = PUBLISHED_RUNS[name]
    if run.problem == "fitzhugh_nagumo":  # the count does not move down to 40 steps a slice
        run = run._replace(fine=nm.FixedSteps(nm.RK4(), 40))
    assert repeat_run(comms, run)["sweeps"] == run.sweeps


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(240)
@pytest.mark.parametrize("name", ["fitzhugh_nagumo", "lorenz", "burgers"])
def test_tangents_need_fewer_sweeps_than_learned_corrections(comms, name):
    """With the published fine solves and stopping rule, and a smaller true error than parareal."""
    from nodepint_mpi.bench.accuracy import repeat_run
    from nodepint_mpi.bench.cases import PUBLISHED_RUNS

    run = repeat_run(comms, PUBLISHED_RUNS[name], "tangent")
    assert run["status"] == "converged" and run["sweeps"] < min(run["published_learned"])
    assert run["error"] <= 1e-6


@pytest.mark.mpi(max_size=1)
def test_a_second_solve_is_not_compiled_again(comms):
    solve(comms.time)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        from nodepint_mpi.parallel import ivp

        patch.setattr(ivp, "own_slices", None)  # called while tracing only
        assert solve(comms.time).status is nm.Status.CONVERGED
