"""Propagators against plain diffrax solves."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.propagators import AdaptiveSteps, FixedSteps, Propagator
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.transposed import linearise_block
from nodepint_mpi.errors import ProblemError

pytestmark = pytest.mark.timeout_s(150)  # diffrax takes its time to compile

T0, T1, TS = jnp.array(0.3), jnp.array(1.9), jnp.array([0.41, 1.0, 1.7])
U0, RATE = jnp.array([1.0, 0.5]), jnp.array(1.3)


def field(t, u, rate):
    return jnp.stack([rate * u[1], -u[0]]) * (1 + jnp.sin(t))


def plain(rate, start, ts, solver, **options):
    states = diffrax.diffeqsolve(
        diffrax.ODETerm(field), solver, T0, T1, None, start, rate,
        saveat=diffrax.SaveAt(ts=jnp.append(ts, T1)), **options,
    ).ys  # fmt: skip
    assert states is not None
    return states


@pytest.mark.parametrize("checkpoints, ts", [(3, TS), (None, jnp.linspace(0.31, 1.89, 12))])
def test_fixed_steps_equal_plain_diffrax_with_its_gradient(checkpoints, ts):
    """With fewer times than steps, and with more."""
    n_steps, solver = 9, diffrax.Tsit5()
    ours = Propagator(field, FixedSteps(solver, n_steps, checkpoints=checkpoints))
    grid = T0 + (T1 - T0) * jnp.arange(n_steps + 1.0) / n_steps
    controller = diffrax.StepTo(grid.at[-1].set(T1))

    def our_states(rate, start):
        result = ours(rate, start, T0, T1 - T0, ts - T0)
        return jnp.concatenate([result.saves, result.end[None]])

    def their_states(rate, start):
        return plain(rate, start, ts, solver, stepsize_controller=controller)

    weights = jnp.arange(2.0 * len(ts) + 2).reshape(-1, 2)
    for derivative in (
        lambda states: states,
        lambda states: jax.jacrev(lambda r, u: jnp.sum(weights * states(r, u)), (0, 1)),
    ):
        got, wanted = (
            jax.jit(derivative(states))(RATE, U0) for states in (our_states, their_states)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), got, wanted)


@functools.cache
def linearised(at_once):
    """A block of five slices, and what is pulled back through it."""
    fine = Propagator(field, FixedSteps(RK4(), 3))
    inside = [np.array([n + 0.4]) for n in range(5)]
    owned = own_slices(np.arange(6.0), 1, 0, inside=inside)

    @jax.jit
    def there_and_back(starts):
        result, pull_back = linearise_block(fine, RATE, starts, owned, at_once=at_once)
        return result, pull_back(jax.tree.map(jnp.cos, result))

    return there_and_back(U0[None] * jnp.arange(1.0, 6.0)[:, None])


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_slices_in_groups_are_the_slices_all_at_once(at_once):
    got, wanted = linearised(at_once), linearised(None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), got, wanted)


def test_adaptive_steps_equal_plain_diffrax():
    steps = AdaptiveSteps(diffrax.Tsit5(), rtol=1e-6, atol=1e-8)
    result = Propagator(field, steps)(RATE, U0, T0, T1 - T0, TS - T0)
    controller = diffrax.PIDController(rtol=1e-6, atol=1e-8)
    wanted = plain(RATE, U0, TS, diffrax.Tsit5(), stepsize_controller=controller)
    np.testing.assert_allclose(result.saves, wanted[:-1], rtol=1e-14)
    np.testing.assert_allclose(result.end, wanted[-1], rtol=1e-14)


@pytest.mark.parametrize(
    ("adaptive", "ts"), [(False, TS), (True, jnp.zeros(0))], ids=["inside", "adaptive"]
)
def test_the_continuous_adjoint_approaches_the_discrete_one(adaptive, ts):
    def gradient(adjoint):
        if adaptive:
            steps = AdaptiveSteps(diffrax.Tsit5(), rtol=1e-10, atol=1e-10, adjoint=adjoint)
        else:
            steps = FixedSteps(RK4(), 100, adjoint)

        def loss(rate, start):
            result = Propagator(field, steps)(rate, start, T0, T1 - T0, ts - T0)
            return jnp.sum(result.end**3) + jnp.sum(jnp.sin(result.saves))

        return jax.jit(jax.grad(loss, (0, 1)))(RATE, U0)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6),
        gradient("continuous"),
        gradient("discrete"),
    )


def test_an_implicit_solver_takes_fixed_steps():
    chord = diffrax.VeryChord(rtol=1e-12, atol=1e-12, norm=optimistix.max_norm)
    decay = Propagator(
        lambda t, u, args: -u, FixedSteps(diffrax.ImplicitEuler(root_finder=chord), 4)
    )
    end = decay(None, jnp.ones(1), jnp.array(0.0), jnp.array(1.0), jnp.zeros(0)).end
    np.testing.assert_allclose(end, 1.25**-4, rtol=1e-10)


def test_running_out_of_steps_gives_nan_not_numbers():
    steps = AdaptiveSteps(diffrax.Tsit5(), rtol=1e-8, atol=1e-8, max_steps=3)
    result = Propagator(field, steps)(RATE, U0, T0, T1 - T0, TS - T0)
    assert np.all(np.isnan(result.end)) and np.all(np.isnan(result.saves))


def test_no_steps_are_refused():
    with pytest.raises(ProblemError, match="n_steps"):
        FixedSteps(RK4(), 0)
