"""Recycled tangents earn their place; a fallback costs only the sweeps that did not work."""

import functools

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.problems import PROBLEMS
from nodepint_mpi.parallel.pace import best_iterate, first_pace, judge_pace

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(180)]


def van_der_pol(t, u, args):
    return jnp.stack([u[1], 2.0 * (1 - u[0] ** 2) * u[1] - u[0]])


def stuart_landau(t, u, args):
    return jnp.stack([u[0] - u[1], u[0] + u[1]]) - u * jnp.sum(u**2)


def problem(name):
    """Field, initial state, arguments, edges, coarse steps: solutions that turn along the way."""
    rk4 = functools.partial(nm.FixedSteps, nm.RK4())
    if name in ("fitzhugh_nagumo", "lorenz"):
        known = PROBLEMS[name]
        args = {key: jnp.asarray(value) for key, value in known.args.items()}
        coarse = rk4(6) if name == "lorenz" else nm.FixedSteps(diffrax.Midpoint(), 4)
        n_slices = 50 if name == "lorenz" else 40
        edges = np.linspace(*known.span, n_slices + 1)
        return known.field, jnp.asarray(known.initial), args, edges, coarse
    edges = np.linspace(0.0, 20.0, 41)
    if name == "van_der_pol":
        return van_der_pol, jnp.array([2.0, 0.0]), None, edges, rk4(2)
    return stuart_landau, jnp.array([0.1, 0.0]), None, edges, nm.FixedSteps(diffrax.Euler(), 10)


def solve(comms, name, **options):
    field, u0, args, edges, coarse = problem(name)
    if options.pop("with_coarse", True):
        options["coarse"] = coarse
    if options.get("method") == "tangent":
        options["basis"] = nm.SharedBasis("identity")
    fine = nm.FixedSteps(nm.RK4(), 45)
    stopping = nm.JumpTolerance(1e-8)
    solution = nm.solve(
        field, u0, edges, args=args, fine=fine, stopping=stopping, comm=comms.time, **options
    )
    assert solution.status is nm.Status.CONVERGED
    return solution


@pytest.mark.parametrize("name", ["fitzhugh_nagumo", "van_der_pol", "stuart_landau"])
def test_recycling_is_never_worse_than_parareal_on_a_limit_cycle(comms, name):
    parareal = solve(comms, name)
    recycled, fresh = (solve(comms, name, method="tangent", recycle=r) for r in (True, False))
    assert fresh.sweeps < parareal.sweeps and recycled.sweeps < parareal.sweeps
    assert recycled.sweeps <= fresh.sweeps + 3
    assert int(recycled.work.tangents) < int(fresh.work.tangents)
    assert int(recycled.record.n_fallbacks) == 0
    serial = solve(comms, name, method="serial")
    np.testing.assert_allclose(recycled.interface, serial.interface, rtol=0, atol=2e-6)


@pytest.mark.mpi(max_size=2)
def test_where_tangents_cannot_work_parareal_takes_over_once_and_early(comms):
    """Newton's sweeps on a chaotic flow: one of them shows it, and parareal starts where it did."""
    parareal, tangent = solve(comms, "lorenz"), solve(comms, "lorenz", method="tangent")
    assert tangent.sweeps <= parareal.sweeps + 2
    assert tangent.sweeps - int(tangent.record.n_fallbacks) <= 2


def test_without_a_coarse_propagator_there_are_fewer_sweeps_than_slices(comms):
    options = dict(method="tangent", with_coarse=False)
    recycled = solve(comms, "van_der_pol", **options)
    fresh = solve(comms, "van_der_pol", recycle=False, **options)
    assert recycled.sweeps <= fresh.sweeps + 3 and fresh.sweeps <= 25  # of 40 slices


def judged(jumps):
    """What is decided at each jump in turn: whether it was slow, and whether to fall back."""
    ends = jnp.zeros((1, 1))
    pace, decisions = first_pace(ends, has_fallback=True), []
    for k, jump in enumerate(jumps):
        pace, now = judge_pace(pace, jnp.asarray(jump), ends + k, ends - k)
        decisions.append((bool(pace.slow), bool(pace.falls_back), bool(now)))
    return pace, decisions


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "jumps, slow, takes_over",
    [
        ([1.0, 1e-2, 1e-5], [], None),
        ([1.0, 2.0, 1e-2, 1e-5], [1], None),  # one step out, as Newton's first often is
        ([1.0, 0.4, 0.19, 0.09], [1, 2, 3], None),  # slow, but each time to less than half
        ([1.0, 0.9, 0.8, 0.7], [1, 2, 3], 2),
        ([1.0, 11.0, 1e-3], [1], 1),
        ([1.0, np.inf, 1e-3], [1], 1),
        ([np.inf, np.inf, np.inf], [1, 2], 2),
        ([1e-3, 1e-6, 5.0], [2], 2),
    ],
)
def test_the_decay_decides(jumps, slow, takes_over):
    pace, decisions = judged(jumps)
    assert [k for k, decision in enumerate(decisions) if decision[0]] == slow
    assert [k for k, decision in enumerate(decisions) if decision[2]] == (
        [] if takes_over is None else [takes_over]
    )
    falls_back = [decision[1] for decision in decisions]
    assert falls_back == [takes_over is not None and k >= takes_over for k in range(len(jumps))]
    assert pace.ends is not None and int(pace.ends[0, 0]) == int(np.argmin(jumps))


def test_the_best_iterate_keeps_what_is_solved():
    owned = own_slices(np.arange(6.0), 1, 0)
    ends = jnp.arange(5.0)[:, None]
    pace = first_pace(10 + ends, has_fallback=True)._replace(fine_ends=20 + ends)
    best, fine = best_iterate(pace, ends, 30 + ends, jnp.array(2), owned)
    assert best.ravel().tolist() == [0.0, 1.0, 12.0, 13.0, 14.0]
    assert fine.ravel().tolist() == [30.0, 31.0, 32.0, 23.0, 24.0]
