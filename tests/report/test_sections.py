"""Pages of run directories that are written by hand: sections, numbers, and what is refused."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from matplotlib.image import imsave

from nodepint_mpi.cli.report import compare as compare_command
from nodepint_mpi.errors import ConfigError, DataError, NodepintError, OutputError
from nodepint_mpi.io.history import HISTORY, History
from nodepint_mpi.io.records import Records
from nodepint_mpi.pages import figures
from nodepint_mpi.pages.figures import plot_losses
from nodepint_mpi.pages.page import write_page
from nodepint_mpi.pages.parts import Picture, Section
from nodepint_mpi.report.compare import compare_runs, format_comparison, label_runs
from nodepint_mpi.report.facts import final_numbers, format_ranks, read_facts, seconds
from nodepint_mpi.report.measures import loss, step_times, sweeps
from nodepint_mpi.report.sections import make_report
from nodepint_mpi.report.tables import checkpoint_used, summary
from tests.report.page_reader import Page

pytestmark = pytest.mark.mpi(max_size=1)

CONFIG = """
[run]
name = "by_hand"
[data]
source = "no<where>"
input = "u"
target = "u"
times = "t"
[network]
name = "mlp"
width = WIDTH
[loss]
name = "mean_squared_error"
[time]
horizon = [0.0, 2.0]
n_slices = 5
METHOD
fine = { solver = "rk4", n_steps = 4 }
"""
PARAREAL = 'coarse = { solver = "euler", n_steps = 1 }'
DONE = {"status": "finished", "step": 30, "train_loss": 0.5, "test_loss": 0.625, "step_s": 0.25}
STARTS = [
    {"time": "2024-01-01T00:00:00", "n_ranks": n, "hosts": ["h1", "h2"], "command": ["nodepint"],
     "data_ranks": n // 2, "versions": {"jax": version}}
    for n, version in ((2, "0.1"), (4, "0.2"))
]  # fmt: skip


def record(step, **more):
    """As a step that solves anew writes it."""
    numbers = dict(loss=1 / step, grad_norm=2 / step, sweeps=3, adjoint_sweeps=2, jump=1e-6)
    return {"step": step, **numbers, "adjoint_residual": 1e-5, "step_s": 0.25, **more}


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    monkeypatch.setattr("nodepint_mpi.pages.page.DPI", 20)  # as good, and drawn sooner

    def make(name="run", *, records=None, done=DONE, method=PARAREAL, width=8):
        folder = tmp_path / name
        folder.mkdir()
        text = CONFIG.replace("METHOD", method).replace("WIDTH", str(width))
        (folder / "config.toml").write_text(text)
        records = [record(step) for step in (10, 20, 30)] if records is None else records
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (folder / "provenance.json").write_text(json.dumps({"starts": STARTS}))
        (folder / "log.txt").write_text("first\n<b>last</b>\n")
        if done is not None:
            (folder / "DONE").write_text(json.dumps(done))
        return folder

    return make


def test_a_page_shows_what_the_run_has_recorded(make_run):
    folder = make_run()
    result = make_report(folder, None)
    page = Page(folder / "report.html")
    assert page.titles == result["sections"]
    assert page.titles == [
        "Final numbers", "Loss", "Sweeps", "Jumps and adjoint residual", "Time of a step",
        "Starts and versions", "Resolved config", "Log",
    ]  # fmt: skip
    files = sorted((folder / "report_figures").glob("*.png"))
    assert [path.stem for path in files] == ["jumps", "loss", "step_time", "sweeps"]
    assert sorted(page.images) == sorted(path.read_bytes() for path in files)
    assert page.links == []  # nothing is fetched
    numbers = page.table("quantity")
    assert numbers == {
        "status": ["finished"], "step": ["30"], "train loss": ["0.5"], "test loss": ["0.625"],
        "time of a step, median": ["250 ms"], "ranks of every start": ["2, 4 (2 x 2)"],
    }  # fmt: skip
    assert format_ranks(STARTS[1] | {"basis_ranks": 2}) == "4 (2 x 1 x 2)"
    assert page.table("package") == {"jax": ["0.1", "0.2"]}
    config = page.table("key")
    assert (config["network.width"], config["time.coarse.solver"]) == (["8"], ["euler"])
    assert config["data.source"] == ["no<where>"] and "<b>last</b>" in page.text


def curves(panel):
    """What is drawn, by label."""
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in panel.lines}


def test_both_pictures_of_the_loss_draw_every_step(make_run, monkeypatch):
    """All of the history, in the records' place, and the validation loss on the same axis."""
    validated = [record(10, valid_loss=0.5), record(20), record(30, valid_loss=0.25)]
    folder = make_run(records=validated)

    def drawn():
        found = []
        with Records(folder, resume_step=30) as records:
            records.write_table()
        with monkeypatch.context() as patch:
            patch.setattr(figures, "save_figure", lambda figure, path: found.append(figure) or path)
            plot_losses(folder)
        section = loss(read_facts(folder))
        assert section is not None and isinstance(section.parts[0], Picture)
        panels = [figure.axes[0] for figure in (*found, section.parts[0].figure)]
        assert [panel.get_yscale() for panel in panels] == ["log", "log"]
        return [curves(panel) for panel in panels], section.parts[0].caption

    lines, caption = drawn()
    assert "at every reported optimizer step" in caption
    for line in lines:
        training = line["training loss of the step's batch"]
        np.testing.assert_array_equal(training, [[10, 0.1], [20, 0.05], [30, 1 / 30]])
    history = History(folder)
    for step in range(1, 31):
        history.append(step, loss=3.0 / step, grad_norm=1.0, step_s=0.1, sweeps=(1, 1))
    history.write()
    assert (folder / HISTORY).is_file()
    lines, caption = drawn()
    assert "at every optimizer step" in caption
    for line in lines:
        training = line["training loss of the step's batch"]
        np.testing.assert_array_equal(training[:, 0], np.arange(1, 31))
        np.testing.assert_array_equal(training[:, 1], 3.0 / np.arange(1, 31))
        np.testing.assert_array_equal(line["validation loss"], [[10, 0.5], [30, 0.25]])


