"""Preparing: recipes run once, and failures leave things as they were.

Preparing is local, a step before the job: one process tests it.
"""

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from nodepint_mpi.data.datasets import check_finite, open_split
from nodepint_mpi.data.prepare import prepare_dataset
from nodepint_mpi.errors import DataError

REPOSITORY_DATA = Path(__file__).parents[2] / "data"
pytestmark = pytest.mark.mpi(max_size=1)

SMALL = {"n_train": 3, "n_test": 2, "n_obs": 11}

TOY = """
import datasets
def prepare(folder, *, n_rows: int = 4, scale: float = 1.0, loud: bool = False, name: str = "a"):
    runs = folder / "runs"
    runs.write_text((runs.read_text() if runs.exists() else "") + "x")
    features = datasets.Features(u=datasets.List(datasets.Value("float64"), length=2))
    rows = [[scale * i, 1.0] for i in range(n_rows)]
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"u": rows}, features=features))
"""


def add_recipe(root: Path, name: str, text: str) -> Path:
    (root / name).mkdir(exist_ok=True)
    (root / name / "prepare.py").write_text(text)
    return root / name


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_second_run_does_nothing_and_force_makes_it_again(root, caplog):
    folder = add_recipe(root, "toy", TOY)
    caplog.set_level("INFO", "nodepint_mpi")
    assert prepare_dataset("toy", root=root) == folder / "prepared"
    assert "toy prepared: 4 rows train" in caplog.text
    before = snapshot(folder)
    caplog.clear()
    assert prepare_dataset("toy", root=root, options={"n_rows": "4"}) == folder / "prepared"
    assert "already prepared" in caplog.text
    assert snapshot(folder) == before and (folder / "runs").read_text() == "x"
    prepare_dataset("toy", root=root, force=True)
    assert (folder / "runs").read_text() == "xx"
    assert sorted(path.name for path in folder.iterdir()) == ["prepare.py", "prepared", "runs"]


def test_other_options_or_another_recipe_need_force(root):
    folder = add_recipe(root, "toy", TOY)
    prepare_dataset("toy", root=root)
    before = snapshot(folder)
    with pytest.raises(DataError, match="other options .n_rows 4, now 5.*--force"):
        prepare_dataset("toy", root=root, options={"n_rows": 5})
    assert snapshot(folder) == before
    add_recipe(root, "toy", TOY + "# changed\n")
    with pytest.raises(DataError, match="another version of its recipe.*--force"):
        prepare_dataset("toy", root=root)
    prepare_dataset("toy", root=root, options={"n_rows": 5}, force=True)
    assert open_split(folder, "train", ["u"]).n_rows == 5


def test_damage_is_found_before_saying_that_all_is_done(root):
    folder = add_recipe(root, "toy", TOY)
    place = prepare_dataset("toy", root=root)
    (file,) = place.rglob("*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged.*prepare toy --force|damaged.*toy/prepare.py"):
        prepare_dataset("toy", root=root)
    (place / "provenance.json").unlink()
    with pytest.raises(DataError, match="no valid provenance.json.*--force"):
        prepare_dataset("toy", root=root)
    prepare_dataset("toy", root=root, force=True)
    assert open_split(folder, "train", ["u"], verify=True).n_rows == 4


def test_readers_keep_the_files_they_have_mapped(root):
    add_recipe(root, "toy", TOY)
    split = open_split(prepare_dataset("toy", root=root), "train", ["u"])
    prepare_dataset("toy", root=root, options={"scale": 9.0}, force=True)
    np.testing.assert_array_equal(split.take("u", [3]), [[3.0, 1.0]])


def test_provenance_tells_how_the_data_were_made(root):
    add_recipe(root, "toy", TOY)
    place = prepare_dataset("toy", root=root, options={"scale": "2.5", "loud": "true"})
    record = json.loads((place / "provenance.json").read_text())
    assert record["options"] == {"n_rows": 4, "scale": 2.5, "loud": True, "name": "a"}
    assert record["recipe_sha256"] == hashlib.sha256(TOY.encode()).hexdigest()
    assert record["rows"] == {"train": 4} and record["columns"] == {"train": ["u"]}
    assert record["versions"]["datasets"] == datasets.__version__
    assert record["files"] == {
        name: {"bytes": (place / name).stat().st_size, "sha256": digest}
        for name, digest in snapshot(place).items()
        if name != "provenance.json"
    }
    check_finite(open_split(place, "train", ["u"]), ["u"])


