"""The correction over a block: what is solved costs nothing and stays as it is."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.propagators import FixedSteps, Propagator
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.sweeps import (
    BlockStates,
    coarse_block,
    correct_block,
    count_unsolved,
    propagate_block,
)

N = 5
OWNED = own_slices(np.linspace(0.0, 1.0, N + 1), 1, 0)


@pytest.mark.parametrize("front", [-1, 0, 2, 4, 5])
def test_solved_slices_are_kept_and_not_propagated(front):
    calls = []

    def field(t, u, args):
        jax.debug.callback(lambda time: calls.append(float(time)), t)
        return -args * u + t

    coarse = Propagator(field, FixedSteps(diffrax.Euler(), 1))
    fine = Propagator(lambda t, u, args: -args * u + t, FixedSteps(RK4(), 8))
    rate, ends = jnp.asarray(2.0), jnp.linspace(1.0, 2.0, N)[:, None] * jnp.ones(3)
    starts = jnp.concatenate([jnp.full((1, 3), 0.9), ends[:-1]])
    fine_ends = propagate_block(fine, rate, starts, OWNED).end
    coarse_ends = coarse_block(coarse, rate, starts, OWNED)
    jax.effects_barrier()
    calls.clear()
    corrected = jax.jit(
        lambda front: correct_block(
            coarse, rate, starts[0], fine_ends=fine_ends, old=BlockStates(starts, ends),
            coarse_ends=coarse_ends, front=front, owned=OWNED,
        )
    )(jnp.asarray(front))  # fmt: skip
    jax.effects_barrier()
    unsolved = range(front + 1, N)  # in the slice at the front nothing is left to correct
    np.testing.assert_allclose(sorted(calls), OWNED.edges[unsolved], atol=1e-15)
    assert int(count_unsolved(jnp.asarray(front + 1), OWNED, at_once=1)) == len(unsolved)
    u = np.asarray(starts[0])
    for n in range(N):
        left = OWNED.edges[n]
        np.testing.assert_allclose(corrected.states.starts[n], u, rtol=1e-14)
        end = u + (-2.0 * u + left) / N  # Euler by hand
        if n < front:
            np.testing.assert_array_equal(corrected.states.ends[n], ends[n])
            np.testing.assert_array_equal(corrected.coarse_ends[n], coarse_ends[n])
        elif n == front:
            np.testing.assert_array_equal(corrected.states.ends[n], fine_ends[n])
            np.testing.assert_array_equal(corrected.coarse_ends[n], coarse_ends[n])
        else:
            wanted = fine_ends[n] + end - coarse_ends[n]
            np.testing.assert_allclose(corrected.states.ends[n], wanted, rtol=1e-14)
            np.testing.assert_allclose(corrected.coarse_ends[n], end, rtol=1e-14)
        u = np.asarray(corrected.states.ends[n])
    assert int(corrected.n_guarded) == 0
