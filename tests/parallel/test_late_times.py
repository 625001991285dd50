"""A solve does not depend on where its horizon lies, whatever the precision of the state."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nodepint_mpi as nm
from nodepint_mpi.core.observations import place_observations
from nodepint_mpi.core.partition import check_edges, own_slices
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.resolution import check_field_resolution, reads_time
from nodepint_mpi.core.sweeps import propagate_block
from nodepint_mpi.errors import ProblemError

GRID = np.linspace(0.0, 10.0, 41)  # dyadic, so that they can be shifted without rounding
STEPS = {
    "fixed": nm.FixedSteps(nm.RK4(), 25),
    "adaptive": nm.AdaptiveSteps(diffrax.Tsit5(), 1e-6, 1e-10),
}
COARSE = nm.FixedSteps(nm.RK4(), 2)
LOCAL = pytest.mark.mpi(max_size=1)


def decay(t, u, args):
    return -u


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(120)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("method", ["parareal", "reduced", "serial"])
def test_decay_ends_at_the_same_number_wherever_it_begins(comms, steps, method):
    if steps == "adaptive" and method == "reduced":
        return  # the same steps as parareal's
    options = dict(basis=nm.SharedBasis("identity")) if method == "reduced" else {}
    ends = []
    for t0 in (0.0, 1e7, -1e8, 1e12):
        solution = nm.solve(
            decay, jnp.ones(1, "float32"), t0 + GRID, fine=STEPS[steps], coarse=COARSE,
            method=method, stopping=nm.JumpTolerance(1e-6), comm=comms.time, **options,
        )  # fmt: skip
        assert solution.status is nm.Status.CONVERGED
        ends.append(np.asarray(solution.interface[-1]))
    np.testing.assert_allclose(ends, np.exp(-10), rtol=2e-3, atol=2e-6)
    np.testing.assert_array_equal(ends, np.broadcast_to(ends[0], (4, 1)))


@functools.cache
def linear_rise(dtype):
    """u' = 1 on four slices with one observation each, for given left edges."""
    flow = Propagator(lambda t, u, args: jnp.ones_like(u), nm.FixedSteps(nm.RK4(), 2))

    def solve(edges, inside):
        owned = own_slices(edges, 1, 0, inside=inside)
        return propagate_block(flow, None, jnp.zeros((4, 1), dtype), owned)

    return solve


@LOCAL
@settings(max_examples=20)
@given(
    t0=st.floats(-1e11, 1e11),
    quarters=st.integers(1, 64),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_observations_inside_a_slice_are_read_at_their_time(t0, quarters, dtype):
    """What is observed is the time since the edge, to the precision of the state."""
    edges = t0 + np.arange(5) * quarters / 4
    times = (edges[:-1] + edges[1:]) / 2
    inside = [times[n : n + 1] for n in range(4)]
    result = linear_rise(dtype)(edges, inside)
    rtol = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(result.saves[:, 0, 0], times - edges[:-1], rtol=rtol)
    np.testing.assert_allclose(result.end[:, 0], np.diff(edges), rtol=rtol)
    placed = place_observations(np.sort(np.append(times, edges[1:])), edges, 1, 0)
    assert placed.indices.tolist() == list(range(8))


@LOCAL
def test_a_time_next_to_an_edge_is_on_it_where_doubles_are_far_apart():
    edges = 1e8 + np.arange(3.0)
    late = np.nextafter(edges[1], np.inf)
    placed = place_observations(np.array([late]), edges, 1, 0)
    assert placed.owned.ts.shape == (2, 0)  # read at the end of the first slice


@LOCAL
def test_edges_that_double_precision_cannot_hold_are_refused():
    with pytest.raises(ProblemError, match="followed by"):
        check_edges(1e17 + np.linspace(0, 1, 9))
    with pytest.raises(ProblemError, match="apart in double precision"):
        check_edges([0.0, 1e15, 1e15 + 1.0])
    with pytest.raises(ProblemError, match="pass a NumPy array or a list"):
        check_edges(jnp.asarray(1e8 + np.linspace(0, 1, 9), "float32"))


@pytest.mark.mpi(max_size=2)
def test_a_field_of_t_is_refused_where_its_precision_cannot_resolve_t(comms):
    def driven(t, u, args):
        return jnp.cos(t) - u

    u0 = jnp.ones(2, "float32")
    options = dict(fine=STEPS["fixed"], coarse=COARSE, comm=comms.time)
    with pytest.raises(ProblemError, match="depends on t.*float32 are 8 apart.*0.01 long"):
        nm.solve(driven, u0, 1e8 + GRID, **options)
    steps = [STEPS["fixed"], STEPS["adaptive"]]
    check_field_resolution(driven, None, u0, GRID, steps)
    check_field_resolution(driven, None, u0.astype("float64"), 1e8 + GRID, steps)
    check_field_resolution(decay, None, u0, 1e8 + GRID, steps)


@LOCAL
@pytest.mark.parametrize(
    "field, wanted",
    [
        (decay, False),
        (jax.jit(decay), False),
        (lambda t, u, args: u + jnp.sin(t), True),
        (jax.jit(lambda t, u, args: u + jnp.sin(t)), True),
        (lambda t, u, args: u + 0 * jax.jit(lambda v: 2 * v)(u) + jnp.sin(t) * 0, True),
        (lambda t, u, args: jax.lax.cond(t > 0, lambda: u, lambda: -u), True),
        (lambda t, u, args: jax.jit(lambda s, v: (s, -v))(t, u)[1], False),
    ],
)
def test_whether_a_field_reads_the_time(field, wanted):
    assert reads_time(field, None, jnp.ones(3)) == wanted
