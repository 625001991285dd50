"""One throwaway SLURM cluster for all tests of this folder."""

import importlib.util
import os
import shutil

import pytest

from tests.cli.small_case import Case, make_case
from tests.jobs.real_slurm import TOOL, Repository, cluster


def _missing() -> list[str]:
    spec = importlib.util.spec_from_file_location("slurm_cluster", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.missing()


@pytest.fixture(scope="session")
def slurm():
    """A cluster of two nodes. Where there can be none its tests are skipped, but not in CI."""
    lacks = _missing()
    able = os.geteuid() == 0 and shutil.which("apt-get") is not None
    if lacks and not (os.environ.get("CI") == "true" and able):
        pytest.skip(f"no SLURM to test with: this machine lacks {', '.join(lacks)}")
    with cluster(2) as running:
        yield running


@pytest.fixture(scope="session")
def case(tmp_path_factory) -> Case:
    """Nothing is written into it."""
    return make_case(tmp_path_factory.mktemp("case"))


@pytest.fixture
def repository(slurm, tmp_path):
    """Make a folder from which jobs can be submitted."""

    def make(**options) -> Repository:
        return Repository(slurm, tmp_path / "repository", **options)

    return make