def test_a_loss_below_zero_is_drawn_too(make_run):
    """That of a learned density: no logarithmic axis shows it."""
    section = loss(read_facts(make_run(records=[record(1), record(2, loss=-1.5)])))
    assert section is not None and isinstance(section.parts[0], Picture)
    assert section.parts[0].figure.axes[0].get_yscale() == "linear"


def test_a_step_that_compiles_is_left_out_of_the_times_of_steps(make_run):
    """Of every step in the history, not of the reported ones alone; sweeps are those of all."""
    folder = make_run()
    history = History(folder)
    for step in range(1, 201):
        took_s, n_sweeps = (40.0, 4) if step == 1 else (0.1 + 0.001 * (step % 3), 1 + step % 2)
        history.append(step, loss=1.0, grad_norm=1.0, step_s=took_s, sweeps=(n_sweeps, 1))
    history.write()
    facts = read_facts(folder)
    section = step_times(facts)
    assert section is not None and isinstance(section.parts[0], Picture)
    line = curves(section.parts[0].figure.axes[0])["time of a step"]
    np.testing.assert_array_equal(line[:, 0], np.arange(2, 201))
    assert line[:, 1].max() < 103
    assert "Left out: 40 s in steps that took more than 10 times" in section.parts[0].caption
    assert "(1)" in section.parts[0].caption
    section = sweeps(facts)
    assert section is not None and isinstance(section.parts[0], Picture)
    line = curves(section.parts[0].figure.axes[0])["forward"]
    np.testing.assert_array_equal(line[:, 1], [4, *(1 + step % 2 for step in range(2, 201))])


def over_ranks(*values):
    mean = sum(values) / len(values)
    found = {"min": min(values), "mean": mean, "max": max(values), "ranks": list(values)}
    return found | {"sum": sum(values)}


TIMES = {
    "n_ranks": 2, "data_ranks": 1, "n_steps": 30, "n_warm_steps": 25,
    "step_s": over_ranks(0.25, 0.75),
    "phases_s": {
        "fine_forward": over_ranks(0.125, 0.5), "tangents": over_ranks(0.0, 0.0),
        "wait": over_ranks(0.125, 0.25),
    },
    "host_s": {"checkpoint": over_ranks(1.5, 2.5)},
    "counts": {
        "fine": over_ranks(120, 90), "tangents": over_ranks(0, 0), "fine_equivalents": None,
    },
    "profiles": {"steps": [10, 20], "cost_s": 0.5, "missing": None},
}  # fmt: skip


def test_phases_of_every_rank_are_drawn_and_told(make_run):
    folder = make_run()
    (folder / "phases.json").write_text(json.dumps(TIMES))
    assert "Phases per rank" in make_report(folder, None)["sections"]
    assert (folder / "report_figures" / "phases.png").is_file()
    page = Page(folder / "report.html")
    assert page.table("phase of a step") == {  # what takes no time is left out
        "fine forward": ["125", "312", "500", "62.5%"], "wait": ["125", "188", "250", "37.5%"],
    }  # fmt: skip
    assert page.table("in the loop") == {"checkpoint": ["1.5", "2", "2.5"]}
    assert page.table("counted") == {"fine": ["210", "90", "105", "120"]}
    assert "profiles of step 10, 20" in page.text


