"""A failure on any rank is everybody's, and what all ranks hold is compared and named."""

import socket
import subprocess
import sys

import pytest

from nodepint_mpi.errors import ConfigError, DataError, NodepintError, RankError
from nodepint_mpi.ranks.agreement import NOTHING, find_difference, name_odd, together

HOSTS = [f"n{rank}" for rank in range(8)]


def test_nothing_happens_where_no_rank_fails(comm):
    with together(comm):
        done = comm.rank
    assert done == comm.rank


def test_the_error_of_all_ranks_is_raised_as_it_is(comm):
    with pytest.raises(DataError, match="^no such file$"), together(comm):
        raise DataError("no such file")


@pytest.mark.mpi(min_size=2)
def test_a_failure_on_one_rank_is_raised_on_all_with_its_class(comm):
    guilty = comm.size - 1
    with pytest.raises(DataError) as caught, together(comm):
        if comm.rank == guilty:
            raise DataError("no such file")
    assert str(caught.value).startswith(f"rank {guilty} on ")
    assert str(caught.value).endswith(": no such file")
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_what_rank_0_cannot_do_for_all_is_raised_without_its_name(comm):
    with pytest.raises(DataError, match="^no such file$"), together(comm):
        if comm.rank == 0:
            raise DataError("no such file")


@pytest.mark.mpi(min_size=2)
def test_of_different_failures_the_lowest_rank_counts(comm):
    kinds = DataError, ConfigError
    with pytest.raises(DataError, match="^reason of 0$") as caught, together(comm):
        raise kinds[comm.rank > 0](f"reason of {comm.rank}")
    assert comm.rank == 0 or isinstance(caught.value.__cause__, ConfigError)


@pytest.mark.mpi(min_size=2)
def test_different_reasons_name_the_lowest_rank(comm):
    with pytest.raises(RankError, match="^rank 1 on .*: ValueError: rank 1$"), together(comm):
        if comm.rank >= 1:
            raise ValueError(f"rank {comm.rank}")


def test_an_unexplained_error_of_all_ranks_names_its_class(comm):
    with pytest.raises(RankError, match="^rank 0 on .*: KeyError: 'x'$"), together(comm):
        raise KeyError("x")


def test_steps_of_all_ranks_may_be_nested(comm):
    with pytest.raises(NodepintError) as caught, together(comm), together(comm):
        if comm.rank == 0:
            raise DataError("inner")
    assert "inner" in str(caught.value)


def test_an_interrupt_is_not_turned_into_an_error(comm):
    with pytest.raises(KeyboardInterrupt), together(comm):
        raise KeyboardInterrupt


@pytest.mark.mpi(max_size=1)
def test_importing_what_guards_ranks_starts_neither_mpi_nor_jax():
    code = "import sys, nodepint_mpi.ranks.guard, nodepint_mpi.ranks.agreement\n"
    code += "sys.exit(any(name in sys.modules for name in ('mpi4py.MPI', 'jax')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
