"""`nodepint scaling`: what is run and what is not, what is said, and job files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from nodepint_mpi.bench.studies import kept, rows
from nodepint_mpi.bench.studies.launch import make_launch, sole_use
from nodepint_mpi.bench.studies.rows import read_rows
from nodepint_mpi.bench.studies.runs import Run
from nodepint_mpi.bench.studies.scaling import SCALING, plan_points
from nodepint_mpi.bench.studies.submit import TEMPLATE, submit_jobs, write_jobs
from nodepint_mpi.bench.studies.work import at_work, do_runs
from nodepint_mpi.config.scaling import read_scaling
from nodepint_mpi.errors import ConfigError, DataError, NodepintError, OutputError
from tests.cli.small_case import (
    alone,
    free_env,
    has_one_message,
    listing,
    messages,
    read_json,
    wait_for,
)

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(120)]

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")
LAUNCHER = f"{sys.executable} {STAND_IN} . {{ranks}} {{cores}}"
HEAD = 'config = "one.toml"\nn_steps = 12\n'
STRONG = '[[study]]\nname = "s"\nranks = [1, 2]\nserial = true\n'
WEAK = '[[study]]\nname = "w"\nkind = "weak"\nranks = [1, 2]\ngrows = ["time.n_slices"]\n'


class Place(NamedTuple):
    """A folder with a config, a file of studies, and orders for the stand-in."""

    folder: Path
    out: Path

    def order(self, **orders: str) -> None:
        """What is to become of a run, by name: `s__ranks_1="fail"`."""
        named = {k.replace("__", "/").replace("_", "-"): v for k, v in orders.items()}
        (self.folder / "orders").write_text(json.dumps(named))

    def points(self, *studies: str, **options) -> list[Run]:
        """Of these studies, written to study.toml."""
        (self.folder / "study.toml").write_text(HEAD + "".join(studies))
        return plan_points(read_scaling("study.toml"), "study.toml", self.out, **options)

    def do(self, *studies: str, **options) -> tuple[int, list[str], dict[str, str]]:
        """How many failed, what was said, and the state of each point."""
        points, said = self.points(*studies, **options), []
        launch = make_launch(LAUNCHER, n_ranks=2, n_cores=1)
        with at_work(SCALING, self.out, points) as held:
            n_failed = do_runs(
                SCALING, points, launch, self.out, held=held, timeout_s=60.0, report=said.append
            )
        return n_failed, said, {row["point"]: row["state"] for row in read_rows(SCALING, points)}

    def calls(self) -> list[str]:
        """What was started since the last time; without the folder of the runs."""
        path = self.folder / "calls"
        lines = path.read_text().replace(f"{self.out}/", "").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def place(case, tmp_path, monkeypatch):
    shutil.copy(case.config, tmp_path / "one.toml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(kept, "busy_share", lambda cores: 0.0)
    place = Place(tmp_path, tmp_path / "scaling")
    place.order()
    return place


# ---- Points ------------------------------------------------------------------------------------


def test_a_strong_study_is_one_problem(place):
    study = STRONG.replace("[1, 2]", "[1, 2, 4]") + "data_ranks = [1, 1, 2]\n"
    serial, one, two, four = place.points(study)
    assert [p.label for p in (serial, one, two, four)] == [
        "s, serial", "s, ranks-1", "s, ranks-2", "s, ranks-4-data-2",
    ]  # fmt: skip
    assert [p.n_ranks for p in (serial, one, two, four)] == [1, 1, 2, 4]
    assert serial.is_plain and serial.config.time.method == "serial"
    assert one.facts["serial"] == four.facts["serial"] == "s, serial"
    assert four.config.run.data_ranks == 2 and four.config.time == one.config.time
    assert one.config.run.n_steps == 12 and one.config.output.log_every == 1
    assert four.folder == place.out / "s" / "ranks-4-data-2"


def test_a_study_of_ranks_that_share_tangents(place):
    basis = 'set = { "time.method" = "tangent", "time.basis" = { kind = "identity" } }\n'
    study = STRONG.replace("[1, 2]", "[1, 2, 4]") + basis + "basis_ranks = [1, 2, 2]\n"
    *_, one, two, four = place.points(study)
    assert (two.label, four.label) == ("s, ranks-2-basis-2", "s, ranks-4-basis-2")
    assert (one.config.run.basis_ranks, two.config.run.basis_ranks) == (1, 2)
    assert two.facts["basis_ranks"] == 2 and two.config.fingerprint() == one.config.fingerprint()
    assert len({point.kept.digest for point in (one, two, four)}) == 3


def test_a_weak_study_grows(place):
    study = WEAK.replace("[1, 2]", "[2, 4]").replace(
        'grows = ["time.n_slices"]',
        'grows = ["time.n_slices", "time.horizon", "data.batch_size", "optim.learning_rate"]',
    )
    study += 'data_ranks = [1, 2]\nset = { "data.batch_size" = 2, "time.horizon" = [-0.5, 3.5] }\n'
    two, four = place.points(study)  # two ranks along time in both: only [data] grows
    assert four.config.time == two.config.time
    assert (two.config.data.batch_size, four.config.data.batch_size) == (2, 4)
    two, four = place.points(study.replace("[1, 2]", "[1, 1]") + "serial = true\n")[1::2]
    assert (two.config.time.n_slices, four.config.time.n_slices) == (7, 14)
    assert two.config.time.horizon == [-0.5, 3.5] and four.config.time.horizon == [-0.5, 7.5]
    assert (two.config.data.batch_size, four.config.data.batch_size) == (2, 2)
    assert four.config.optim.learning_rate == 2 * two.config.optim.learning_rate
    assert four.facts["settings"]["time.n_slices"] == 14
    assert four.facts["settings"]["data.batch_size"] == 2
    assert (two.facts["serial"], four.facts["serial"]) == ("w, serial-2", "w, serial-4")


def test_a_study_over_values_has_a_curve_for_each(place):
    study = STRONG + '[study.over]\n"time.n_slices" = [7, 5]\n"optim.name" = ["adam", "sgd"]\n'
    points = place.points(study)
    assert len(points) == 4 * 3
    assert points[-1].label == 's, time.n_slices = 5, optim.name = "sgd", ranks-2'
    assert points[-1].folder.parent == place.out / "s" / "time.n_slices=5,optim.name=_sgd_"
    assert points[-1].facts["serial"] == points[-3].label
    assert points[-1].config.time.n_slices == 5 and points[-1].config.optim.name == "sgd"
    assert len({point.folder for point in points}) == 12
    section = 'set = { "time.basis" = { kind = "pod", rank = 2 } }\n'
    points = place.points(STRONG + section + 'over = { "time.basis.rank" = [1, 2] }\n')
    ranks = [p.config.time.basis.rank for p in points if p.config.time.basis]
    assert ranks == [1, 1, 2, 2] and len(points) == 5  # plain training knows of no basis
    assert {point.facts["serial"] for point in points[1:]} == {points[0].label}


BAD = {
    "file that is not there": (None, r"config file study\.toml: No such file"),
    "no TOML": ("[[", r"study\.toml is not valid TOML"),
    "no study": (HEAD + "study = []", r"`study` is a list; it.* at least 1 item"),
    "unknown key": (HEAD + STRONG + "rank = [1]", r"key `study\.0\.rank`; did you mean"),
    "too few steps": ("n_steps = 5\n" + HEAD[:20] + "\n" + STRONG, r"`n_steps` .* 5; it should"),
    "twice": (HEAD + STRONG + STRONG, r"`study` names 's' twice"),
    "no such config": (HEAD.replace("one", "gone") + STRONG, r"config file gone\.toml: No such"),
    "ranks in disorder": (HEAD + STRONG.replace("[1, 2]", "[2, 1]"), r"strictly increasing"),
    "uneven grid": (HEAD + STRONG + "data_ranks = [2]", r"1 ranks cannot form 2 lines of equal"),
    "uneven basis": (HEAD + STRONG + "basis_ranks = [1, 3]", r"2 ranks cannot form 3 lines of eq"),
    "no basis": (HEAD + STRONG + "basis_ranks = [1, 2]", r"`time.method = 'parareal'` has none"),
    "more ranks than slices": (
        HEAD + STRONG.replace("2]", "8]"), r"study 's': one\.toml for 8 ranks: 8 ranks cannot shar"
    ),
    "uneven batch": (
        HEAD + STRONG + 'data_ranks = [1, 2]\nset = { "data.batch_size" = 3 }',
        r"2 lines of ranks cannot share 3 samples evenly",
    ),
    "nothing that grows": (HEAD + WEAK.replace("grows", "# "), r"needs `grows`, such as"),
    "strong that grows": (HEAD + STRONG + 'grows = ["time.n_slices"]', r"`grows` is for `kind ="),
    "what cannot grow": (
        HEAD + WEAK.replace("n_slices", "method"), r"'w': `grows`: `time\.method` is 'parareal'"
    ),
    "what grows by a half": (
        HEAD + WEAK.replace("[1, 2]", "[2, 3]"), r"`time\.n_slices` = 7 cannot be 3/2 times"
    ),
    "key that is no key": (HEAD + STRONG + "set = { n_slices = 4 }", r'in quotes: "time\.n_sli'),
    "key that is unknown": (
        HEAD + STRONG + 'set = { "time.n_slice" = 4 }', r"`time\.n_slice`; did you mean `time\.n_sl"
    ),
    "key in two places": (
        HEAD + STRONG + 'set = { "time.n_slices" = 4 }\nover = { "time.n_slices" = [5] }',
        r"can stand in one of",
    ),
    "no values": (HEAD + STRONG + 'over = { "time.n_slices" = [] }', r"needs values that differ"),
    "same values": (HEAD + STRONG + 'over = { "time.n_slices" = [7, 7] }', r"values that differ"),
    "steps by set": (HEAD + STRONG + 'set = { "run.n_steps" = 9 }', r"is set by `n_steps` of this"),
    "no serial loss": (
        HEAD + STRONG + 'set = { "time.relaxation" = { steps = 99 } }', r"no serial training has"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_study_that_cannot_be(place, name):
    text, message = BAD[name]
    if text is not None:
        (place.folder / "study.toml").write_text(text)
    with pytest.raises(NodepintError, match=message):
        plan_points(read_scaling("study.toml"), "study.toml", place.out)


def test_bad_words_on_the_command_line(place):
    studies = STRONG, WEAK.replace("[1, 2]", "[1, 4]")
    for options, message in (
        ({"only": ["t"]}, "`--only t`: unknown study in study.toml; known names are 's', 'w'."),
        ({"only_ranks": [3]}, "`--only-ranks 3`: study.toml has points of 1, 2, 4 ranks"),
        ({"only": ["s"], "only_ranks": [4]}, "no point that is both of `--only` and of"),
    ):
        with pytest.raises(ConfigError, match=message):
            place.points(*studies, **options)
    before = listing(place.folder)
    done = alone("scaling", "study.toml", "--report", "--submit", cwd=place.folder)
    assert done.returncode == 2 and has_one_message(done.stderr), done.stderr
    assert "`--report` cannot be combined" in done.stderr and listing(place.folder) == before


# ---- Runs, by a stand-in -----------------------------------------------------------------------


def test_what_is_finished_is_left_alone_and_what_changed_is_done_anew(place):
    n_failed, _, states = place.do(STRONG, WEAK)
    assert n_failed == 0 and set(states.values()) == {"finished"}
    assert place.calls() == [
        "1 1 train s/serial.toml --out s/serial --plain",
        "1 1 train s/ranks-1.toml --out s/ranks-1",
        "2 1 train s/ranks-2.toml --out s/ranks-2",
        "1 1 train w/ranks-1.toml --out w/ranks-1",
        "2 1 train w/ranks-2.toml --out w/ranks-2",
    ]
    before = listing(place.out)
    assert place.do(STRONG, WEAK)[:2] == (0, []) and place.calls() == []
    assert listing(place.out) == before
    changed = WEAK + 'set = { "optim.learning_rate" = 0.5 }\n'
    assert [p.state() for p in place.points(STRONG, changed)] == ["finished"] * 3 + ["stale"] * 2
    _, said, states = place.do(STRONG, changed, only_ranks=[2])
    assert said[0] == "w, ranks-2: stale, its config has changed"
    assert states["w, ranks-1"] == "stale" and states["w, ranks-2"] == "finished"
    assert listing(place.out)["w/ranks-2.stale/DONE"] == before["w/ranks-2/DONE"]


def test_a_row_has_what_the_run_has(place):
    place.do(STRONG.replace("[1, 2]", "[1, 7]"))
    serial, one, seven = map(json.loads, (place.out / "points.jsonl").read_text().splitlines())
    assert (serial["step_s"]["max"], serial["phases_s"]) == (0.3, None)
    assert one["step_s"] == {"min": 0.5, "mean": 0.5, "max": 0.5} and one["loss"] == 0.75
    assert one["counts"]["fine"] == {"min": 80, "mean": 80, "max": 80, "sum": 80}
    assert "reduced" not in one["counts"] and one["sweeps"] == one["profiled"]["sweeps"] == [2, 1]
    assert one["profiled"]["counts"]["fine"] == {"min": 8, "mean": 8, "max": 8}
    assert not one["oversubscribed"] and seven["oversubscribed"]  # it pretends to have four cores
    assert one["busy_share"] == 0.0 and one["peak_bytes"] == 500_000_000


def test_a_finished_run_that_cannot_be_read_is_named(place):
    place.do(STRONG)
    (place.out / "s" / "ranks-1" / "phases.json").write_text("{}")
    with pytest.raises(DataError, match=r"s/ranks-1 is damaged \(KeyError: 'phases_s'\)"):
        read_rows(SCALING, place.points(STRONG))


def test_one_that_fails_does_not_keep_the_others(place):
    place.order(s__ranks_1="fail")
    n_failed, said, states = place.do(STRONG)
    assert n_failed == 1 and "s, ranks-1: failed: exit status 2: the reason" in said
    assert states == {"s, serial": "finished", "s, ranks-1": "failed", "s, ranks-2": "finished"}
    assert "all is well" in (place.out / "s" / "ranks-1.log").read_text()
    done = alone("scaling", "study.toml", "--out", place.out, "--dry-run", cwd=place.folder)
    assert done.stdout.splitlines() == [
        "s, serial: finished",
        "s, ranks-1: failed (exit status 2: the reason), to be done",
        "s, ranks-2: finished",
    ]
    place.order()
    place.calls()
    assert place.do(STRONG)[0] == 0
    assert place.calls() == ["1 1 train s/ranks-1.toml --out s/ranks-1"]


def test_interrupted_it_begins_the_point_anew(place):
    place.points(STRONG)
    place.order(s__ranks_1="wait")
    words = ["scaling", "study.toml", "--out", "scaling", "--launcher", LAUNCHER]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("nodepint"), *words],
        cwd=place.folder, env=free_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for((place.out / "s/ranks-1/ckpt/step-000002.h5").exists, limit_s=60)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        (place.folder / "go").touch()  # a stand-in that was left behind ends by itself
        process.kill()
    assert process.returncode == 130 and messages(err) == ["nodepint: interrupted"]
    place.calls()
    place.order()
    assert [p.state() for p in place.points(STRONG)] == ["finished", "begun", "missing"]
    assert place.do(STRONG)[0] == 0
    assert place.calls() == [
        "1 1 train s/ranks-1.toml --out s/ranks-1", "2 1 train s/ranks-2.toml --out s/ranks-2",
    ]  # fmt: skip
    assert not (place.out / "s/ranks-1/ckpt/step-000002.h5").exists()


def test_jobs_for_other_numbers_of_ranks_work_in_the_same_folder(place, monkeypatch):
    with sole_use(place.out, ".lock-2"):
        assert place.do(STRONG, only_ranks=[1])[0] == 0
        with pytest.raises(OutputError, match="Somebody is writing in .*scaling, perhaps a job"):
            place.do(STRONG, only_ranks=[2])
    turns = []

    def take_turns(out, name, *, wait):
        turns.append((name, wait))
        return sole_use(out, name, wait=wait)

    monkeypatch.setattr(rows, "sole_use", take_turns)
    assert place.do(STRONG)[2]["s, ranks-2"] == "finished"
    assert turns == [(".lock-points", True)]


# ---- Jobs --------------------------------------------------------------------------------------

SLURM = """#!/bin/sh
echo "$(basename "$0")" "$@" >>slurm-calls
case "$0" in
*/sbatch) echo "4$(wc -l <slurm-calls);cluster" ;;
*) cat queue 2>/dev/null ;;
esac
"""


def test_a_job_for_each_number_of_ranks(place, monkeypatch):
    points = place.points(STRONG.replace("[1, 2]", "[1, 2, 4]"))
    words = ["--timeout", "60"]
    files = write_jobs(points, Path("study.toml"), place.out, ROOT / TEMPLATE, words)
    text = files[4].read_text()
    assert sorted(files) == [1, 2, 4]
    subprocess.run(["bash", "-n", files[4]], check=True, timeout=20)
    assert "\n#SBATCH --ntasks=4\n" in text and "\n#SBATCH --job-name=scaling-4\n" in text
    assert f"\nset -- study.toml --out {place.out} --timeout 60\nset -euo pipefail\n" in text

    (place.folder / "bin").mkdir()
    for name in ("sbatch", "squeue"):
        (place.folder / "bin" / name).write_text(SLURM)
        (place.folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place.folder / 'bin'}:{os.environ['PATH']}")
    said = []
    assert submit_jobs(files, said.append) == {1: "41", 2: "42", 4: "43"}
    assert said[2] == f"4 ranks: job 43, {files[4]}"
    (place.folder / "queue").write_text("in the queue\n")
    del said[:]
    assert submit_jobs(files, said.append) == {1: "41", 2: "42", 4: "43"}
    assert said[2] == "4 ranks: job 43 is in the queue"
    calls = (place.folder / "slurm-calls").read_text().splitlines()
    assert calls[0] == f"sbatch --parsable {files[1]}"
    assert calls[3:] == [f"squeue --noheader --format=%i --jobs 4{n}" for n in (1, 2, 3)]


def test_only_what_is_to_be_done_is_submitted(place, monkeypatch):
    place.do(STRONG, only_ranks=[1])
    files = write_jobs(place.points(STRONG), Path("s"), place.out, ROOT / TEMPLATE, [])
    assert list(files) == [2]
    monkeypatch.setenv("PATH", str(place.folder))
    with pytest.raises(ConfigError, match="no sbatch on the PATH: `--submit` is for SLURM"):
        submit_jobs(files, print)


@pytest.mark.parametrize(
    ("drop", "message"),
    [("#SBATCH --ntasks", r"one line `#SBATCH --ntasks="), ("set -euo", r"a line `set -euo pipef")],
)
def test_a_template_without_a_place_is_refused(place, drop, message):
    text = (ROOT / TEMPLATE).read_text()
    assert drop in text
    template = place.folder / "t.sbatch"
    template.write_text(text.replace(drop, "# "))
    with pytest.raises(ConfigError, match=message):
        write_jobs(place.points(STRONG), Path("s"), place.out, template, [])


# ---- With runs ---------------------------------------------------------------------------------


def test_a_study_of_one_and_two_ranks(place):
    text = (place.folder / "one.toml").read_text()
    (place.folder / "one.toml").write_text(text.replace("tensorboard = true\n", ""))
    place.points(STRONG)
    words = ["scaling", "study.toml", "--out", "scaling", "--json", "r.json"]
    done = alone(*words, cwd=place.folder)
    assert done.returncode == 0, done.stderr
    result = read_json(place.folder / "r.json")
    serial, one, two = result["points"]
    assert [json.loads(s) for s in (place.out / "points.jsonl").read_text().splitlines()] == [
        serial, one, two,
    ]  # fmt: skip
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-9) and serial["loss"] > 0
    sweeps, slices = sum(one["sweeps"]), one["counts"]["fine"]["sum"]
    assert sweeps > 0 and slices == two["counts"]["fine"]["sum"] >= 12 * 7
    assert two["counts"]["fine"]["max"] > slices / 2  # four of seven slices
    assert two["counts"]["messages"]["sum"] > 0 == one["counts"]["messages"]["sum"]
    assert two["oversubscribed"] == (len(os.sched_getaffinity(0)) < 2)
    assert (two["n_nodes"], one["all_cores"]) == (1, 1)
    assert min(row["step_s"]["max"] for row in result["points"]) > 0
    (curve,) = result["curves"]
    assert curve["points"][0]["speed_up"] == 1 and curve["points"][0]["shares"]["messages"] == 0
    assert sum(curve["points"][0]["shares"].values()) == pytest.approx(1)
    simulated = [point["model"]["step_s"] for point in curve["points"]]
    assert simulated[0] > simulated[1] > simulated[0] / 2
    assert "| plain serial | " in done.stdout
    assert "scaling/report.html: 2 figures" in done.stdout
    before = listing(place.out / "s")
    done = alone(*words, cwd=place.folder)
    assert done.returncode == 0 and listing(place.out / "s") == before