def test_phases_without_a_profile_say_why(make_run):
    folder = make_run()
    missing = {"steps": [], "cost_s": 0.0, "missing": "too few steps"}
    told = TIMES | {"phases_s": None, "profiles": missing}
    (folder / "phases.json").write_text(json.dumps(told))
    assert "Phases per rank" in make_report(folder, None)["sections"]
    assert not (folder / "report_figures" / "phases.png").exists()
    assert "No step was profiled: too few steps." in Page(folder / "report.html").text


def test_pictures_put_into_the_run_are_shown(make_run):
    folder = make_run()
    (folder / "pictures").mkdir()
    imsave(folder / "pictures" / "digits.png", np.eye(24))
    assert "Pictures" in make_report(folder, None)["sections"]
    assert (folder / "report_figures" / "picture_digits.png").is_file()
    assert "pictures/digits.png" in Page(folder / "report.html").text


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"no PNG", lambda data: data[:60]]
)
def test_a_damaged_picture_is_named_and_the_page_made_all_the_same(make_run, damage):
    folder = make_run()
    (folder / "pictures").mkdir()
    file = folder / "pictures" / "digits.png"
    imsave(file, np.random.default_rng(0).random((24, 24)))
    file.write_bytes(damage(file.read_bytes()))
    make_report(folder, None)
    assert "pictures/digits.png cannot be read" in Page(folder / "report.html").text


def test_sections_follow_what_there_is(make_run):
    checked = [record(k, gradient_error_estimate=1e-3) for k in (10, 20)]
    checked[1]["gradient_error"] = 5e-4
    tracked = make_run("tracked", records=checked, method=f"{PARAREAL}\ntracking = {{}}")
    assert "Gradient error" in make_report(tracked, None)["sections"]
    found = Page(tracked / "report.html").text
    assert "1 of the reported steps were checked: median error 0.0005" in found
    serial = [record(k, sweeps=0, adjoint_sweeps=0, jump=0.0, adjoint_residual=0.0) for k in (1, 2)]
    plain = make_run("plain", records=serial, method='method = "serial"')
    titles = make_report(plain, None)["sections"]
    assert {"Sweeps", "Jumps and adjoint residual", "Gradient error"}.isdisjoint(titles)


def test_an_unfinished_run_says_so(make_run):
    facts = read_facts(make_run(done=None, records=[record(10), record(20, loss=0.125)]))
    assert final_numbers(facts) == {
        "status": "not finished", "step": 20, "train_loss": 0.125, "training_s": 5.0,
    }  # fmt: skip
    section = summary(facts)
    assert section.title == "So far"
    assert str(section.parts[0]).startswith("This run is not finished: step 20 of 1000")


def test_predictions_of_an_earlier_step_are_said_to_be_so(make_run):
    facts = read_facts(make_run())
    assert checkpoint_used(facts, 30) is None
    section = checkpoint_used(facts, 20)
    assert section is not None
    assert str(section.parts[0]).startswith("The checkpoint looked at is of step 20, the last")


def test_a_new_page_takes_the_place_of_the_old_one_with_its_figures(tmp_path):
    def write(name):
        section = Section("One", [Picture(name, Figure(figsize=(1, 1)), "Nothing & all.")])
        return write_page(tmp_path / "x.html", [section], title="Two", subtitle="Three")

    write("old")
    (tmp_path / "x_figures" / "notes.txt").write_text("mine")
    assert write("new") == [tmp_path / "x_figures" / "new.png"]
    names = {path.name for path in (tmp_path / "x_figures").iterdir()}
    assert names == {"new.png", "notes.txt"}
    page = Page(tmp_path / "x.html")
    assert page.titles == ["One"] and len(page.images) == 1
    assert "Nothing & all." in page.text and "(x_figures/new.png)" in page.text


def test_times_are_measured_or_estimated(make_run):
    estimated = read_facts(make_run("old"))
    spent = seconds(estimated)
    assert spent is not None and not spent[1]
    np.testing.assert_allclose(spent[0], [2.5, 5.0, 7.5])  # ten steps of 0.25 s each
    timed = [record(10, training_s=9.0), record(20, training_s=11.5)]
    spent = seconds(read_facts(make_run("new", records=timed)))
    assert spent is not None and spent[1]
    np.testing.assert_array_equal(spent[0], [9.0, 11.5])


def test_damaged_lines_are_left_out_and_counted(make_run):
    folder = make_run()
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + '\n{"step": 40, "lo')
    facts = read_facts(folder)
    np.testing.assert_array_equal(facts.steps, [10, 30])
    assert "1 of the lines in the metrics are damaged and were skipped." in summary(facts).parts


