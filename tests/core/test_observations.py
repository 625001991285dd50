"""Observation times find their slice and their rank."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepint_mpi.core.observations import place_observations
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.errors import ProblemError

EDGES = np.array([0.0, 1.0, 2.0, 4.0, 5.0, 6.0])


@given(
    times=st.lists(st.integers(1, 60), min_size=1, max_size=20, unique=True).map(sorted),
    n_ranks=st.integers(1, 5),
)
def test_each_time_is_read_once_where_it_lies(times, n_ranks):
    """Feed the time itself through `read` as if it were the state."""
    times = np.array(times) / 10
    seen = []
    for rank in range(n_ranks):
        observations = place_observations(times, EDGES, n_ranks, rank)
        owned = observations.owned
        result = SliceResult(jnp.asarray(owned.ts), jnp.asarray(owned.edges[1:]))
        np.testing.assert_allclose(observations.read(result), times[observations.indices])
        seen.extend(observations.indices.tolist())
    assert seen == list(range(len(times)))


def test_a_time_on_a_boundary_costs_nothing():
    observations = place_observations(EDGES[1:], EDGES, 1, 0)
    assert observations.owned.ts.shape == (5, 0)


def test_the_initial_state_is_not_read():
    assert place_observations(np.array([0.0, 1.5]), EDGES, 1, 0).indices.tolist() == [1]


@pytest.mark.parametrize("times", [[1.0, 1.0], [2.0, 1.0], [-0.5, 1.0], [1.0, 6.5]])
def test_times_that_cannot_be_read_are_refused(times):
    with pytest.raises(ProblemError, match="bservation times"):
        place_observations(np.array(times), EDGES, 1, 0)
