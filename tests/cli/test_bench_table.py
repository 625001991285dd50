"""`nodepint bench table`: what is trained and what is not, what is said, and the table itself."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from nodepint_mpi.bench.studies import kept
from nodepint_mpi.bench.studies.launch import make_launch, sole_use
from nodepint_mpi.bench.studies.rows import read_rows
from nodepint_mpi.bench.studies.table import TABLE, format_table, plan_cells
from nodepint_mpi.bench.studies.work import at_work, do_runs
from nodepint_mpi.config.table import TableList, read_table_list
from nodepint_mpi.errors import DataError, NodepintError, OutputError
from tests.cli.small_case import (
    alone,
    free_env,
    has_one_message,
    listing,
    messages,
    read_json,
    wait_for,
)

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(300)]

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")
LAUNCHER = f"{sys.executable} {STAND_IN} . {{ranks}} {{cores}}"


class Place(NamedTuple):
    """A folder with configs, a list of them, and orders for the stand-in."""

    folder: Path
    out: Path

    def order(self, **orders: str) -> None:
        """What is to become of a run, by name: `one__ranks_1="fail"`."""
        named = {k.replace("__", "/").replace("_", "-"): v for k, v in orders.items()}
        (self.folder / "orders").write_text(json.dumps(named))

    def listed(self, *problems: str, ranks=(1,), **keys) -> TableList:
        """Also written to list.toml."""
        entries = [{"config": f"{name}.toml", "dataset": name.title()} for name in problems]
        entries = [entry | {"ranks": list(ranks)} | keys for entry in entries]
        lines = (f"{key} = {json.dumps(value)}\n" for one in entries for key, value in one.items())
        each = len(entries[0])
        text = "".join(("[[problem]]\n" if i % each == 0 else "") + s for i, s in enumerate(lines))
        (self.folder / "list.toml").write_text(text)
        return read_table_list(self.folder / "list.toml")

    def calls(self) -> list[str]:
        """What trainings were started since the last time; without the folder of the runs."""
        path = self.folder / "calls"
        lines = path.read_text().replace(f"{self.out}/", "").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if line.split()[2] == "train"]

    def do(self, table: TableList, **options) -> tuple[int, list[str], dict[str, str]]:
        """How many failed, what was said, and the state of each cell."""
        cells, said = plan_cells(table, self.out, **options), []
        most = max(cell.n_cores for cell in cells)
        launch = make_launch(LAUNCHER, n_ranks=1, n_cores=most)
        with at_work(TABLE, self.out, cells) as held:
            n_failed = do_runs(
                TABLE, cells, launch, self.out, held=held, timeout_s=60.0, report=said.append
            )
        rows = read_rows(TABLE, cells)
        return n_failed, said, {f"{r['problem']}/{r['method']}": r["state"] for r in rows}


@pytest.fixture
def place(case, tmp_path, monkeypatch):
    for name in ("one", "two"):
        shutil.copy(case.config, tmp_path / f"{name}.toml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(kept, "busy_share", lambda cores: 0.0)
    place = Place(tmp_path, tmp_path / "table")
    place.order()
    return place


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ---- With a stand-in for the runs --------------------------------------------------------------


def test_what_is_finished_is_left_alone_and_what_changed_is_done_anew(place):
    table = place.listed("one", "two", ranks=(1, 2))
    n_failed, _, states = place.do(table)
    assert n_failed == 0 and set(states.values()) == {"finished"} and len(states) == 6
    assert place.calls() == [
        "1 2 train one.toml --out one/serial --plain",
        "1 1 train one.toml --out one/ranks-1",
        "2 1 train one.toml --out one/ranks-2",
        "1 2 train two.toml --out two/serial --plain",
        "1 1 train two.toml --out two/ranks-1",
        "2 1 train two.toml --out two/ranks-2",
    ]
    before = listing(place.out)
    assert place.do(table)[:2] == (0, []) and place.calls() == []
    assert listing(place.out) == before
    edit(place.folder / "two.toml", "log_every = 1\n", "log_every = 2\n")  # numbers stay the same
    assert place.do(table)[:2] == (0, [])

    edit(place.folder / "two.toml", "n_steps = 20", "n_steps = 21")
    n_failed, said, states = place.do(table, only=["one"])
    assert (said, place.calls()) == ([], [])
    assert {name for name, state in states.items() if state == "stale"} == {
        "two/serial", "two/ranks-1", "two/ranks-2",
    }  # fmt: skip
    _, said, states = place.do(table)
    assert said[0] == "two, serial: stale, its config or its cores have changed"
    assert len(place.calls()) == 3 and set(states.values()) == {"finished"}
    after = listing(place.out)
    assert after["one/ranks-2/DONE"] == before["one/ranks-2/DONE"]
    assert after["two/ranks-2/DONE"] != before["two/ranks-2/DONE"]
    assert after["two/ranks-2.stale/DONE"] == before["two/ranks-2/DONE"]


def test_a_finished_run_that_cannot_be_read_is_named(place):
    table = place.listed("one")
    place.do(table)
    (place.out / "one" / "ranks-1" / "DONE").write_text("{}")
    with pytest.raises(DataError, match=r"one/ranks-1 is damaged \(KeyError: 'n_parameters'\)"):
        read_rows(TABLE, plan_cells(table, place.out))


def test_serial_training_has_as_many_cores_as_the_most_ranks(place):
    place.do(place.listed("one", ranks=(1, 2)))
    place.calls()
    place.do(place.listed("one", ranks=(1, 2, 4)))
    assert place.calls() == [
        "1 4 train one.toml --out one/serial --plain",
        "4 1 train one.toml --out one/ranks-4",
    ]


def test_one_that_fails_does_not_keep_the_others(place):
    place.order(one__serial="fail", one__ranks_1="fail")
    table = place.listed("one", "two")
    n_failed, said, states = place.do(table)
    assert n_failed == 2 and "one, serial: failed: exit status 2: the reason" in said
    assert states == {
        "one/serial": "failed", "one/ranks-1": "failed",
        "two/serial": "finished", "two/ranks-1": "finished",
    }  # fmt: skip
    assert "all is well" in (place.out / "one" / "serial.log").read_text()
    table_text = format_table(read_rows(TABLE, plan_cells(table, place.out)), place.folder)
    assert "| One | plain diffrax, 1 core | failed: exit status 2: the reason | - |" in table_text
    place.order()
    place.calls()
    assert place.do(table)[0] == 0  # tried again, from the start: there is no checkpoint
    assert place.calls() == [
        "1 1 train one.toml --out one/serial --plain", "1 1 train one.toml --out one/ranks-1",
    ]  # fmt: skip


def test_slices_that_never_join_have_no_serial_training(place):
    text = "n_slices = 7\nrelaxation = { steps = 15 }\n"
    edit(place.folder / "one.toml", "n_slices = 7\n", text)
    edit(place.folder / "two.toml", "n_slices = 7\n", text.replace("15", "21"))
    _, _, states = place.do(place.listed("one", "two"))
    assert states["one/serial"] == "finished" and states["two/serial"] == "left out"
    rows = read_rows(TABLE, plan_cells(place.listed("one", "two"), place.out))
    lines = format_table(rows, place.folder).splitlines()
    assert lines[2].startswith("| One | plain diffrax, 1 core, without relaxation | 12.3 |")
    assert lines[4].startswith(
        "| Two | plain diffrax, 1 core | left out: no serial training has this loss"
    )


@pytest.fixture
def begin(place):
    """Start the command, which waits in the training of one/ranks-1."""
    place.listed("one")
    place.order(one__ranks_1="wait")
    started = []

    def start() -> subprocess.Popen:
        words = ["bench", "table", "--list", "list.toml", "--out", "table", "--launcher", LAUNCHER]
        process = subprocess.Popen(
            [Path(sys.executable).with_name("nodepint"), *words],
            cwd=place.folder, env=free_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        wait_for(lambda: (place.out / "one/ranks-1/ckpt/step-000002.h5").exists(), limit_s=60)
        return process

    yield start
    (place.folder / "go").touch()  # a stand-in that was left behind ends by itself
    for process in started:
        process.kill()
        process.communicate()


def test_interrupted_it_goes_on_from_the_last_checkpoint(place, begin):
    process = begin()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and messages(err) == ["nodepint: interrupted"]
    place.calls()
    place.order()
    n_failed, said, states = place.do(place.listed("one"))  # so the job has ended too
    assert said == ["one, ranks-1: goes on", "one, ranks-1: finished"]
    assert n_failed == 0 and set(states.values()) == {"finished"}
    assert place.calls() == ["1 1 train one.toml --out one/ranks-1 --resume auto"]
    assert json.loads((place.out / "one" / "ranks-1.json").read_text())["n_starts"] == 2


def test_a_job_that_a_kill_has_left_behind_is_waited_for(place, begin):
    process = begin()
    process.kill()
    process.communicate(timeout=60)
    with pytest.raises(OutputError, match="Somebody is writing in .*table, perhaps a job"):
        place.do(place.listed("one"))
    (place.folder / "go").touch()
    wait_for((place.out / "one" / "ranks-1" / "DONE").exists, limit_s=60)
    place.calls()

    def is_free() -> bool:
        try:
            with sole_use(place.out):
                return True
        except OutputError:
            return False

    wait_for(is_free, limit_s=60)
    assert place.do(place.listed("one"))[2]["one/ranks-1"] == "finished"
    assert place.calls() == []  # it was trained to its end, and lacked a score


# ---- Bad input ---------------------------------------------------------------------------------

ENTRY = '[[problem]]\ndataset = "x"\nconfig = "one.toml"\n'
LISTS = {
    "list that is not there": (None, r"config file list\.toml: No such file"),
    "no TOML": ("[[", r"list\.toml is not valid TOML"),
    "empty": ("problem = []", r"`problem` is a list; it.* at least 1 item"),
    "unknown key": (ENTRY + "rank = [1]", r"key `problem\.0\.rank`; did you mean `problem\.0\.ra"),
    "key that is missing": ('[[problem]]\ndataset = "x"', r"`problem\.0\.config` is missing"),
    "no rank": (ENTRY + "ranks = [0]", r"`problem\.0\.ranks\.0` is .* 0; it should be greater"),
    "twice": (ENTRY + ENTRY, r"`problem` names 'one' twice"),
    "no such config": (ENTRY.replace("one", "gone"), r"config file gone\.toml: No such file"),
    "more ranks than slices": (ENTRY + "ranks = [8]", r"^one\.toml: 8 ranks cannot share 7 time"),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_cannot_be(place, name):
    text, message = LISTS[name]
    (place.folder / "list.toml").unlink(missing_ok=True)
    if text is not None:
        (place.folder / "list.toml").write_text(text)
    with pytest.raises(NodepintError, match=message):
        plan_cells(read_table_list("list.toml"), place.out)


def test_data_that_are_missing_are_named_before_anything_is_done(place):
    table = place.listed("one", "two")
    text = re.sub('source = ".*"', 'source = "mnits"', (place.folder / "two.toml").read_text())
    (place.folder / "two.toml").write_text(text)
    with pytest.raises(NodepintError, match="run `nodepint data prepare mnist`"):
        place.do(table)
    assert place.do(table, only=["one"])[2]["two/serial"] == "missing"  # none of its business


def test_what_cannot_be_started_is_refused(place, monkeypatch):
    most = 1 + len(os.sched_getaffinity(0))
    with pytest.raises(NodepintError, match=f"{most}`: this machine has"):
        make_launch(None, n_ranks=most, n_cores=1)
    assert make_launch(None, n_ranks=most, n_cores=1, crowded=True).words == ()
    assert make_launch("env {ranks}", n_ranks=2, n_cores=1).words == ("env", "{ranks}")
    for launcher, message in (
        ("srun -n {ranks}", r"must say where the numbers .*'srun -n \{ranks\} -c \{cores\}'"),
        ("no_such_launcher {ranks} {cores}", "there is no no_such_launcher on the PATH"),
    ):
        with pytest.raises(NodepintError, match=message):
            make_launch(launcher, n_ranks=1, n_cores=7)
    monkeypatch.setenv("PATH", str(place.folder))
    with pytest.raises(NodepintError, match="no mpirun on the PATH"):
        make_launch(None, n_ranks=2, n_cores=1, crowded=True)


def test_a_folder_that_is_not_of_the_table_is_left_alone(place):
    (place.out / "one" / "ranks-1").mkdir(parents=True)
    with pytest.raises(OutputError, match="ranks-1 is in the way: it has no note of this series"):
        place.do(place.listed("one"))


def test_bad_words_on_the_command_line(place, refusals):
    place.listed("one")
    (place.folder / "README.md").write_text("no marks")
    bad = {
        "--only oen": "unknown problem; did you mean 'one'?",
        "--write README.md": "README.md has no place for the table",
        "--write gone/README.md": "Cannot write gone/README.md: there is no folder",
    }
    start = ["bench", "table", "--list", "list.toml"]
    said = refusals(place.folder, [[*start, *words.split()] for words in bad])
    for one, message in zip(said, bad.values(), strict=True):
        assert has_one_message(one) and message in one, one


# ---- With runs ---------------------------------------------------------------------------------


def test_plain_and_ours_are_trained_and_scored_alike(place):
    for name in ("one", "two"):
        edit(place.folder / f"{name}.toml", "n_steps = 20", "n_steps = 4")
        tight = "tol = 1e-12\n\n[time.adjoint]\ntol = 1e-12\n"
        edit(place.folder / f"{name}.toml", "[output]", f"[time.stopping]\n{tight}\n[output]")
    place.listed("one")
    (place.folder / "page").mkdir()
    page = place.folder / "page" / "README.md"
    page.write_text("# Title\n<!-- table -->\n<!-- /table -->\n")
    words = ["bench", "table", "--list", "list.toml", "--out", "table", "--json", "r.json"]
    done = alone(*words, "--dry-run", cwd=place.folder)
    assert done.stdout.splitlines() == [
        "one, serial: missing, to be done", "one, ranks-1: missing, to be done",
    ]  # fmt: skip
    assert not place.out.exists()
    done = alone(*words, "--write", page, cwd=place.folder)
    assert done.returncode == 0, done.stderr
    plain, ours = rows = read_json(place.folder / "r.json")
    assert [json.loads(s) for s in (place.out / "table.jsonl").read_text().splitlines()] == rows
    for split in ("train", "test"):
        for name in ("loss", "relative_error"):
            assert ours["scores"][split][name] == pytest.approx(plain["scores"][split][name], 1e-9)
    assert plain["scores"]["train"]["loss"] != plain["scores"]["test"]["loss"]
    assert plain["n_parameters"] == ours["n_parameters"] == 2 * 8 + 8 + 8 * 2 + 2
    assert 1e7 < min(*plain["peak_bytes"], *ours["peak_bytes"])
    assert 0 <= ours["busy_share"] <= 1 and ours["training_s"] > 0
    lines = page.read_text().splitlines()
    assert lines[:2] == ["# Title", "<!-- table -->"] and lines[-1] == "<!-- /table -->"
    assert lines[4].startswith("| One | plain diffrax, 1 core | ")
    assert "| [one.toml](../one.toml) |" in lines[5]
    starts = read_json(place.out / "one" / "ranks-1" / "provenance.json")["starts"]
    assert len(starts) == 1 and os.path.basename(starts[0]["command"][0]) == "__main__.py"
    before = listing(place.out / "one")
    done = alone(*words, "--write", page, cwd=place.folder)
    assert done.returncode == 0 and page.read_text().splitlines() == lines
    assert listing(place.out / "one") == before
