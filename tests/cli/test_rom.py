"""`nodepint rom`: a reduced model out of a run, on any number of ranks."""

import pytest

from tests.cli.small_case import alone, messages, read_json

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(400)]


def test_export_and_evaluate(trained, nodepint, tmp_path):
    run = trained(2)
    said = nodepint(2, "rom", "export", run, "--out", "r.h5", "--rank", 2, "--json", "x.json")
    made = read_json(tmp_path / "x.json")
    assert (made["rank"], made["state_size"], made["n_ranks"]) == (2, 2, 2)
    assert made["file_bytes"] == (tmp_path / "r.h5").stat().st_size
    assert "r.h5: 2 of 2 directions" in said.stdout
    said = nodepint(1, "rom", "evaluate", "r.h5", run, "--json", "e.json").stdout
    result = read_json(tmp_path / "e.json")
    assert result["reduced_vs_full"] < 1e-12  # all directions, in double precision
    assert result["full_vs_data"] == pytest.approx(result["reduced_vs_data"])
    assert "reduced against full model" in said
    assert {path.name for path in tmp_path.glob("r.*")} == {"r.h5", "r.png"}


def test_two_ways_to_say_the_rank_are_one_too_many(trained, tmp_path):
    options = "--out", "r.h5", "--rank", 2, "--energy", 0.9
    done = alone("rom", "export", trained(2), *options, cwd=tmp_path)
    assert done.returncode == 2
    (message,) = messages(done.stderr)
    assert "give only one" in message
    assert not list(tmp_path.iterdir())
