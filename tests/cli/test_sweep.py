"""`nodepint sweep`: which trials there are, what is trained, and how they are compared."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from nodepint_mpi.bench.studies import kept
from nodepint_mpi.bench.studies.launch import make_launch
from nodepint_mpi.bench.studies.rows import read_rows
from nodepint_mpi.bench.studies.sweep import (
    array_command,
    draw_search,
    draw_settings,
    plan_trials,
    ranked,
    series_of,
    write_options,
)
from nodepint_mpi.bench.studies.work import at_work, do_runs
from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.config.sweep import Sweep, read_sweep
from nodepint_mpi.errors import DataError, NodepintError
from tests.cli.small_case import alone, has_one_message, read_json

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(300)]

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")
LAUNCHER = f"{sys.executable} {STAND_IN} . {{ranks}} {{cores}}"
GRID = """
config = "tiny.toml"
metric = "test_loss"
[set]
"run.n_steps" = 4
[search]
"network.width" = [4, 8]
"optim.learning_rate" = [0.01, 0.03]
"""


def drawn(n_trials, **search):
    keys = {f"optim.{key}": value for key, value in search.items()}
    file = Sweep.model_validate(
        {"config": "x.toml", "metric": "test_loss", "n_trials": n_trials, "search": keys}
    )
    return [[one[key] for one in draw_settings(file)] for key in keys]


# ---- Which trials ------------------------------------------------------------------------------


def test_lists_are_combined_and_ranges_are_filled_evenly():
    file = Sweep.model_validate(
        {"config": "x.toml", "metric": "a", "search": {"a.b": [1, 2], "a.c": ["x", "y", "z"]}}
    )
    pairs = [tuple(one.values()) for one in draw_settings(file)]
    assert pairs == [(1, "x"), (1, "y"), (1, "z"), (2, "x"), (2, "y"), (2, "z")]
    rates, shares, counts = drawn(
        64, a={"low": 1e-4, "high": 1e-1, "log": True}, b={"low": -1.0, "high": 1.0},
        c={"low": 1.0, "high": 3.0, "whole": True},
    )  # fmt: skip
    # A Sobol sequence puts as many of 64 points in each of eight equal parts of every key.
    for values, edges in ((np.log(rates), np.log([1e-4, 1e-1])), (shares, [-1.0, 1.0])):
        parts = np.histogram(values, np.linspace(edges[0] - 1e-9, edges[1] + 1e-9, 9))[0]
        np.testing.assert_allclose(parts, 8, atol=1)  # drawn numbers are rounded
    assert sorted(set(counts)) == [1, 2, 3] and all(isinstance(one, int) for one in counts)
    assert min(map(counts.count, (1, 2, 3))) >= 20
    assert drawn(3, a=[1, 2, 3], b={"low": 0.0, "high": 1.0}) == drawn(
        3, a=[1, 2, 3], b={"low": 0.0, "high": 1.0}
    )
    (few,) = drawn(50, a=[1, 2, 3])
    assert sorted(few) == [1, 2, 3]  # each once


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('config = "tiny.toml"', "", "`config` is missing"),
        ("[4, 8]", "[]", "needs values that differ"),
        ("[4, 8]", "[4, 4]", "needs values that differ"),
        ("[4, 8]", "{ low = 1, high = 2 }", "say how many with `n_trials`"),
        ("[4, 8]", "{ low = 2, high = 2 }", "`low` below `high`"),
        ("[4, 8]", "{ low = 0, high = 2, log = true }", "above zero"),
        ("[4, 8]", "{ low = 0.5, high = 2, whole = true }", "whole numbers"),
        ("[4, 8]", '["wide"]', r"trial 1: .*network\.width"),
        ('"network.width"', "width", "names keys as the command line does"),
        ('"network.width"', '"network.widht"', r"trial 1: .*did you mean `network\.width`"),
        ('"network.width"', '"run.n_steps"', "one of `set` and `search`"),
        ("test_loss", "valid_loss", "the config has none"),
        ("test_loss", "best_valid_loss", "the config has none"),
        ('metric = "', 'ranks = 8\nmetric = "', "8 ranks cannot share 7 time"),
        ('metric = "', 'trials = 8\nmetric = "', "unknown key `trials`"),
    ],
)
def test_a_sweep_that_cannot_be(place, old, new, message):
    assert old in GRID
    (place / "sweep.toml").write_text(GRID.replace(old, new))
    with pytest.raises(NodepintError, match=message):
        plan_trials(read_sweep("sweep.toml"), "sweep.toml", place / "out")


def test_a_kept_score_must_be_kept(place):
    text = GRID.replace("test_loss", "best_valid_loss") + '[set.x]\n"data.valid_fraction" = 0.5\n'
    text = text.replace("[set.x]\n", "").replace("[set]", '[set]\n"data.valid_fraction" = 0.5')
    (place / "sweep.toml").write_text(text.rsplit('"data.valid', 1)[0])
    with pytest.raises(NodepintError, match=r"needs `output\.best = 'valid_loss'`"):
        plan_trials(read_sweep("sweep.toml"), "sweep.toml", place / "out")


# ---- With a stand-in for the runs --------------------------------------------------------------


@pytest.fixture
def place(case, tmp_path, monkeypatch):
    shutil.copy(case.config, tmp_path / "tiny.toml")
    (tmp_path / "sweep.toml").write_text(GRID)
    (tmp_path / "orders").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(kept, "busy_share", lambda cores: 0.0)
    return tmp_path


def do(place: Path, only=()):
    file = read_sweep("sweep.toml")
    trials, series = plan_trials(file, "sweep.toml", Path("out"), only=only), series_of(file)
    launch, said = make_launch(LAUNCHER, n_ranks=1, n_cores=1), []
    with at_work(series, Path("out"), trials) as held:
        n_failed = do_runs(
            series, trials, launch, Path("out"), held=held, timeout_s=60.0, report=said.append
        )
    calls = (place / "calls").read_text().splitlines() if (place / "calls").exists() else []
    (place / "calls").unlink(missing_ok=True)
    return n_failed, said, read_rows(series, trials), calls


def test_what_is_finished_is_left_alone_and_what_failed_is_done_again(place):
    (place / "orders").write_text(json.dumps({"out/2": "fail"}))
    n_failed, said, rows, calls = do(place, only=[1, 2])
    assert n_failed == 1 and [row["state"] for row in rows] == [
        "finished", "failed", "missing", "missing",
    ]  # fmt: skip
    assert said[1] == "trial 1, network.width = 4, optim.learning_rate = 0.01: finished"
    assert said[3].endswith("failed: exit status 2: the reason") and len(calls) == 2
    (place / "orders").write_text("{}")
    n_failed, _, rows, calls = do(place)
    assert n_failed == 0 and {row["state"] for row in rows} == {"finished"}
    assert [call.split()[3:6] for call in calls] == [
        [f"out/{i}.toml", "--out", f"out/{i}"] for i in (2, 3, 4)
    ]
    assert do(place)[3] == []
    (place / "sweep.toml").write_text(GRID.replace("0.03", "0.1"))
    _, said, _, calls = do(place)
    assert len(calls) == 2 and any("trial 2" in line and "stale" in line for line in said)


def test_the_best_is_the_least_or_the_largest_and_never_nan(place):
    do(place)
    for trial, loss in enumerate((3.0, float("nan"), 1.0, 2.0), 1):
        done = json.loads((place / "out" / str(trial) / "DONE").read_text())
        (place / "out" / str(trial) / "DONE").write_text(json.dumps(done | {"test_loss": loss}))
    for mode, order in (("min", [3, 4, 1, 2]), ("max", [1, 4, 3, 2])):
        (place / "sweep.toml").write_text(f'mode = "{mode}"' + GRID)
        file = read_sweep("sweep.toml")
        rows = read_rows(series_of(file), plan_trials(file, "sweep.toml", Path("out")))
        assert [row["trial"] for row in ranked(file, rows)] == order
    (place / "sweep.toml").write_text(GRID.replace("test_loss", "test_los"))
    with pytest.raises(DataError, match="no number 'test_los'; did you mean 'test_loss'"):
        do(place)


def test_an_array_of_jobs_trains_the_same_trials(place):
    search = '"network.activation" = ["tanh", "gelu"]\n"time.horizon" = [[0.0, 3.5]]\n'
    (place / "sweep.toml").write_text(GRID + search)
    file = read_sweep("sweep.toml")
    trials = plan_trials(file, "sweep.toml", Path("out"))
    Path("out").mkdir()
    lines = write_options(file, trials, Path("out")).read_text().splitlines()
    for trial, line in zip(trials, lines, strict=True):
        words = line.split(" ")  # as the script splits them
        assert words[::2] == ["--set"] * (len(words) // 2)
        assert read_config("tiny.toml", words[1::2]) == trial.config
    command = array_command(file, trials[:3], Path("out"), 2)
    assert "--array=1,2,3%2" in command and command[-4:] == [
        "jobs/array.sbatch", "tiny.toml", "out/options.txt", "out",
    ]  # fmt: skip
    blank = GRID + '"data.target" = ["u", "u v"]\n'
    (place / "sweep.toml").write_text(blank)
    file = read_sweep("sweep.toml")
    with pytest.raises(NodepintError, match="split at blanks"):
        write_options(file, plan_trials(file, "sweep.toml", Path("out")), Path("out"))


def test_a_submitted_trial_is_begun_and_then_finished(place, monkeypatch):
    (place / "bin").mkdir()
    sbatch = place / "bin" / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$@" >>submitted\necho "17;here"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    done = alone("sweep", "sweep.toml", "--out", "out", "--submit", "--at-once", 2, cwd=place)
    assert done.returncode == 0 and done.stdout.startswith("job 17: sbatch"), done.stderr
    assert "--array=1,2,3,4%2 --ntasks=1" in (place / "submitted").read_text()
    said = alone("sweep", "sweep.toml", "--out", "out", "--dry-run", cwd=place).stdout
    assert said.count(": begun, to be done") == 4
    do(place, only=[1])
    done = alone("sweep", "sweep.toml", "--out", "out", "--submit", "--dry-run", cwd=place)
    assert "--array=2,3,4 " in done.stdout and "trial 1, network.width = 4" in done.stdout


def test_bad_words_on_the_command_line(place, refusals):
    bad = {
        "--trials 9": "`--trials 9`: sweep.toml has trials 1 to 4",
        "--report --submit": "`--report` cannot be combined",
        "--submit": "sbatch is not on the PATH",
        "--launcher no_such{ranks}": "there is no no_such{ranks} on the PATH",
    }
    if shutil.which("sbatch"):  # on a machine with SLURM
        del bad["--submit"]
    said = refusals(place, [["sweep", "sweep.toml", *words.split()] for words in bad])
    for one, message in zip(said, bad.values(), strict=True):
        assert has_one_message(one) and message in one, one


def test_axes_show_the_whole_range_with_legible_labels():
    search = {
        "optim.a": {"low": 1e-3, "high": 1e-1, "log": True},
        "optim.b": {"low": 1.0, "high": 3.0, "whole": True},
    }
    file = Sweep.model_validate(
        {"config": "x.toml", "metric": "loss", "n_trials": 4, "search": search}
    )
    rows = [{"settings": one, "metric": float(i)} for i, one in enumerate(draw_settings(file), 1)]
    figure = draw_search(file, rows)
    figure.draw_without_rendering()
    for panel, (low, high) in zip(figure.axes, ((1e-3, 1e-1), (1, 3)), strict=True):
        left, right = panel.get_xlim()
        assert left < low and right > high
        assert not any(label.get_text() for label in panel.get_xticklabels(minor=True))
    assert {x for x in figure.axes[1].get_xticks() if 1 <= x <= 3} == {1, 2, 3}
    assert figure.axes[0].get_ylabel() == "loss"


# ---- With runs ---------------------------------------------------------------------------------


def test_trials_are_trained_and_compared(place):
    text = GRID.replace("[4, 8]", "[4]") + '"time.method" = ["parareal", "nonsense"]\n'
    (place / "sweep.toml").write_text(text)
    done = alone("sweep", "sweep.toml", cwd=place)
    assert done.returncode == 2 and "nonsense" in done.stderr  # before anything is trained
    assert not (place / "runs").exists()
    (place / "sweep.toml").write_text(GRID.replace("[4, 8]", "[4]"))
    done = alone("sweep", "sweep.toml", "--json", "found.json", cwd=place)
    assert done.returncode == 0, done.stderr
    found, out = read_json(place / "found.json"), place / "runs" / "sweep" / "sweep"
    losses = [json.loads((out / str(i) / "DONE").read_text())["test_loss"] for i in (1, 2)]
    assert [row["metric"] for row in found["trials"]] == losses
    assert found["best"]["trial"] == 1 + int(np.argmin(losses))
    page = (out / "sweep.html").read_text()
    assert "optim.learning_rate" in page and "test_loss" in page
    assert (out / "sweep_figures" / "search.png").stat().st_size > 5000
    assert (out / "compare.html").exists() and "compare.html" in done.stdout
    assert len((out / "trials.jsonl").read_text().splitlines()) == 2
