"""The package as a whole: its names, and what its metadata promise."""

import tomllib
from pathlib import Path

import pytest

import nodepint_mpi

pytestmark = pytest.mark.mpi(max_size=1)

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def test_all_public_names_are_listed_and_there():
    assert {"solve", "train", "load_model", "__version__"} <= set(dir(nodepint_mpi))
    assert dir(nodepint_mpi) == sorted(nodepint_mpi.__all__)
    assert [name for name in nodepint_mpi.__all__ if not hasattr(nodepint_mpi, name)] == []


def test_extras_are_as_the_groups_of_a_clone():
    extras, groups = PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]
    assert {"docs", "tensorboard", "wandb", "mlflow", "test"} <= extras.keys()
    assert extras["docs"] == groups["docs"]
    assert set(extras["test"]) <= set(groups["dev"])
    assert set(extras["tensorboard"]) <= set(groups["dev"])
