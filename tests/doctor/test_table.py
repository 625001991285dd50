"""The table of all ranks: what differs is marked and named, and some of it matters."""

import pytest

from nodepint_mpi.doctor.ranks import compare_ranks, describe_placements
from nodepint_mpi.doctor.table import (
    RankFacts,
    describe_rank,
    find_findings,
    format_cores,
    format_table,
)
from nodepint_mpi.ranks.placement import Gpu, Placement

pytestmark = pytest.mark.mpi(max_size=1)

SAME = {"MPI": "Open MPI 4", "HDF5": "1.10", "python": "3.11", "jax": "0.10"}


def rank(number, **differs):
    place = {"local": str(number), "cores": str(number), "GPU": "-"}
    alike = {"the processor": "EPYC"} | {k: v for k, v in differs.items() if k == "the processor"}
    same = SAME | {k: v for k, v in differs.items() if k != "the processor"}
    return RankFacts(f"n{number}", place, alike, same)


def test_equal_ranks_give_no_finding():
    ranks = [rank(n) for n in range(4)]
    assert find_findings(ranks) == []
    (check,) = compare_ranks(ranks)
    assert check.ok and check.name == "same everywhere"
    assert "!" not in format_table(ranks)


def test_another_version_on_one_rank_is_marked_and_fails():
    ranks = [rank(0), rank(1), rank(2, jax="0.9"), rank(3)]
    (finding,) = find_findings(ranks)
    assert finding.matters
    assert finding.found.startswith("0.9 on rank 2 on n2, 0.10 on rank 0 on n0, rank 1 on n1")
    (check,) = compare_ranks(ranks)
    assert not check.ok and check.name == "same jax" and "modules" in check.remedy
    marked = [line for line in format_table(ranks).splitlines() if "!" in line]
    assert len(marked) == 1 and marked[0].startswith("2 ") and "0.9!" in marked[0]


def test_another_processor_is_told_and_passes():
    ranks = [rank(0), rank(1, **{"the processor": "Xeon"})]
    checks = compare_ranks(ranks)
    assert all(check.ok for check in checks)
    assert "Xeon on rank 1 on n1, EPYC on rank 0 on n0" in checks[0].found


def test_a_rank_whose_stack_is_broken_has_its_line():
    facts = {"mpi4py": {"library": "MPICH 4"}, "h5py": {"error": "no"}, "jax": {"error": "no"}}
    found = describe_rank(None, facts, {"jax": "0.10"})
    assert found.same["HDF5"] == "?" and found.same["MPI"] == "MPICH 4"
    assert format_table([found]).count("\n") == 1


def test_a_shared_gpu_is_shown():
    gpu = Gpu(1, "GPU-7f3c11aa-0000")
    place = Placement("n0", 2, 4, gpu, 2, (4, 5, 6, 9))
    shown = describe_rank(place, {"mpi4py": {}, "h5py": {}, "jax": {}}, {}).place
    assert shown == {"local": "2", "cores": "4-6,9", "GPU": "1: GPU-7f3c11aa (shared by 2)"}
    assert describe_placements([place]) == "1 ranks on 1 machine(s): a GPU each"


def test_cores_are_written_as_ranges():
    assert format_cores([3, 1, 2, 8, 10, 9]) == "1-3,8-10"
    assert format_cores([5]) == "5"
    assert format_cores([]) == ""


@pytest.mark.parametrize(
    "cores, words", [([(0,), (1,)], "cores of their own"), ([(0, 1), (0, 1)], "cores shared")]
)
def test_cores_are_called_shared_where_they_are(cores, words):
    places = [Placement("n0", r, 2, None, 0, own) for r, own in enumerate(cores)]
    assert words in describe_placements(places)
