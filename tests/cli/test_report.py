"""`nodepint report` of a run that was trained: a page that needs no other file, and its numbers."""

import shutil
import tomllib

import pytest

from nodepint_mpi.errors import CheckpointError
from nodepint_mpi.io import seal
from nodepint_mpi.parallel.comms import alone as this_rank
from nodepint_mpi.parallel.comms import make_comms
from nodepint_mpi.report.sections import make_report
from tests.cli.small_case import alone, checkpoints, read_json, read_metrics
from tests.report.page_reader import Page

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(300)]


def test_a_page_of_a_run(trained, runs, tmp_path):
    run = trained(2)
    done = alone("report", run, "--out", "page.html", "--json", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result, final = read_json(tmp_path / "r.json"), read_json(runs / "2.json")
    page = Page(tmp_path / "page.html")
    assert page.titles == result["sections"]
    assert {"Loss", "Sweeps", "Jumps and adjoint residual", "Trajectories"} <= set(page.titles)
    files = sorted((tmp_path / "page_figures").iterdir())
    assert done.stdout == f"page.html: {len(files)} figures\n"
    assert sorted(page.images) == sorted(path.read_bytes() for path in files)
    assert page.links == []
    for name in ("loss", "relative_error"):
        assert result["test_scores"][name] == pytest.approx(final[f"test_{name}"], rel=1e-8)
    shown = page.table("quantity")
    assert float(shown["train loss"][0]) == pytest.approx(read_metrics(run)[-1]["loss"], rel=1e-5)
    assert shown["ranks of every start"] == ["2"]
    config = tomllib.loads((run / "config.toml").read_text())
    assert page.table("key")["time.fine.n_steps"] == [str(config["time"]["fine"]["n_steps"])]
    assert page.table("file").keys() == {path.name for path in checkpoints(run)}
    assert "step 20 of 20" in page.text  # the log


def test_a_checkpoint_of_another_format_is_refused(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained(2), run)
    newest = checkpoints(run)[-1]
    with monkeypatch.context() as later:
        later.setattr(seal, "FORMAT", 9)
        seal.write_seal(newest, seal.Seal(newest.stat().st_size, (), "0" * 32))
    with pytest.raises(CheckpointError, match="has format 9.*`--no-model` makes the report"):
        make_report(run, make_comms(this_rank()))
    assert not (run / "report.html").exists()
