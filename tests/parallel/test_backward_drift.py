"""The warning of the continuous adjoint, against the error that its gradient really has."""

import logging

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.backward import backward_drift
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.propagators import Propagator

EDGES = np.array([0.0, 0.02, 0.3, 0.35, 1.0])  # uneven
PROPAGATORS = {
    "fixed": lambda adjoint: nm.FixedSteps(nm.RK4(), 64, adjoint=adjoint),
    "adaptive": lambda adjoint: nm.AdaptiveSteps(diffrax.Tsit5(), 1e-9, 1e-9, adjoint=adjoint),
}


def field(t, u, rate):
    """Follows a cosine at a rate; the faster, the stiffer."""
    return -rate * (u - jnp.cos(3 * t)) - 0.1 * jnp.sin(u)


@pytest.mark.timeout_s(240)  # programs to compile
@pytest.mark.parametrize(
    "steps, stiff",
    [
        pytest.param("fixed", 40.0, marks=pytest.mark.mpi(2, 2)),
        pytest.param("adaptive", 20.0, marks=pytest.mark.mpi(1, 1)),
    ],
)
def test_a_gradient_that_is_off_is_said_to_be(comms, caplog, steps, stiff):
    """One compiled gradient for a mild and a stiff field; the discrete one is the oracle."""

    def loss(rate, adjoint):
        solution = nm.solve(
            field, jnp.ones(1), EDGES, args=rate, comm=comms.time, method="serial",
            fine=PROPAGATORS[steps](adjoint),
        )  # fmt: skip
        return jnp.sum(solution.interface**2)

    exact, got = (jax.jit(jax.grad(lambda r, a=a: loss(r, a))) for a in ("discrete", "continuous"))
    errors, said = [], []
    for rate in (1.0, stiff):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="nodepint_mpi"):
            errors.append(abs(float(got(rate) / exact(rate)) - 1))
            jax.effects_barrier()
        said.append([r.args[0] for r in caplog.records if "continuous adjoint" in r.getMessage()])
    mild, astray = errors
    assert mild <= 1e-6 and astray > mild and not said[0]
    if comms.time.rank == 0:
        (drift,) = said[1]
        assert astray <= drift
    else:
        assert not said[1]


@pytest.mark.mpi(max_size=1)
def test_the_drift_is_that_of_the_backward_solution():
    """Backward Euler steps of a linear field have a closed form: explicit steps backward too."""
    rate, n_steps, owned = 3.0, 5, own_slices(EDGES, 1, 0)
    fine = Propagator(lambda t, u, args: -args * u, nm.FixedSteps(diffrax.Euler(), n_steps))
    h = np.diff(EDGES) / n_steps
    starts = np.array([1.0, 2.0, -1.0, 0.5])
    ends = starts * (1 - rate * h) ** n_steps
    arrived = ends * (1 + rate * h) ** n_steps
    drift = backward_drift(
        fine, rate, jnp.asarray(starts)[:, None], jnp.asarray(ends)[:, None], owned
    )
    assert float(drift) == pytest.approx(np.max(np.abs(arrived - starts)), rel=1e-10)
    # Time runs back to where the slice began.
    clock = Propagator(lambda t, u, args: jnp.ones_like(u) * 2 * t, nm.FixedSteps(nm.RK4(), 2))
    starts, ends = jnp.asarray(EDGES[:-1, None] ** 2), jnp.asarray(EDGES[1:, None] ** 2)
    assert float(backward_drift(clock, None, starts, ends, owned)) <= 1e-14
