"""A tiny data set and a way to start `nodepint` on some ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.small_case import QUICK, Case, free_env, has_one_message, make_case

CASES = Path(__file__).with_name("run_cases.py")


@pytest.fixture(scope="session")
def case(tmp_path_factory) -> Case:
    """Nothing is written into it."""
    return make_case(tmp_path_factory.mktemp("case"))


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


@pytest.fixture
def refusals(tmp_path_factory):
    """`refusals(folder, [words, ...])`: what each command says that is typed there, one after the
    other in one process without mpirun; that it ends with 2 and leaves the folder as it was."""

    def run(folder: Path, commands: list[list[str]]) -> list[str]:
        notes = tmp_path_factory.mktemp("refusals")
        cases = notes / "cases.json"
        cases.write_text(json.dumps(dict(enumerate(commands))))
        done = subprocess.run(
            [sys.executable, CASES, cases, notes], cwd=folder, stdin=subprocess.DEVNULL,
            env=free_env() | {"PYTHONPATH": str(CASES.parents[2])}, capture_output=True, text=True,
            timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        noted = [json.loads((notes / f"{i}.0.json").read_text()) for i in range(len(commands))]
        for one in noted:
            assert one["code"] == 2, one["said"]
            assert one["after"] == one["before"]
        return [one["said"] for one in noted]

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
