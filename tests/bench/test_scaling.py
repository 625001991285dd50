"""What is said of scaling points, by hand-made ones: speed-up, efficiency, break-even, the page."""

import subprocess
import sys
from pathlib import Path

import pytest

from nodepint_mpi.bench.studies import kept
from nodepint_mpi.bench.studies.measures import (
    Predicted,
    break_even,
    judge,
    make_curves,
    shares_of,
)
from nodepint_mpi.bench.studies.model import make_model, measured_network
from nodepint_mpi.bench.studies.report import make_report
from nodepint_mpi.bench.studies.scaling import plan_points
from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.config.scaling import Scaling, read_scaling
from nodepint_mpi.profiling.record import STEP_PHASES
from tests.report.page_reader import Page

pytestmark = pytest.mark.mpi(max_size=1)

ROOT = Path(__file__).parents[2]

PHASES = {
    "fine_forward": 0.3, "fine_adjoint": 0.5, "tangents": 0.0, "coarse": 0.08, "send": 0.0,
    "receive": 0.0, "reduce": 0.0, "wait": 0.0, "other": 0.12,
}  # fmt: skip


def alike(value, **more):
    return {"min": value, "mean": value, "max": value} | more


def made(n_ranks, step_s, *, kind="strong", fine=None, walked=80, phases=PHASES, **more):
    """A point of ten steps; `fine` are slices of the busiest rank, `walked` coarse ones of all."""
    fine = 80 // n_ranks if fine is None else fine
    done = {"fine": fine, "fine_pulled": fine, "tangent_passes": 0, "coarse": walked / n_ranks}
    done |= {"coarse_pulled": 0, "reduced": 0, "reduced_pulled": 0}
    done |= {"messages": 20 * (n_ranks > 1)}
    profiled = {"counts": {k: alike(n / 10) for k, n in done.items()}, "sweeps": [1.0, 1.0]}
    counts = {"fine": alike(fine, sum=80), "fine_pulled": alike(fine, sum=80)}
    counts |= {
        "coarse": alike(walked / n_ranks, sum=walked),
        "messages": alike(20 * (n_ranks > 1), sum=40),
    }
    return {
        "study": "s", "kind": kind, "over": {}, "settings": {}, "point": f"s, ranks-{n_ranks}",
        "is_plain": False, "serial": "s, serial", "n_ranks": n_ranks,
        "data_ranks": 1, "basis_ranks": 1, "n_cores": 1, "n_slices": 8, "batch_size": None,
        "method": "parareal", "run": "x",
        "state": "finished", "reason": "", "n_steps": 10, "n_warm_steps": 7,
        "step_s": alike(step_s), "phases_s": phases and {k: alike(v) for k, v in phases.items()},
        "unprofiled": None, "profiled": phases and profiled, "compile_s": 5.0,
        "counts": counts | {"bytes": alike(1e6, sum=2e6)},
        "loss": 0.5, "gradient_error": 1e-3, "sweeps": [1.0, 1.0], "peak_bytes": 5e8,
        "n_nodes": 1, "all_cores": 4, "oversubscribed": False, "machine": "AMD", "date": "today",
        "commit": "c0ffee", "serial_steps": 0, "busy_share": 0.0, "load_average": 0.0,
    } | more  # fmt: skip


SERIAL = made(1, 0.7, is_plain=True, point="s, serial", serial=None, phases=None)
STRONG = [
    SERIAL,
    made(1, 1.0),
    made(2, 0.6),
    made(4, 0.4),
    made(8, 9.0, oversubscribed=True),
    made(3, 0.5, fine=30, state="failed", reason="why"),
]


def amdahl(row):
    step_s = 0.2 + 0.8 / row["n_ranks"]
    return Predicted(step_s, {"fine": 0.8 / row["n_ranks"] / step_s})


def values(points, name):
    return [getattr(point, name) for point in points]


def about(*numbers):
    return pytest.approx(list(numbers), rel=1e-12)


def test_a_strong_curve():
    (curve,) = make_curves(STRONG)
    points = judge(curve, amdahl)
    assert [point.row["n_ranks"] for point in points] == [1, 2, 4, 8]
    *timed, shared = points
    assert values(timed, "speed_up") == about(1, 1 / 0.6, 2.5)
    assert values(timed, "efficiency") == about(1, 1 / 1.2, 0.625)
    assert values(timed, "to_serial") == about(0.7, 0.7 / 0.6, 1.75)
    assert values(points, "counted") == about(1, 1 / 1.2, 0.625, 1 / (8 * 0.3))
    assert values(timed, "model_error") == pytest.approx([0, 0, 0], abs=1e-12)
    assert values(points, "model_efficiency") == about(1, 1 / 1.2, 0.625, 1 / 2.4)
    assert shared.step_s is shared.speed_up is shared.to_serial is shared.model_error is None
    assert shared.shares is None and shared.model is not None


