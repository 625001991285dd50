"""`nodepint bench sweeps` counts as one does by hand, and draws what it counted."""

from pathlib import Path

import pytest

from tests.cli.small_case import read_json

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(300)]

OWN = f"{Path(__file__).parents[2] / 'docs' / 'examples' / 'relaxed_parareal.py'}:make_method"
METHODS = "parareal", "tangent, identity, cheap", OWN


def test_bench_sweeps(nodepint, tmp_path):
    chosen = [word for method in METHODS for word in ("--method", method)]
    files = "--json", "s.json", "--out", "s.png"
    said = nodepint(1, "bench", "sweeps", "lotka_volterra", *chosen, *files).stdout
    result = read_json(tmp_path / "s.json")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    parareal, tangent, own = result["methods"]
    assert (parareal["method"], tangent["method"], own["method"]) == METHODS
    assert parareal["forward"]["sweeps"] <= own["forward"]["sweeps"] < 14  # it takes smaller steps
    for row in (parareal, tangent):
        for direction in ("forward", "adjoint"):
            assert row[direction]["errors"][-1] < 1e-12
            assert row[direction]["errors"][row[direction]["sweeps"]] <= 1e-6
    # By hand: 32 slices, a coarse pass is 1/50 fine solve, one from slice to slice a sweep; what is
    # finished takes part in neither.
    expected = 0.02
    for k, work in enumerate(parareal["forward"]["work"]):
        assert work == pytest.approx(expected)
        expected += (32 - k) / 32 * 1.02
    assert parareal["forward"]["path"][1] == pytest.approx(32 * 0.02 + 1 + 32 * 0.02)
    # Two directions and their state, a tenth of a fine solve each, and no walk.
    work = tangent["forward"]["work"]
    assert work[0] == pytest.approx(0.1)
    assert work[1] - work[0] == pytest.approx(1 + 3 * 0.1)
    assert "Least work to 1e-06, forward: " in said and "shortest path: " in said


def test_bench_sweeps_of_an_unknown_problem_suggests_a_known_one(nodepint):
    done = nodepint(1, "bench", "sweeps", "burger", code=2)
    assert "'burger'; did you mean 'burgers'" in done.stderr


def test_bench_methods(nodepint, tmp_path):
    chosen = "--method", "tangent, jumps, complement", "--json", "m.json"
    said = nodepint(2, "bench", "methods", "lotka_volterra", *chosen).stdout
    (row,) = read_json(tmp_path / "m.json")
    assert row["ok"] and max(row["error"], row["gradient_error"]) <= 1e-8
    assert row["n_ranks"] == 2 and row["sweeps"] >= 1 and row["adjoint_sweeps"] >= 1
    assert "1 of 1 within 1e-08 of solution and gradient, on 2 ranks" in said