def test_the_table_stands_in_for_lost_lines(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").unlink()
    with Records(folder) as records:
        for step in (10, 20):
            records.append(step, loss=1 / step)
        records.write_table()
    (folder / "metrics.jsonl").unlink()
    facts = read_facts(folder)
    np.testing.assert_array_equal(facts.steps, [10, 20])
    np.testing.assert_array_equal(facts.columns["loss"], [0.1, 0.05])


def test_quantities_that_are_no_single_numbers_are_passed_over(make_run):
    records = [record(1, phases=[1.0, 2.0], odd=None), record(2, ranks={"0": 1.0}, loss=math.nan)]
    columns = read_facts(make_run(records=records)).columns
    assert {"phases", "ranks"}.isdisjoint(columns)
    np.testing.assert_array_equal(columns["loss"], [1.0, np.nan])


BAD = {
    "no config": (lambda f: (f / "config.toml").unlink(), ConfigError, "is not a run directory"),
    "no metrics": (
        lambda f: (f / "metrics.jsonl").unlink(),
        DataError,
        "no recorded step: metrics.jsonl: it is empty or gone",
    ),
    "only torn lines": (
        lambda f: (f / "metrics.jsonl").write_text("{\n}\n"), DataError, "none of its 2 lines",
    ),
    "text for a number": (
        lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "loss": "low"}\n'),
        DataError,
        "metrics.jsonl is damaged: `loss` is not always a number",
    ),
    "damaged end": (
        lambda f: (f / "DONE").write_text("{"), DataError, "DONE cannot be read",
    ),
    "damaged provenance": (
        lambda f: (f / "provenance.json").write_text("[]"),
        DataError,
        "provenance.json is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_run_directories_are_refused_in_words(make_run, name):
    folder = make_run()
    spoil, kind, message = BAD[name]
    spoil(folder)
    with pytest.raises(kind, match=message) as caught:
        make_report(folder, None)
    assert str(folder) in str(caught.value)
    assert not (folder / "report.html").exists()


def test_pages_that_cannot_be_written_are_refused(make_run, tmp_path):
    folder = make_run()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "x_figures").write_text("mine")
    for name, message in {
        "config.toml": "the name of a page ends in .html",
        "gone/x.html": "there is no folder",
        "folder.html": "it is a folder",
        "x.html": "Cannot write the figures in .*x_figures: File exists",
    }.items():
        with pytest.raises(OutputError, match=message):
            make_report(folder, None, page=tmp_path / name)
    assert (tmp_path / "x_figures").read_text() == "mine"
    assert not (tmp_path / "x.html").exists()


def test_missing_data_say_how_to_do_without(make_run, comms):
    folder = make_run()
    with pytest.raises(NodepintError, match="no prepared data at no<where>.*`--no-model` makes"):
        make_report(folder, comms)


def test_runs_are_compared_by_what_differs(make_run, tmp_path):
    one = make_run("one")
    other = make_run(
        "other", width=16, records=[record(5), record(25, loss=0.75)],
        done=DONE | {"test_loss": 0.25, "test_accuracy": 0.9},
    )  # fmt: skip
    page, as_json = tmp_path / "both.html", tmp_path / "both.json"
    options = "--out", str(page), "--json", str(as_json)
    done = CliRunner().invoke(compare_command, [str(one), str(other), *options])
    assert done.exit_code == 0, done.output
    result = json.loads(as_json.read_text())
    assert result["runs"] == ["one", "other"]
    assert result["config"] == {"network.width": [8, 16]}
    assert result["results"]["ranks"] == ["2, 4 (2 x 2)"] * 2
    assert result["results"]["test_loss"] == [0.625, 0.25]
    assert result["results"]["test_accuracy"] == [None, 0.9]
    assert "  network.width  8    16" in done.output.splitlines()
    page = Page(page)
    assert page.table("key") == {"network.width": ["8", "16"]}
    assert page.table("quantity")["test_accuracy"] == ["-", "0.9"]
    names = {path.stem for path in (tmp_path / "both_figures").iterdir()}
    assert names == {"loss_by_step", "loss_by_seconds"} and len(page.images) == 2
    assert "Estimated from the reported steps: one, other." in page.text


def test_runs_that_do_not_differ_and_single_ones(make_run):
    one, same = make_run("one"), make_run("same")
    assert "The configs do not differ" in format_comparison(compare_runs([one, same]))
    with pytest.raises(ConfigError, match="got 1 run; it needs at least two"):
        compare_runs([one])
    with pytest.raises(ConfigError, match="gone is not a run directory"):
        compare_runs([one, one.with_name("gone")])


def test_labels_take_as_much_of_the_path_as_tells_runs_apart(tmp_path):
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert label_runs([a, b]) == ["a/run", "b/run"]
    assert label_runs([a, b.with_name("other")]) == ["run", "other"]
    assert len(set(label_runs([a, a]))) == 2