def test_uneven_slices_are_counted_by_the_busiest_rank():
    (curve,) = make_curves([made(1, 1.0), made(3, 0.5, fine=30)])
    assert judge(curve)[1].counted == pytest.approx(1 / (3 * (0.8 * 3 / 8 + 0.2)))


def test_a_weak_curve():
    rows = [made(1, 1.0, kind="weak")]
    rows.append(made(2, 1.25, kind="weak", fine=80, walked=160, n_slices=16))
    (curve,) = make_curves(rows)
    points = judge(curve, lambda row: Predicted(1.0 * row["n_ranks"], {}))
    assert values(points, "efficiency") == about(1, 0.8)
    assert values(points, "speed_up") == about(1, 1.6)
    assert values(points, "counted") == about(1, 1 / 1.08)  # the coarse walk is twice as long
    assert values(points, "model_efficiency") == about(1, 0.5)
    assert break_even(curve) is None
    plain = [made(1, s, kind="weak", is_plain=True, point=n) for s, n in ((0.9, "a"), (2.1, "b"))]
    paired = [row | {"serial": name} for row, name in zip(rows, "ab", strict=True)]
    found = break_even(make_curves([*plain, *paired])[0], lambda row: Predicted(1.5, {}))
    assert found is not None and (found.measured, found.model) == (2, 2)


def test_lines_of_ranks_share_the_samples():
    two = made(2, 0.6, fine=80, walked=160, data_ranks=2)
    (curve,) = make_curves([made(1, 1.0), two])
    assert judge(curve)[1].counted == pytest.approx(1 / (2 * (0.4 + 0.04 + 0.12)))
    grown = [made(1, 1.0, batch_size=4), two | {"batch_size": 8}]
    (curve,) = make_curves(grown)
    assert judge(curve)[1].counted == pytest.approx(1 / 2)  # of a strong study, with twice the work


def test_without_one_rank_the_fewest_are_the_measure():
    (curve,) = make_curves([made(2, 0.6, oversubscribed=True), made(4, 0.4), made(8, 0.25)])
    assert values(judge(curve), "speed_up") == [None, 1, 1.6]
    assert values(judge(curve), "efficiency") == [None, 1, 0.8]


def test_what_was_not_profiled_has_no_shares():
    (curve,) = make_curves([made(1, 1.0, phases=None), made(2, 0.6)])
    first, second = judge(curve)
    assert first.shares is None and first.counted is second.counted is None
    assert second.shares == {
        "fine": pytest.approx(0.8), "coarse": pytest.approx(0.08), "messages": 0.0, "idle": 0.0,
        "other": pytest.approx(0.12),
    }  # fmt: skip
    assert shares_of(SERIAL) is None


def test_every_phase_of_a_step_belongs_to_a_part():
    """Of records of today; those above were made when there were fewer phases."""
    row = {"phases_s": {name: {"mean": 1.0} for name in STEP_PHASES}}
    shares = shares_of(row)
    assert shares is not None and sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("serial_s", "measured", "model"),
    [(0.7, 2, 2), (1.1, 1, 1), (0.55, 4, 4), (0.35, None, 8), (0.25, None, None)],
)
def test_break_even(serial_s, measured, model):
    (curve,) = make_curves([SERIAL | {"step_s": alike(serial_s)}, *STRONG[1:]])
    found = break_even(curve, amdahl)
    assert found is not None and (found.measured, found.model) == (measured, model)
    found = break_even(curve)
    assert found is not None and found[1:] == (serial_s, measured, None)


def test_a_message_costs_what_it_cost_in_the_largest_run():
    spent = PHASES | {"send": 0.001, "receive": 0.002, "reduce": 0.003}
    shared = made(8, 1.0, phases=spent, oversubscribed=True)
    (curve,) = make_curves([made(1, 1.0), made(2, 0.6), made(4, 0.4, phases=spent), shared])
    assert measured_network(curve) == (pytest.approx(0.003), float("inf"))  # two in a step
    (curve,) = make_curves([made(1, 1.0), shared])
    assert measured_network(curve).latency_s == 0.0
    assert make_model(make_curves([made(1, 1.0, phases=None)])[0]) is None


