"""`nodepint bench startup`: what a command compiles, and when its first step is done."""

import pytest

from tests.cli.small_case import alone, read_json

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(200)]


def test_a_second_start_compiles_nothing(case, tmp_path):
    done = alone(
        "bench", "startup", case.config, "--ranks", "1", "--repeats", "1", "--json", "t.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, cold, warm = read_json(tmp_path / "t.json")
    assert [row["n_ranks"] for row in (plain, cold, warm)] == [None, 1, 1]
    assert [row["programs"] for row in (plain, cold, warm)] == ["cold", "cold", "warm"]
    assert plain["n_compiled"] is None and cold["n_compiled"] > 1 and warm["n_compiled"] == 0
    for row in (plain, cold, warm):
        assert 0 < row["first_step_s"] < row["command_s"]
        assert row["ratio_to_plain"] == row["first_step_s"] / plain["first_step_s"]
    assert "| tiny | plain diffrax | cold |" in done.stdout
    assert not list(tmp_path.glob("runs"))
