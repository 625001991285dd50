"""Every slice is owned once, in order, on any number of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepint_mpi.core.partition import check_edges, own_slices, owned_range
from nodepint_mpi.errors import LayoutError, ProblemError


@given(n_slices=st.integers(1, 50), n_ranks=st.integers(1, 70))
def test_every_slice_is_owned_once_in_order(n_slices, n_ranks):
    ranges = [owned_range(n_slices, n_ranks, rank) for rank in range(n_ranks)]
    assert [n for owned in ranges for n in owned] == list(range(n_slices))
    sizes = [len(owned) for owned in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_blocks_share_their_boundaries():
    edges = np.linspace(0, 1, 8)
    blocks = [own_slices(edges, 3, rank) for rank in range(3)]
    assert [block.n_owned for block in blocks] == [3, 2, 2]
    assert blocks[0].edges[-1] == blocks[1].edges[0]
    assert np.concatenate([block.indices for block in blocks]).tolist() == list(range(7))


def test_inner_times_are_filled_up_with_distinct_ones():
    inside = [np.array([0.2]), np.zeros(0), np.array([2.1, 2.9])]
    block = own_slices(np.arange(4.0), 1, 0, inside=inside)
    assert block.ts.shape == (3, 2)
    assert block.ts[0, 0] == 0.2 and block.ts[2].tolist() == [2.1, 2.9]
    assert np.all(np.diff(block.ts, axis=1) > 0)
    assert np.all((block.ts > block.edges[:-1, None]) & (block.ts < block.edges[1:, None]))


def test_more_ranks_than_slices_is_refused():
    with pytest.raises(LayoutError, match="5 ranks cannot share 4 time slices"):
        own_slices(np.linspace(0, 1, 5), 5, 0)


@pytest.mark.parametrize("edges", [[0.0], [0.0, 0.0], [1.0, 0.0], [0.0, np.nan], [[0.0, 1.0]]])
def test_edges_that_make_no_sense_are_refused(edges):
    with pytest.raises(ProblemError, match="edges"):
        check_edges(np.asarray(edges))