STUDIES = Scaling.model_validate({
    "config": "c.toml",
    "study": [
        {"name": "s", "ranks": [1, 2, 4, 8], "over": {"time.n_slices": [8, 9]}},
        {"name": "w", "kind": "weak", "ranks": [1, 2], "grows": ["time.n_slices"]},
    ],
})  # fmt: skip


def test_the_page(tmp_path):
    other = [row | {"over": {"time.n_slices": 9}} for row in STRONG]
    rows = [row | {"over": {"time.n_slices": 8}} for row in STRONG] + other
    weak = made(1, 1.0, kind="weak", study="w", point="w, ranks-1", serial=None, busy_share=0.5)
    weak["serial_steps"] = 7
    report = make_report(STUDIES, "study.toml", [*rows, weak], tmp_path, lambda curve: amdahl)
    page = Page(tmp_path / "report.html")
    assert page.links == [] and len(page.images) == 4
    assert page.titles == [
        "What there is", "Strong scaling: s", "Weak scaling: w", "Break-even", "All points",
    ]  # fmt: skip
    assert "Of 13 points: 11 finished, 2 failed." in page.text
    assert "More ranks than cores had s, ranks-8, s, ranks-8:" in page.text
    assert "kept the cores busy before or after w, ranks-1:" in page.text
    assert "since sweeps missed their bound: w, ranks-1 (7)." in page.text
    tables = [table for table in page.tables if table[0][0] == "ranks"]
    assert tables[0][1:] == [
        ["plain serial", "700", *["-"] * 9],
        ["1", "1000", "1.00", "100%", "100%", "0.70", "8.0%", "0.0%", "0.0%", "1000", "+0%"],
        ["2", "600", "1.67", "83%", "83%", "1.17", "8.0%", "0.0%", "0.0%", "600", "+0%"],
        ["4", "400", "2.50", "62%", "62%", "1.75", "8.0%", "0.0%", "0.0%", "400", "+0%"],
        ["8", "cores are shared", "-", "-", "42%", "-", "-", "-", "-", "300", "-"],
    ]
    pays = page.table("study")
    assert pays["s, time.n_slices = 8"] == ["700", "2", "2"]
    assert "| 4            | 400              | 2.50     |" in report["text"]
    assert report["text"].startswith("Strong scaling: s, time.n_slices = 8\n\n| ranks ")
    assert [curve["break_even"] for curve in report["curves"]] == [
        {"measured": 2, "model": 2}, {"measured": 2, "model": 2}, None,
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "report_figures").iterdir()) == [
        "s_scaling.png", "s_shares.png", "w_scaling.png", "w_shares.png",
    ]  # fmt: skip


def test_the_page_of_nothing(tmp_path):
    missing = {**STRONG[1], "state": "missing"}
    report = make_report(STUDIES, "study.toml", [missing], tmp_path, lambda curve: None)
    assert "No point of this study is finished." in Page(tmp_path / "report.html").text
    assert report["figures"] == []


def test_the_studies_in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(kept, "find_folder", lambda source: None)  # data may not be prepared
    files = sorted(Path("configs/scaling").glob("*.toml"))
    assert len(files) >= 2
    for file in files:
        points = plan_points(read_scaling(file), str(file), Path("out"))
        assert len({point.folder for point in points}) == len(points) > 2
        page = (ROOT / "docs" / "scaling.md").read_text()
        assert f"configs/scaling/{file.name}" in page


@pytest.mark.parametrize(
    "module", ["kept", "launch", "runs", "rows", "work", "submit", "scaling", "table"]
)
def test_what_starts_runs_loads_neither_mpi_nor_jax(module):
    """The command would take a core of its runs, and in a batch job be taken for a rank."""
    code = f"import sys, nodepint_mpi.bench.studies.{module}\n"
    code += "print([name for name in ('mpi4py', 'h5py', 'jax') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"


def test_another_way_to_solve_the_coarse_problem_is_another_run_of_the_same_experiment():
    basis = "time.basis={kind='pod', rank=4}"
    slices, scan = (
        read_config(ROOT / "configs" / "heat.toml", [basis, "time.method='tangent'", *more])
        for more in ([], ["time.basis.recurrence='scan'"])
    )
    assert slices.fingerprint() == scan.fingerprint()
    assert kept.make_digest(slices, 2, 1) != kept.make_digest(scan, 2, 1)
