"""A batch takes the sweeps of its slowest sample: the record says which one that is."""

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.errors import NonFiniteError, ProblemError

RATES = jnp.array([0.1, 0.5, 14.0, 0.2])
EDGES = np.linspace(0.0, 2.0, 9)
STEPS = dict(fine=nm.FixedSteps(nm.RK4(), 8), coarse=nm.FixedSteps(diffrax.Euler(), 2))


def decay(t, u, rates):
    return -rates[:, None] * u


def solve(comms, rates, stopping, n_batch_axes=1):
    start = jnp.ones((len(rates), 2))
    return nm.solve(
        decay, start, EDGES, args=rates, stopping=stopping, n_batch_axes=n_batch_axes,
        comm=comms.time, **STEPS,
    )  # fmt: skip


@pytest.mark.mpi(max_size=2)
@pytest.mark.timeout_s(120)
@pytest.mark.parametrize("stopping", [nm.JumpTolerance(1e-6), nm.FreezeSlices(1e-6)])
def test_a_sample_is_said_to_need_what_it_needs_alone(comms, stopping):
    together = solve(comms, RATES, stopping)
    alone = [solve(comms, RATES[n : n + 1], stopping).sweeps for n in range(4)]
    assert together.sample_sweeps is not None
    assert together.sample_sweeps.tolist() == alone
    assert together.sweeps == max(alone) == alone[2] > max(alone[0], alone[1], alone[3])
    assert solve(comms, RATES, stopping, n_batch_axes=0).sample_sweeps is None


@pytest.mark.mpi(max_size=2)
def test_what_is_not_solved_is_named(comms):
    solution = solve(comms, RATES, nm.JumpTolerance(1e-6, max_sweeps=3))
    assert solution.status is nm.Status.MAX_SWEEPS
    assert solution.meaning.endswith("Not solved: samples 2.")


@pytest.mark.mpi(max_size=2)
def test_the_error_of_a_failed_solve_names_the_sample(comms):
    def failing(t, u, rates):
        late = jnp.array([[0.0, 0.0], [0.0, 0.0], [0.0, jnp.inf], [0.0, 0.0]])
        return decay(t, u, rates) + jnp.where(t > 1.1, late, 0.0)

    with pytest.raises(NonFiniteError, match=r"first in entry \[1\] of the state of sample 2: it"):
        nm.solve(
            failing, jnp.ones((4, 2)), EDGES, args=RATES, n_batch_axes=1, comm=comms.time, **STEPS
        )


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("n_batch_axes", [-1, 3, True])
def test_batch_axes_that_do_not_fit_are_refused(comms, n_batch_axes):
    with pytest.raises(ProblemError, match="n_batch_axes"):
        solve(comms, RATES, None, n_batch_axes=n_batch_axes)