def test_a_recipe_by_its_path(root, tmp_path):
    folder = add_recipe(tmp_path, "mine", TOY)
    assert prepare_dataset(folder / "prepare.py") == folder / "prepared"
    assert prepare_dataset(str(folder)) == folder / "prepared"
    with pytest.raises(DataError, match="no recipe .*nowhere"):
        prepare_dataset(tmp_path / "nowhere" / "prepare.py")


def test_the_working_folders_data_come_first(root, monkeypatch):
    add_recipe(root, "digits", TOY)
    monkeypatch.chdir(root.parent)
    assert prepare_dataset("digits") == root / "digits" / "prepared"


def test_an_unknown_name_comes_with_a_suggestion(root):
    with pytest.raises(DataError, match="no dataset 'lotka_voltera'.*mean 'lotka_volterra'"):
        prepare_dataset("lotka_voltera", root=root)
    with pytest.raises(DataError, match="no dataset ''"):
        prepare_dataset("", root=root)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n_row": 3}, "no option 'n_row'.*mean 'n_rows'"),
        ({"n_rows": 2.5}, "'n_rows' must be of type int .default 4., given 2.5"),
        ({"n_rows": "many"}, "'n_rows' must be of type int"),
        ({"n_rows": True}, "'n_rows' must be of type int"),
        ({"scale": "x"}, "'scale' must be of type float"),
        ({"loud": 1}, "'loud' must be of type bool"),
        ({"loud": "yes"}, "'loud' must be of type bool"),
        ({"name": 3}, "'name' must be of type str"),
        ({"n_rows": 0}, "no rows for split 'train'"),
        ({"scale": float("nan")}, r"row 0 of column 'u' holds nan at \[0\].*split 'train'"),
        ({"scale": "inf"}, r"row 0 of column 'u' holds nan|row 1 of column 'u' holds inf"),
    ],
)
def test_bad_options_and_bad_numbers_leave_nothing(root, options, reason):
    folder = add_recipe(root, "toy", TOY)
    with pytest.raises(DataError, match=reason):
        prepare_dataset("toy", root=root, options=options)
    assert {path.name for path in folder.iterdir()} <= {"prepare.py", "runs"}


BROKEN = [
    ("import no_such_package_here", "pip install no_such_package_here"),
    ("def prepare(folder):\n    import no_such_package_here", "pip install no_such_package_here"),
    ("def prepare(:", "cannot be loaded: SyntaxError"),
    ("x = 1", "no function `prepare"),
    ("def prepare(folder): return 3", "must return a datasets.DatasetDict"),
    ("import datasets\ndef prepare(folder): return datasets.DatasetDict()", "at least one split"),
    ("def prepare(folder): return 1 / 0", "failed: ZeroDivisionError"),
    ("def prepare(folder, *, size): return 1", "needs the option 'size'"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_a_broken_recipe_is_told_and_keeps_what_was_there(root, text, reason):
    folder = add_recipe(root, "toy", TOY)
    prepare_dataset("toy", root=root)
    before = snapshot(folder / "prepared")
    add_recipe(root, "toy", text)
    with pytest.raises(DataError, match=reason):
        prepare_dataset("toy", root=root, force=True)
    assert snapshot(folder / "prepared") == before
    assert sorted(path.name for path in folder.iterdir()) == ["prepare.py", "prepared", "runs"]


def test_a_write_that_fails_keeps_what_was_there(root, monkeypatch):
    folder = add_recipe(root, "toy", TOY)
    prepare_dataset("toy", root=root)
    before = snapshot(folder / "prepared")

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", full)
    with pytest.raises(DataError, match="cannot write.*No space left.*free some space"):
        prepare_dataset("toy", root=root, force=True)
    assert snapshot(folder / "prepared") == before
    assert sorted(path.name for path in folder.iterdir()) == ["prepare.py", "prepared", "runs"]
