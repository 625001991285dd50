"""A tiny data set, made by the command itself, and a way to start `nodepint` on some ranks."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.small_case import CONFIG, QUICK, RECIPE, alone, has_one_message


class Case(NamedTuple):
    """Where the tests of this folder find their data and config; nothing is written there."""

    folder: Path
    config: Path
    prepared: dict


@pytest.fixture(scope="session")
def case(tmp_path_factory) -> Case:
    """Data of four trajectories, prepared by `nodepint data prepare`, and a config that fits."""
    folder = tmp_path_factory.mktemp("case")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "prepare.py").write_bytes(RECIPE.read_bytes())
    sizes = "n_train=4", "n_test=2", "n_obs=15", "horizon=3.5"
    options = [word for size in sizes for word in ("--set", size)]
    done = alone("data", "prepare", "tiny/prepare.py", *options, "--json", "p.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    config = folder / "tiny.toml"
    config.write_text(CONFIG.replace("SOURCE", str(folder / "tiny")))
    return Case(folder, config, json.loads((folder / "p.json").read_text()))


@pytest.fixture
def nodepint(mpirun, tmp_path):
    """`nodepint(2, "train", ...)` under mpirun, in the test's folder; notes each rank's pid."""
    note = 'echo $$ > "rank-${OMPI_COMM_WORLD_RANK:-$PMI_RANK}.pid"; exec "$@"'
    command = ["sh", "-c", note, "sh", sys.executable, "-m", "nodepint_mpi"]

    def run(n_ranks: int, *arguments, cwd: Path = tmp_path, code: int | None = 0):
        done = mpirun(n_ranks, *command, *arguments, cwd=cwd, env=QUICK, timeout_s=280)
        said = done.stdout + done.stderr
        assert code is None or done.returncode == code, said
        if code not in (0, None):
            assert has_one_message(said), said
        return done

    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where the 20-step runs are kept, so that each is made once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(case, nodepint, runs):
    """The run directory of 20 steps on some ranks."""

    def train(n_ranks):
        run = runs / str(n_ranks)
        if not run.exists():
            result = "--json", runs / f"{n_ranks}.json"
            done = nodepint(n_ranks, "train", case.config, "--out", run, *result)
            (runs / f"{n_ranks}.txt").write_text(done.stdout + done.stderr)
        return run

    return train
