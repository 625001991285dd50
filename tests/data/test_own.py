"""Data made by a function: once for all ranks, kept by what it depends on, refused if of no use."""

import contextlib
import os
import shutil

import numpy as np
import pytest

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.data.datasets import open_split
from nodepint_mpi.data.own import share_own_data
from nodepint_mpi.errors import ConfigError, DataError

CODE = """
import os
import datasets
import numpy as np

def make(n=2, scale=1.0):
    with open("calls", "a") as file:
        file.write(f"{os.getpid()}\\n")
    times = np.tile(np.linspace(0, 1, 3), (n, 1))
    states = scale * np.arange(n * 3 * 2, dtype="float64").reshape(n, 3, 2)
    labels = np.arange(n, dtype="int32")
    rows = {"t": times, "u": states, "k": labels, "x": np.zeros((n, 2, 2, 2), "uint8")}
    return {"train": rows, "test": {name: a[:1] for name, a in rows.items()}}

def hugging(n=1):
    part = datasets.Dataset.from_dict({"k": [1] * n})
    return datasets.DatasetDict(train=part)

def failing():
    raise ValueError("the reason")

def nothing():
    return None

def uneven():
    return {"train": {"t": np.zeros((2, 3)), "u": np.zeros((3, 3))}}

def words():
    return {"train": {"t": np.array(["a"])}}

def holed():
    return {"train": {"t": np.array([[0.0, np.nan]])}}

value = 3
"""


@pytest.fixture
def make(comm, shared_tmp_path):
    """`make(source, **options)`: the folder, on all ranks, in a working directory of its own."""
    if comm.rank == 0:
        (shared_tmp_path / "own.py").write_text(CODE)
    comm.Barrier()

    def run(source, text="", **options):
        config = parse_config(
            f"""
            run = {{ name = "x" }}
            data = {{ source = "{source}", input = "u", target = "u" }}
            time = {{ horizon = [0.0, 1.0], n_slices = 4, method = "serial",
                      fine = {{ solver = "rk4", n_steps = 1 }} }}
            """.replace(",\n", ","),
            [f"data.options.{name}={value}" for name, value in options.items()],
        )
        made = share_own_data(comm, config)
        assert made.data is not None and made.data.options == {}
        return made.data.source

    with contextlib.chdir(shared_tmp_path):
        yield run
        comm.Barrier()


def test_the_data_are_made_once_and_again_where_something_has_changed(make, comm):
    first, again, other = make("own.py:make"), make("own.py:make"), make("own.py:make", n=3)
    comm.Barrier()
    with open("calls") as file:
        calls = file.read().split()
    assert len(calls) == 2 and (str(os.getpid()) in calls) == (comm.rank == 0)
    assert first == again != other
    assert comm.allgather(first) == [first] * comm.size
    assert first.startswith("data/made/own-")
    split = open_split(first, "train", ["t", "u", "k", "x"], verify=True)
    wanted = np.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(split.take("u", np.array([1, 0])), wanted[::-1])
    assert {name: c.dtype.name for name, c in split.columns.items()} == {
        "t": "float64", "u": "float64", "k": "int32", "x": "uint8"
    }  # fmt: skip
    assert split.column("x").shape == (2, 2, 2)
    assert open_split(other, "train", ["k"]).n_rows == 3
    assert open_split(other, "test", ["k"]).n_rows == 1


def test_a_dataset_is_taken_as_it_is(make):
    assert open_split(make("own.py:hugging"), "train", ["k"]).n_rows == 1


def test_a_folder_is_no_function(comm):
    config = parse_config(
        'run = { name = "x" }\ndata = { source = "hub:a/b", input = "u", target = "u" }\n'
        'time = { horizon = [0.0, 1.0], n_slices = 4, method = "serial", '
        'fine = { solver = "rk4", n_steps = 1 } }'
    )
    assert share_own_data(comm, config) is config


@pytest.mark.parametrize(
    "source, message",
    [
        ("own.py:failing", r"own\.py:failing failed: ValueError: the reason"),
        ("own.py:nothing", r"must return a datasets\.DatasetDict, or columns .* given NoneType"),
        ("own.py:uneven", r"split 'train': columns need equally many rows.*'t': 2, 'u': 3"),
        ("own.py:words", r"split 'train': column 't' must hold real numbers"),
        ("own.py:holed", r"row 0 of column 't' holds nan at \[1\]"),
        ("own.py:value", "must name a function"),
        ("own.py:gone", r"own\.py has nothing named 'gone'"),
        ("gone.py:make", r"`data\.source`: there is no file gone\.py"),
    ],
)
def test_what_makes_no_data_is_told_on_all_ranks(make, source, message):
    with pytest.raises((ConfigError, DataError), match=message):
        make(source)
    assert not os.path.exists("data/made") or not os.listdir("data/made")


def test_options_have_the_types_of_their_defaults(make):
    with pytest.raises(DataError, match=r"option 'n' must be of type int.*'two'"):
        make("own.py:make", n='"two"')
    with pytest.raises(DataError, match=r"no option 'm' .*'n', 'scale'.* for own\.py:make"):
        make("own.py:make", m=1)


def test_data_that_are_gone_are_told_from_data_to_prepare(make, comm):
    folder = make("own.py:make")
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)
    comm.Barrier()
    with pytest.raises(DataError, match="made by the function that the config named"):
        open_split(folder, "train", ["u"])
