"""The loader: columns are mapped, types kept, batches independent of ranks, failures common."""

import functools
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pytest

from nodepint_mpi.data.columns import ViewColumn, open_column
from nodepint_mpi.data.datasets import (
    Split,
    batch_indices,
    check_finite,
    open_split,
    open_split_together,
)
from nodepint_mpi.data.saved import map_saved
from nodepint_mpi.errors import DataError

N_ROWS = 2500  # more than two record batches
IMAGES = np.random.default_rng(1).integers(0, 256, (N_ROWS, 4, 3), dtype=np.uint8)
STATES = np.random.default_rng(2).standard_normal((N_ROWS, 5, 2))
TIMES = np.tile(np.linspace(0, 1, 5), (N_ROWS, 1))
LABELS = np.arange(N_ROWS) % 10


@pytest.fixture(autouse=True)
def quiet_cache(shared_tmp_path, monkeypatch):
    """No progress bars, and what `datasets` converts goes to the temporary folder."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", shared_tmp_path / "cache")


@functools.cache
def make_dataset() -> datasets.DatasetDict:
    features = datasets.Features(
        image=datasets.Array2D((4, 3), "uint8"),
        label=datasets.ClassLabel(num_classes=10),
        t=datasets.List(datasets.Value("float64")),
        u=datasets.Array2D((5, 2), "float64"),
        fixed=datasets.List(datasets.Value("float64"), length=5),
        half=datasets.Value("float16"),
        even=datasets.Value("bool"),
        note=datasets.Value("string"),
    )
    columns = {"image": IMAGES, "label": LABELS, "t": TIMES, "u": STATES, "fixed": TIMES}
    columns |= {"half": LABELS.astype(np.float16), "even": LABELS % 2 == 0}
    columns |= {"note": [str(i) for i in range(N_ROWS)]}
    whole = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict({"train": whole, "test": whole.select(range(7))})


@pytest.fixture
def folder(comm, shared_tmp_path) -> Path:
    """A saved dataset that all ranks see."""
    path = shared_tmp_path / "digits" / "prepared"
    if comm.rank == 0:
        make_dataset().save_to_disk(str(path))
    comm.barrier()
    return path


def test_rows_come_by_index_in_the_stored_type_and_shape(folder):
    split = open_split(str(folder), "train", ["image", "label", "t", "u", "fixed", "half"])
    assert split.n_rows == N_ROWS
    index = np.array([2499, 0, 1000, 999, 0, 1777])
    expected = {"image": IMAGES, "label": LABELS, "t": TIMES, "u": STATES, "fixed": TIMES}
    expected["half"] = LABELS.astype(np.float16)
    for name, truth in expected.items():
        taken = split.take(name, index)
        assert taken.dtype == truth.dtype == split.column(name).dtype
        assert split.column(name).shape == truth.shape[1:]
        np.testing.assert_array_equal(taken, truth[index])


def test_many_rows_and_no_rows(folder):
    split = open_split(folder, "train", ["u"])
    everything = np.random.default_rng(3).permutation(N_ROWS)
    np.testing.assert_array_equal(split.take("u", everything), STATES[everything])
    np.testing.assert_array_equal(split.take("u", range(N_ROWS)), STATES)
    assert split.take("u", []).shape == (0, 5, 2)


def test_columns_are_views_of_the_mapped_file(folder):
    before = pa.total_allocated_bytes()
    split = open_split(str(folder), "train", ["image", "label", "t", "u"])
    assert pa.total_allocated_bytes() == before  # Arrow holds nothing in memory of its own
    for name in ("image", "label", "t", "u"):
        column = split.column(name)
        assert isinstance(column, ViewColumn)
        assert len(column.views) == 3
        for view in column.views:
            assert not view.flags.owndata and not view.flags.writeable


def test_views_share_memory_with_the_arrow_table(folder):
    table = datasets.Dataset.load_from_disk(str(folder / "train")).data
    column = open_column("u", table.column("u"), None)
    assert isinstance(column, ViewColumn)
    for view, chunk in zip(column.views, table.column("u").chunks, strict=True):
        numbers = np.frombuffer(chunk.storage.values.values.buffers()[1], np.float64)
        assert np.shares_memory(view, numbers)


def test_what_is_taken_is_a_copy(folder):
    split = open_split(str(folder), "test", ["u"])
    split.take("u", [0])[:] = 0
    np.testing.assert_array_equal(split.take("u", [0])[0], STATES[0])


def test_booleans_are_decoded_and_text_is_refused(folder):
    split = open_split(str(folder), "train", ["even"])
    np.testing.assert_array_equal(split.take("even", [0, 1, 2]), [True, False, True])
    with pytest.raises(DataError, match="'note'.*string"):
        open_split(str(folder), "train", ["note"])


def test_a_selection_counts_its_own_rows(monkeypatch):
    chosen = datasets.DatasetDict({"train": make_dataset()["train"].select([5, 3])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: chosen)
    split = open_split("hub:a/b", "train", ["u"])
    assert split.n_rows == 2
    np.testing.assert_array_equal(split.take("u", [1, 0]), STATES[[3, 5]])


def test_sliced_chunks_start_where_they_should():
    nested = pa.array([[[1.0, 2.0], [3.0, 4.0]]] * 2 + [[[5.0, 6.0], [7.0, 8.0]]] * 2)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8.0)), 2)
    for whole in (nested, fixed, nested.cast(pa.list_(pa.large_list(pa.float64())))):
        column = open_column("x", pa.chunked_array([whole[1:3], whole[:0], whole[3:]]), None)
        np.testing.assert_array_equal(
            column.take(np.array([0, 1, 2])), np.array(whole.to_pylist())[1:]
        )


def test_a_folder_in_hub_layout(comm, shared_tmp_path):
    path = shared_tmp_path / "own"
    if comm.rank == 0:
        (path / "data").mkdir(parents=True)
        for split, part in make_dataset().items():
            part.to_parquet(path / "data" / f"{split}-00000-of-00001.parquet")
    split = open_split_together(comm, str(path), "train", ["u", "image"])
    assert split.column("u").dtype == np.float64
    np.testing.assert_array_equal(split.take("u", [2000, 1]), STATES[[2000, 1]])
    np.testing.assert_array_equal(split.take("image", [2000, 1]), IMAGES[[2000, 1]])


def test_the_hub_is_asked_and_its_images_are_decoded(monkeypatch):
    features = datasets.Features(image=datasets.Image())
    rows = [{"bytes": png(image), "path": None} for image in IMAGES[:9]]
    part = datasets.Dataset.from_dict({"image": rows}, features=features)
    hub = datasets.DatasetDict({"test": part})
    asked = []

    def load_dataset(name):
        asked.append(name)
        return hub

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    split = open_split("hub:ylecun/mnist", "test", ["image"])
    assert asked == ["ylecun/mnist"]
    assert split.column("image").shape == (4, 3)
    np.testing.assert_array_equal(split.take("image", [8, 0, 3]), IMAGES[[8, 0, 3]])


def test_the_hub_out_of_reach(monkeypatch):
    def load_dataset(name):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="hub:a/b .no route.; without a network") as caught:
        open_split("hub:a/b", "test", ["image"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([{"bytes": b"not an image", "path": None}], "row 0 .*cannot be decoded"),
        ([None], "row 0 .*missing"),
    ],
)
def test_an_image_that_cannot_be_decoded(cells, reason):
    data = pa.chunked_array([pa.array(cells, datasets.Image().pa_type)])
    with pytest.raises(DataError, match=reason):
        open_column("image", data, datasets.Image())


def test_an_image_of_another_size():
    cells = [{"bytes": png(image), "path": None} for image in (IMAGES[0], IMAGES[1][:2])]
    data = pa.chunked_array([pa.array(cells, datasets.Image().pa_type)])
    column = open_column("image", data, datasets.Image())
    with pytest.raises(DataError, match=r"row 1 .*\(2, 3\).*row 0 is uint8 of shape \(4, 3\)"):
        column.take(np.array([0, 1]))


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("index", [[-1], [N_ROWS], [0, 10**12], [0.0], [[0]], [True]])
def test_an_index_that_is_no_row(folder, index):
    split = open_split(str(folder), "train", ["u"])
    with pytest.raises(DataError, match="row"):
        split.take("u", np.array(index))


def test_a_missing_split_or_column_is_told_with_those_there(folder):
    with pytest.raises(DataError, match="no split 'tset'.*'train', 'test'.*mean 'test'"):
        open_split(str(folder), "tset", ["u"])
    with pytest.raises(DataError, match="no column 'lable'.*'image'.*mean 'label'.*'train'"):
        open_split(str(folder), "train", ["lable"])
    with pytest.raises(DataError, match="no column 't'"):
        open_split(str(folder), "train", ["u"]).column("t")


def test_missing_data_come_with_the_command_that_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = tmp_path / "data" / "my_waves"
    known.mkdir(parents=True)
    (known / "prepare.py").touch()
    for source in ("my_waves", "my_wave", str(known), str(known / "prepared"), known):
        with pytest.raises(DataError, match="run `nodepint data prepare my_waves`"):
            open_split(source, "train", ["u"])
    own = tmp_path / "elsewhere" / "mine"
    own.mkdir(parents=True)
    (own / "prepare.py").touch()
    with pytest.raises(DataError, match=f"nodepint data prepare {own / 'prepare.py'}`"):
        open_split(str(own / "prepared"), "train", ["u"])


def test_a_name_stands_for_its_prepared_folder(folder, monkeypatch, shared_tmp_path, comm):
    if comm.rank == 0:
        shutil.copytree(folder.parent, shared_tmp_path / "data" / "digits")
    comm.barrier()
    monkeypatch.chdir(shared_tmp_path)
    for source in ("digits", "data/digits", "data/digits/prepared"):
        assert open_split(source, "train", ["u"]).n_rows == N_ROWS


def ragged(*rows) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(row) for row in rows])


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (ragged([[1.0], [1.0, 2.0]]), "lists of 1 to 2 entries"),
        (ragged([[1.0]], [[1.0, 2.0]]), r"rows 1 to 1"),
        (ragged([1.0, None]), "1 values are missing"),
        (ragged([[1.0], [None]]), "1 values are missing"),
        (ragged([[], []]), "missing|empty|null"),
        (ragged([{"a": 1}]), "struct"),
    ],
)
def test_a_column_that_is_no_array(cells, reason):
    with pytest.raises(DataError, match=f"'x'.*({reason})"):
        open_column("x", cells, None)


def test_no_rows_are_an_error(monkeypatch):
    empty = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"u": []})})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: empty)
    with pytest.raises(DataError, match="'train'.*no rows"):
        open_split("hub:a/b", "train", ["u"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_found(tmp_path, bad):
    states = STATES.copy()
    states[1234, 3, 1] = bad
    features = datasets.Features(u=datasets.Array2D((5, 2), "float64"), n=datasets.Value("int64"))
    part = datasets.Dataset.from_dict({"u": states, "n": LABELS}, features=features)
    part.save_to_disk(str(tmp_path / "d"))
    split = open_split(tmp_path / "d", "train", ["u", "n"])
    check_finite(split, ["n"])
    with pytest.raises(DataError, match=rf"row 1234 of column 'u' holds {bad} at \[3, 1\]"):
        check_finite(split, ["n", "u"])


def test_finite_numbers_pass(folder):
    split = open_split(folder, "train", ["u", "image", "even", "half"])
    check_finite(split, ["u", "image", "even", "half"])


def test_a_cut_arrow_file_is_an_error(tmp_path):
    make_dataset().save_to_disk(str(tmp_path / "d"))
    (file,) = (tmp_path / "d" / "train").glob("*.arrow")
    content = file.read_bytes()
    for damaged in (b"", b"\0" * len(content), content[:100], content[: len(content) // 2]):
        file.unlink()  # a new file: the old one may still be mapped
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            open_split(tmp_path / "d", "train", ["u"])


def test_damage_against_the_recorded_sizes_and_checksums(tmp_path):
    place = tmp_path / "d" / "prepared"
    make_dataset().save_to_disk(str(place))
    (file,) = (place / "test").glob("*.arrow")
    name = str(file.relative_to(place))
    record = {"files": {name: {"bytes": file.stat().st_size, "sha256": "0" * 64}}}
    (place / "provenance.json").write_text(json.dumps(record))
    open_split(place, "test", ["u"])
    with pytest.raises(DataError, match="damaged.*SHA-256.*nodepint data prepare d --force"):
        open_split(place, "test", ["u"], verify=True)
    with file.open("ab") as opened:
        opened.write(b"\0")
    with pytest.raises(DataError, match=r"damaged: \d+ bytes instead of"):
        open_split(place, "test", ["u"])
    file.unlink()
    with pytest.raises(DataError, match="arrow is missing"):
        open_split(place, "test", ["u"])
    (place / "provenance.json").write_text("{")
    with pytest.raises(DataError, match="provenance.json is damaged"):
        open_split(place, "test", ["u"])


def test_all_ranks_open_the_same_files(comm, folder):
    split = open_split_together(comm, str(folder), "train", ["u", "label"])
    rows = batch_indices(7, comm.size, 32, split.n_rows)
    everywhere = comm.allgather((split.n_rows, split.take("u", rows).tobytes()))
    assert set(everywhere) == {(N_ROWS, STATES[rows].tobytes())}


def test_a_failure_on_any_rank_is_everybodys(comm, folder):
    for failing in range(comm.size):
        source = str(folder) if comm.rank != failing else str(folder) + "-not-here"
        with pytest.raises(DataError, match="digits") as caught:
            open_split_together(comm, source, "train", ["u"])
        assert len(set(comm.allgather(str(caught.value)))) == 1
        assert ("(on rank" in str(caught.value)) == (failing > 0)


def test_batches_of_an_epoch_are_disjoint_and_drop_the_rest():
    for n_rows, batch_size in [(10, 3), (64, 16), (101, 10), (5, 4), (3, 1)]:
        n_batches = n_rows // batch_size
        epochs = []
        for epoch in range(3):
            steps = range(epoch * n_batches, (epoch + 1) * n_batches)
            rows = np.concatenate([batch_indices(5, step, batch_size, n_rows) for step in steps])
            assert len(rows) == n_batches * batch_size == len(set(rows.tolist()))
            assert rows.min() >= 0 and rows.max() < n_rows
            epochs.append(tuple(rows.tolist()))
        if n_rows > 10:
            assert len(set(epochs)) == 3


def test_a_batch_of_all_rows_is_in_natural_order():
    for step in (0, 1, 99):
        np.testing.assert_array_equal(batch_indices(3, step, 12, 12), np.arange(12))


def test_batches_depend_on_seed_and_step_alone():
    steps = [0, 500, 3, 3, 77, 0]
    first = [batch_indices(2**40 + 1, step, 8, 100).copy() for step in steps]
    again = [batch_indices(2**40 + 1, step, 8, 100) for step in reversed(steps)]
    for one, other in zip(first, reversed(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first[0], batch_indices(1, 0, 8, 100))
    assert not batch_indices(1, 0, 8, 100).flags.writeable


def test_batches_are_the_same_in_another_process(comm):
    own = batch_indices(11, 123, 8, 1000).tolist()
    assert comm.allgather(own) == [own] * comm.size
    # The recorded output of Philox 4x64, sorted: NumPy promises it for all versions.
    raw = np.random.Philox(key=np.array([11, 0], dtype=np.uint64)).random_raw(1000)
    expected = sorted(range(1000), key=lambda row: raw[row])[123 % 125 * 8 :][:8]
    assert own == expected


def test_every_row_is_drawn_equally_often():
    counts = np.zeros(20)
    for step in range(4 * 1000):
        counts[batch_indices(0, step, 5, 20)] += 1
    assert (counts == 1000).all()
    firsts = np.bincount([batch_indices(0, 4 * e, 1, 4)[0] for e in range(2000)], minlength=4)
    assert (abs(firsts - 500) < 100).all()  # 5 standard deviations


@pytest.mark.parametrize(
    ("seed", "step", "batch_size", "n_rows", "reason"),
    [
        (0, 0, 0, 10, "batch of 0"),
        (0, 0, 11, 10, "from 1 to 10"),
        (-1, 0, 5, 10, "negative"),
        (0, -1, 5, 10, "negative"),
        (2**64, 0, 5, 10, "below"),
    ],
)
def test_a_batch_that_cannot_be_drawn(seed, step, batch_size, n_rows, reason):
    with pytest.raises(DataError, match=reason):
        batch_indices(seed, step, batch_size, n_rows)


def test_a_split_knows_its_columns(folder):
    split = open_split(folder, "test", ["u", "t"])
    assert isinstance(split, Split) and list(split.columns) == ["u", "t"] and split.n_rows == 7


@pytest.mark.mpi(max_size=1)
def test_preparing_needs_neither_mpi_nor_jax():
    code = (
        "import sys, nodepint_mpi.data.prepare;"
        "print([name for name in ('mpi4py', 'jax') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.mpi(max_size=1)
def test_numbers_are_mapped_without_loading_the_dataset_library(tmp_path):
    series = datasets.Dataset.from_dict({"t": [[1.0], [2.0, 3.0]], "label": [3, 4]})
    datasets.DatasetDict({"train": series}).save_to_disk(str(tmp_path / "saved"))
    script = (
        "import sys\n"
        "from nodepint_mpi.data.datasets import open_split\n"
        "split = open_split(sys.argv[1], 'train', ['t', 'label'], series=['t'])\n"
        "print(split.take('t', [1]).tolist(), split.take('label', [0, 1]).tolist())\n"
        "print(sorted({'datasets', 'pandas'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "saved"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["[[2.0, 3.0]] [3, 4]", "[]"], done.stderr


@pytest.mark.mpi(max_size=1)
def test_what_is_more_than_numbers_is_left_to_the_dataset_library(tmp_path):
    made = datasets.Dataset.from_dict({"x": [1.0, 2.0, 3.0]})
    datasets.DatasetDict({"train": made.select([2, 0])}).save_to_disk(str(tmp_path / "a"))
    assert map_saved(tmp_path / "a") is None or open_split(tmp_path / "a", "train", ["x"]).take(
        "x", [0, 1]
    ).tolist() == [3.0, 1.0]
    image = datasets.Dataset.from_dict(
        {"x": [{"path": None, "bytes": b""}]}, features=datasets.Features(x=datasets.Image())
    )
    datasets.DatasetDict({"train": image}).save_to_disk(str(tmp_path / "b"))
    assert map_saved(tmp_path / "b") is None
