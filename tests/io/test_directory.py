"""Where a run may write: names, folders of other kinds, and two writers."""

import pytest

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.data.prepare import prepare_dataset
from nodepint_mpi.data.sources import find_folder
from nodepint_mpi.errors import CheckpointError, ConfigError, DataError, OutputError
from nodepint_mpi.io.directory import CHECKPOINTS, CONFIG, check_directory, writing_in
from nodepint_mpi.io.records import JSON_LINES, Records
from tests.training.small_config import small_config

pytestmark = pytest.mark.mpi(max_size=1)
NO_NAMES = ["..", ".", "...", "", "a/b", "/a", "a\\b", "a\n", "a\0b", "a b", "x" * 201]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_run_s_name_is_one_component_of_a_path(name, tmp_path):
    text = small_config(tmp_path, 'method = "serial"')
    with pytest.raises(ConfigError, match="run.name.*must be a name"):
        parse_config(text, {"run.name": name})
    with pytest.raises(DataError, match="a dataset's name is|there is no recipe"):
        prepare_dataset(name, root=tmp_path)


def test_names_with_dots_are_names(tmp_path):
    for name in ("a.b", ".a", "..a", "run-1_2"):
        text = small_config(tmp_path, 'method = "serial"')
        assert parse_config(text, {"run.name": name}).run.name == name


@pytest.mark.parametrize("source", ["", ".", "..", "../..", "/", " ", "a\nb", "hub:", "hub:../.."])
def test_a_source_names_something(source, tmp_path):
    with pytest.raises(ConfigError, match="is empty: give"):
        parse_config(small_config(tmp_path, 'method = "serial"'), {"data.source": source})


def test_the_advice_for_missing_data_is_a_name(tmp_path, monkeypatch):
    (tmp_path / "set" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="run `nodepint data prepare set`"):
        find_folder("set/x/..")


def test_a_folder_of_other_files_is_never_written_in(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for resume, kind in ((False, "is not empty"), (True, "is not a run directory")):
        with pytest.raises(OutputError, match=kind):
            check_directory(tmp_path, resume=resume)
        with pytest.raises(OutputError, match=kind), writing_in(tmp_path, resume=resume):
            pass
    for below in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "run"):
        with pytest.raises(OutputError, match="is a file, or below one"):
            check_directory(below, resume=False)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_lock_alone_does_not_make_a_run_directory(tmp_path):
    folder = tmp_path / "runs" / "a"
    with writing_in(folder, resume=False):
        pass
    check_directory(folder, resume=False)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        check_directory(folder, resume=True)
    (folder / CHECKPOINTS).mkdir()
    (folder / CONFIG).write_text("")
    with writing_in(folder, resume=True):
        pass


def test_records_that_another_program_took_away_are_missed(tmp_path):
    with Records(tmp_path) as first:
        for step in range(1, 6):
            first.append(step, loss=1.0 / step)
        first.write_table()
        with Records(tmp_path, resume_step=2):  # drops what is later, as a second job would
            pass
        first.append(6, loss=0.1)
        with pytest.raises(OutputError, match=f"{JSON_LINES} holds 2 records.*expected the 6"):
            first.write_table()
