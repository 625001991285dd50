"""Datasets to prepare: the repository's recipes in a folder of the test's own."""

import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of datasets with the repository's recipes, unprepared."""
    for recipe in REPOSITORY.glob("data/*/prepare.py"):
        (tmp_path / "data" / recipe.parent.name).mkdir(parents=True)
        shutil.copy(recipe, tmp_path / "data" / recipe.parent.name)
    (tmp_path / "tools").mkdir()
    shutil.copy(REPOSITORY / "tools" / "sph.py", tmp_path / "tools")  # which one of them uses
    return tmp_path / "data"
