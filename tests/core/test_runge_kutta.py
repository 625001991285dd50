"""Explicit Runge-Kutta methods against closed forms and against diffrax's own."""

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.propagators import AdaptiveSteps, FixedSteps, Propagator
from nodepint_mpi.core.runge_kutta import RK4, chebyshev, explicit_runge_kutta
from nodepint_mpi.errors import ProblemError

BOSH3 = dict(
    a=[[1 / 2], [0, 3 / 4], [2 / 9, 1 / 3, 4 / 9]],
    b=[2 / 9, 1 / 3, 4 / 9, 0],
    b_embedded=[7 / 24, 1 / 4, 1 / 3, 1 / 8],
)


def rotation(t, u, args):
    return jnp.stack([u[1], -u[0]]) * jnp.cos(t)


def propagate(integrator, ts=()):
    return Propagator(rotation, integrator)(
        None, jnp.array([1.0, 0.0]), jnp.array(0.0), jnp.array(2.0), jnp.asarray(ts, float)
    )


def exact(t):
    return np.array([np.cos(np.sin(t)), -np.sin(np.sin(t))])


def test_rk4_is_of_fourth_order():
    errors = [
        np.max(np.abs(propagate(FixedSteps(RK4(), n)).end - exact(2.0))) for n in (10, 20, 40)
    ]
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(rates - 4) < 0.3)


def test_rk4_reads_between_steps_to_third_order_at_least():
    ts = np.array([0.31, 0.777, 1.9])
    errors = []
    for n in (10, 20, 40):
        saves = propagate(FixedSteps(RK4(), n), ts).saves
        errors.append(np.max(np.abs(saves - np.stack([exact(t) for t in ts]))))
    assert np.all(np.log2(np.array(errors[:-1]) / np.array(errors[1:])) > 2.5)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (explicit_runge_kutta([], [1.0], order=1), diffrax.Euler()),
        (explicit_runge_kutta([[0.5]], [0.0, 1.0], order=2), diffrax.Midpoint()),
        (explicit_runge_kutta(**BOSH3, order=3), diffrax.Bosh3()),
    ],
    ids=["euler", "midpoint", "bosh3"],
)
def test_a_tableau_steps_like_the_diffrax_solver_of_that_name(ours, theirs):
    ends = [propagate(FixedSteps(solver, 13)).end for solver in (ours, theirs)]
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-15)


def test_an_embedded_tableau_chooses_its_steps():
    steps = AdaptiveSteps(explicit_runge_kutta(**BOSH3, order=3), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(propagate(steps).end, exact(2.0), atol=1e-6)


def test_adaptive_steps_need_an_embedded_method():
    with pytest.raises(ProblemError, match="no embedded error estimate"):
        AdaptiveSteps(RK4(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "tableau, message",
    [
        (dict(a=[[0.5]], b=[1.0], order=1), "needs rows of `a`"),
        (dict(a=[[0.5]], b=[0.5, 0.4], order=1), "sum to"),
        (dict(a=[[0.5]], b=[0.0, 1.0], b_embedded=[1.0], order=2), "must match"),
        (dict(a=[], b=[1.0], order=0), "order"),
    ],
)
def test_a_tableau_that_is_none_is_refused(tableau, message):
    with pytest.raises(ProblemError, match=message):
        explicit_runge_kutta(**tableau)


def test_chebyshev_is_of_first_order_and_damps_what_is_fast():
    errors = [
        np.max(np.abs(propagate(FixedSteps(chebyshev(6), n)).end - exact(2.0))) for n in (40, 80)
    ]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)
    z = jnp.linspace(-0.7 * 10**2, 0.0, 500)  # eigenvalue times step
    decay = Propagator(lambda t, u, args: z * u, FixedSteps(chebyshev(10), 1))
    growth = decay(None, jnp.ones_like(z), jnp.array(0.0), jnp.array(1.0), jnp.zeros(0)).end
    assert jnp.max(jnp.abs(growth[z < -10])) < 1 / 8 and jnp.max(jnp.abs(growth)) <= 1
