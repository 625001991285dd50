"""CONVERGED means that every slice was solved; a slice that cannot be solved is named.

The fine propagator fails in one slice, in a way and at a place that are arguments of the field, so
that each method and rule is compiled once. Before that slice the solution is exp(-t).
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.errors import NonFiniteError

EDGES = np.linspace(0.0, 1.5, 7)
TOL = 1e-6
WAYS = {"NaN": 0.0, "overflow": 1.0, "out of steps": 2.0, "only far from the solution": 3.0}
RULES = {
    "jump": nm.JumpTolerance(TOL),
    "freeze_end": nm.FreezeSlices(TOL),
    "freeze_start": nm.FreezeSlices(TOL, "start"),
    "end_update": nm.EndUpdate(TOL, "max"),
}
ALONE, TWO = pytest.mark.mpi(1, 1), pytest.mark.mpi(2, 2)
BASIS = nm.SharedBasis("identity")


def field(t, u, args):
    since, until, way = args
    wild = jnp.stack(
        [
            jnp.nan + u[0],
            1e200 * (u[0] + 1.0) ** 3,
            -u[0] + 3000 * jnp.cos(3000 * t) + 2.0,
            jnp.where(jnp.abs(u[0]) > 1.2, jnp.nan, -u[0]),
        ]
    )[way.astype(int)]
    inside = (t > since) & (t < until)
    return jnp.stack([jnp.where(inside, wild, -u[0]), -u[1]])


@functools.cache
def options(method):
    fine = nm.AdaptiveSteps(diffrax.Tsit5(), 1e-9, 1e-9, max_steps=40)
    # A coarse propagator that overshoots, so that iterates are far from the solution at first.
    coarse = nm.Propagator(lambda t, u, args: 2.0 * u, nm.FixedSteps(nm.RK4(), 1))
    own = dict(basis=BASIS, recycle=False) if method == "tangent" else {}
    return dict(method=method, fine=fine, coarse=coarse, throw=False, **own)


def solve(comms, method, rule, n_bad, way):
    left, right = EDGES[n_bad], EDGES[n_bad + 1]
    args = tuple(map(jnp.asarray, (left + 0.3 * (right - left), right, WAYS[way])))
    return nm.solve(
        field, jnp.ones(2), EDGES, args=args, stopping=RULES[rule], comm=comms.time,
        **options(method),
    )  # fmt: skip


@pytest.mark.timeout_s(120)
@pytest.mark.parametrize(
    "method, rule",
    [
        pytest.param("parareal", "jump", marks=TWO),
        pytest.param("parareal", "freeze_end", marks=ALONE),
        pytest.param("parareal", "freeze_start", marks=ALONE),
        pytest.param("parareal", "end_update", marks=ALONE),
        pytest.param("picard", "freeze_end", marks=TWO),
        pytest.param("tangent", "jump", marks=TWO),
        pytest.param("serial", "jump", marks=ALONE),
    ],
)
def test_converged_means_that_no_fine_solve_failed(comms, method, rule):
    exact = np.exp(-EDGES)[:, None] * np.ones(2)
    for way in WAYS:
        for n_bad in (0, 2, 5):
            solution = solve(comms, method, rule, n_bad, way)
            interface, case = np.asarray(solution.interface), f"{way} in slice {n_bad}"
            if way == "only far from the solution":
                assert solution.status is nm.Status.CONVERGED, case
                assert solution.jumps[-1] <= 10 * TOL, case
                np.testing.assert_allclose(interface, exact, rtol=0, atol=10 * TOL, err_msg=case)
                continue
            assert solution.status is nm.Status.NON_FINITE, case
            assert int(solution.record.broken) == n_bad, case
            assert int(solution.record.broken_entry) == -1, case
            solved = slice(0, n_bad + 1)
            np.testing.assert_allclose(
                interface[solved], exact[solved], rtol=0, atol=10 * TOL, err_msg=case
            )
            assert np.all(np.isnan(interface[n_bad + 1 :])), case
            assert int(solution.record.fronts[solution.record.n_sweeps]) == n_bad, case


FIXED = dict(fine=nm.FixedSteps(nm.RK4(), 4), coarse=nm.FixedSteps(nm.RK4(), 1))


def failing_late(t, u, args):
    return {"x": jnp.where(t > 0.6, jnp.array([0.0, jnp.inf]), args * u["x"]), "y": u["y"]}


@pytest.mark.mpi(max_size=2)
def test_the_error_names_slice_time_and_entry(comms):
    u0 = {"x": jnp.ones(2), "y": jnp.ones(3)}
    with pytest.raises(NonFiniteError) as caught:
        nm.solve(
            failing_late, u0, np.linspace(0, 1, 5), args=jnp.array(1.0), comm=comms.time, **FIXED
        )
    for part in ("slice 2 (of 0 to 3; t from 0.5 to 0.75)", "entry [1] of the state ['x']"):
        assert part in str(caught.value)


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(120)
def test_under_jit_and_grad_a_failed_solve_gives_no_number(comms):
    u0, edges = {"x": jnp.ones(2), "y": jnp.ones(3)}, np.linspace(0, 1, 5)

    def loss(args, throw):
        solution = nm.solve(
            failing_late, u0, edges, args=args, comm=comms.time, throw=throw, **FIXED
        )
        return jnp.sum(solution.interface["y"][-1])  # a part that never left the finite numbers

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    assert np.all(np.isnan(both(jnp.array(1.0), False)))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"slice 2 \(of 0 to 3; t from 0.5"):
        jax.block_until_ready(both(jnp.array(1.0), True))


@pytest.mark.mpi(max_size=1)
def test_a_stiff_oscillator_out_of_steps_is_an_error(comms):
    """Van der Pol with mu = 1000 by an explicit method: it runs out of steps."""

    def van_der_pol(t, u, args):
        return jnp.stack([u[1], 1000.0 * (1 - u[0] ** 2) * u[1] - u[0]])

    with pytest.raises(NonFiniteError, match="ran out of steps"):
        nm.solve(
            van_der_pol, jnp.array([2.0, 0.0]), np.linspace(0, 40, 5), method="picard",
            fine=nm.AdaptiveSteps(diffrax.Tsit5(), 1e-6, 1e-9, max_steps=64), comm=comms.time,
        )  # fmt: skip
