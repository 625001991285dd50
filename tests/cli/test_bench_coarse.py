"""`nodepint bench coarse` times all ways on the ranks it is started on; tells what they send."""

import pytest

from tests.cli.small_case import read_json

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(300)]


def test_bench_coarse(nodepint, tmp_path):
    sizes = "--slices", "6,10", "--basis-rank", "3", "--samples", "2", "--repeats", "3"
    said = nodepint(2, "bench", "coarse", *sizes, "--json", "c.json").stdout
    result = read_json(tmp_path / "c.json")
    assert result["n_ranks"] == 2
    (pieces,) = result["pieces"]
    assert min(pieces[f"{name}_slice_s"] for name in ("walk", "compose", "fine")) > 0
    short, long = result["cases"]
    assert (short["n_slices"], long["n_slices"]) == (6, 10)
    vector = 2 * 3 * 4  # bytes: samples, directions, single precision
    for case in (short, long):
        ways = case["ways"]
        assert list(ways) == ["slices", "blocks", "scan"]
        assert (
            min(ways[way][f"{name}_s"] for way in ways for name in ("forward", "adjoint", "both"))
            > 0
        )
        assert case["chosen"] == "slices"
        gathered = {way: ways[way]["gathered_bytes"] for way in ways}
        maps = {"slices": case["n_slices"], "blocks": 2, "scan": 0}
        assert gathered == {way: n_maps * 4 * vector for way, n_maps in maps.items()}
        sent = {way: ways[way]["sent_bytes"] for way in ways}
        # Maps of the other rank (three rows, a vector) and its starts; a number of each to agree.
        each = case["n_slices"] // 2
        assert sent["slices"] == each * 5 * vector
        assert (sent["blocks"], sent["scan"]) == (5 * vector + 8, vector + 8)
    assert said.count("blocks") == 2 and "walk, us/slice" in said


def test_bench_coarse_of_more_ranks_than_slices_is_refused(nodepint):
    done = nodepint(2, "bench", "coarse", "--slices", "1", code=2)
    assert "2 ranks cannot share 1 time slices" in done.stderr
