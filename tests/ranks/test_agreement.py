"""What all ranks hold is compared, and the first thing that differs is named with its ranks."""

import socket

import pytest

from nodepint_mpi.ranks.agreement import NOTHING, find_difference, name_odd

HOSTS = [f"n{rank}" for rank in range(8)]


def test_equal_things_are_no_difference(comm):
    assert find_difference(comm, {"a": "1", "b": "2"}) is None
    assert find_difference(comm, {}) is None


@pytest.mark.mpi(min_size=2)
def test_the_first_thing_that_differs_is_found_on_all_ranks(comm):
    last = comm.size - 1
    held = {"a": "1", "b": "2", "c": "3"}
    if comm.rank == last:
        held |= {"b": "other", "c": "other"}
    found = find_difference(comm, held)
    assert found is not None
    assert (found.name, found.n_names) == ("b", 2)
    assert (found.odd.value, found.odd.usual) == ("other", "2")
    assert found.odd.who == f"rank {last} on {socket.gethostname()}"
    assert comm.allgather(found) == [found] * comm.size


@pytest.mark.mpi(min_size=2)
def test_what_a_rank_lacks_differs(comm):
    found = find_difference(comm, {"a": "1"} | ({"b": "2"} if comm.rank else {}))
    assert found is not None and found.name == "b"
    assert {found.odd.value, found.odd.usual} == {NOTHING, "2"}


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "values, who, usual_who",
    [
        ("ab", "rank 1 on n1", "rank 0 on n0"),
        ("aab", "rank 2 on n2", "rank 0 on n0 and rank 1 on n1"),
        ("baa", "rank 0 on n0", "rank 1 on n1 and rank 2 on n2"),
        ("abab", "rank 1 on n1 and rank 3 on n3", "rank 0 on n0 and rank 2 on n2"),
        ("aabaaaaa", "rank 2 on n2",
         "rank 0 on n0, rank 1 on n1, rank 3 on n3, rank 4 on n4 and 3 more"),
        ("abcd", "rank 1 on n1", "rank 0 on n0"),
    ],
)  # fmt: skip
def test_the_odd_ones_are_named_and_the_usual_ones(values, who, usual_who):
    odd = name_odd(values, HOSTS)
    assert (odd.who, odd.usual_who) == (who, usual_who)
