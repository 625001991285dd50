"""Bad input: one clear sentence, a non-zero exit, nothing written and nothing overwritten."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest

from tests.cli.small_case import QUICK, checkpoints, damage, has_one_message, messages, sets

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(400)]

DRIVER = Path(__file__).with_name("run_cases.py")

OWN = {
    "shape.py": """
import jax.numpy as jnp

def field(key, *, input_shape, output_size):
    return lambda t, u, args: jnp.stack([u[0], u[1], u[0]])

def plain(t, u, args):
    return jnp.stack([u[0], u[1], u[0]])

def data(n=1):
    raise ValueError("the reason")
""",
    "importing.py": "import no_such_package\n",
    "raising.py": """
import equinox as eqx, jax, jax.numpy as jnp
from mpi4py import MPI

class Slope(eqx.Module):
    rate: jax.Array

    def __call__(self, t, u, args):
        if MPI.COMM_WORLD.Get_rank() == 1:
            raise RuntimeError("the reason")
        return self.rate * u

def field(key, *, input_shape, output_size):
    return Slope(jnp.ones(1))

def plain(t, u, args):
    if MPI.COMM_WORLD.Get_rank() == 1:
        raise RuntimeError("the reason")
    return u
""",
    "exploding.py": """
import equinox as eqx, jax, jax.numpy as jnp

class Field(eqx.Module):
    rate: jax.Array

    def __call__(self, t, u, args):
        return jnp.arcsin(self.rate) * u

def field(key, *, input_shape, output_size):
    return Field(jnp.array(0.1))
""",
}


class Bad(NamedTuple):
    """What is typed, and what must be said."""

    arguments: list[str]
    message: str


def train(*arguments: str, **keys: object) -> list[str]:
    return ["train", "tiny.toml", *arguments, *sets(**keys)]


def own(name: str, **keys: object) -> list[str]:
    return train("--set", f'network={{name = "{name}"}}', **keys)


def tangent(**basis: object) -> list[str]:
    keys = {f"time__basis__{name}": value for name, value in basis.items()}
    return train(time__method="tangent", **keys)


def solve(name: str) -> list[str]:
    return ["solve", "tiny.toml", "--set", f'problem={{field = "{name}", initial = [1.0, 2.0]}}']


CASES = {
    "unknown key": Bad(
        train(network__widht=9), r"unknown key `network\.widht`; did you mean `network\.width`\?"
    ),
    "key of another section": Bad(
        train(network__n_slices=9), r"unknown key `network\.n_slices`; did you mean `time\.n_slices"
    ),
    "wrong type": Bad(
        train(network__width="wide"), r'`network\.width` is the string "wide"; it .*integer'
    ),
    "bad TOML": Bad(["train", "broken.toml"], r"broken\.toml is not valid TOML: .*line 2"),
    "missing config": Bad(["train", "gone.toml"], r"config file gone\.toml: No such file"),
    "set twice": Bad(
        train(*sets(run__seed=1), *sets(run__seed=2)), r"`--set run\.seed=\.\.\.` is given twice"
    ),
    "missing argument": Bad(["train"], "Missing argument 'CONFIG'"),
    "unknown option": Bad(train("--resumee", "auto"), "No such option.*--resumee"),
    "more ranks than slices": Bad(train(time__n_slices=1), "2 ranks cannot share 1 time slices"),
    "ranks that make no grid": Bad(
        train(run__data_ranks=3), "2 ranks cannot form 3 lines of equal length"
    ),
    "samples that lines cannot share": Bad(
        train(run__data_ranks=2, data__batch_size=3),
        "3 samples, which 2 groups of ranks cannot share evenly: set .* to one of 1, 3",
    ),
    "method without its basis": Bad(
        train(time__method="tangent"), r"`method = 'tangent'` needs a section `\[time\.basis\]`"
    ),
    "basis larger than the state": Bad(
        tangent(kind="pod", rank=3), "basis of rank 3 is larger than the state of 2 entries"
    ),
    "basis without a rank": Bad(tangent(kind="pod"), r"`kind = 'pod'` needs a `rank`"),
    "more new directions than the rank": Bad(
        tangent(kind="jumps", rank=2, new=3), "at most `rank` directions a sweep"
    ),
    "learned basis that is not learned": Bad(tangent(kind="learned"), r"give `network\.latent`"),
    "latent space larger than the state": Bad(train(network__latent=3), "choose at most 2"),
    "missing data": Bad(
        train(data__source="nowhere"),
        "no prepared data at nowhere: run `nodepint data prepare nowhere`",
    ),
    "data function that fails": Bad(
        train(data__source="shape.py:data"), r"shape\.py:data failed: ValueError: the reason"
    ),
    "unknown option of a data function": Bad(
        train(data__source="shape.py:data", data__options__m=1),
        r"no option 'm' .*for shape\.py:data",
    ),
    "Python file without settings": Bad(
        ["train", "shape.py"], r'shape\.py has no settings: .*`CONFIG = """'
    ),
    "metric that is no import path": Bad(
        train(loss__metrics=["accuracy"]), r"`loss\.metrics` holds 'accuracy'"
    ),
    "missing split": Bad(train(data__test_split="tst"), r"no split 'tst'.*did you mean 'test'"),
    "missing column": Bad(train(data__times="time"), r"no column 'time'.*'t'"),
    "NaN in the data": Bad(train(data__source="holed"), "row 1 of column 'u' holds nan"),
    "unknown loss": Bad(
        train(loss__name="mean_square_error"), r"did you mean 'mean_squared_error'"
    ),
    "unknown optimizer": Bad(
        train(optim__name="adma"), r"`optim\.name` 'adma'; did you mean .*'adam'"
    ),
    "unknown solver": Bad(
        train(time__fine__solver="rk5"), r"fine\.solver` 'rk5'; did you mean 'rk4'"
    ),
    "unknown network": Bad(own("mpl"), r"`network\.name` 'mpl'; did you mean 'mlp'"),
    "unknown network with options": Bad(
        train(network__name="mpl"), r"`network\.name` 'mpl'; did you mean 'mlp'"
    ),
    "field of the wrong shape": Bad(
        own("shape.py:field"),
        r"returned shape \(3,\) and type float64 for a state of shape \(2,\)",
    ),
    "field that cannot import": Bad(
        own("importing.py:field"), r"network\.name = \"importing\.py:field\".*no_such_package"
    ),
    "missing function": Bad(own("shape.py:filed"), r"shape\.py has nothing named 'filed'"),
    "missing file": Bad(own("gone.py:field"), r"`network\.name`: there is no file gone\.py"),
    "field that raises on one rank": Bad(
        own("raising.py:field"),
        r"rank 1 on \S+: The vector field failed for .*: RuntimeError: the reason",
    ),
    "occupied directory": Bad(train("--out", "run"), "run is not empty.*--resume auto"),
    "directory that is a file": Bad(train("--out", "tiny.toml"), r"tiny\.toml is a file.*--out"),
    "nothing to resume": Bad(train("--out", "new", "--resume", "auto"), "nothing to resume in new"),
    "missing checkpoint": Bad(
        train("--out", "run", "--resume", "run/ckpt/step-000007.h5"),
        r"no checkpoint at run/ckpt/step-000007\.h5",
    ),
    "damaged checkpoint": Bad(
        train("--out", "damaged", "--resume", "damaged/ckpt/step-000020.h5"),
        r"damaged/ckpt/step-000020\.h5 is damaged",
    ),
    "only a damaged checkpoint": Bad(
        train("--out", "damaged", "--resume", "auto"),
        r"no good checkpoint in damaged/ckpt: step-000020\.h5",
    ),
    "checkpoint of another experiment": Bad(
        train("--out", "run", "--resume", "auto", network__width=9),
        r"belongs to another experiment.*network\.width",
    ),
    "result that cannot be written": Bad(
        train("--json", "gone/r.json"), r"Cannot write gone/r\.json: there is no folder"
    ),
    "result that is a folder": Bad(train("--json", "run"), "Cannot write run: it is a folder"),
    "no run directory": Bad(["evaluate", "holed"], r"holed is not a run directory"),
    "report of no run": Bad(["report", "holed"], r"holed is not a run directory"),
    "report on two ranks": Bad(["report", "run"], "got 2 ranks and needs one: start it without"),
    "comparison on two ranks": Bad(["compare", "run", "run"], "`nodepint compare` got 2 ranks"),
    "reduced model without the full one": Bad(
        ["report", "run", "--no-model", "--rom", "r.h5"], "remove `--no-model`"
    ),
    "unknown problem": Bad(
        ["solve", "tiny.toml", *sets(problem__field="lorentz")], "'lorentz'; did you mean 'lorenz'"
    ),
    "field to solve of the wrong shape": Bad(
        solve("shape.py:plain"), r"returned shape \(3,\) for a state of shape \(2,\)"
    ),
    "field to solve that raises on one rank": Bad(
        solve("raising.py:plain"), r"rank 1 on \S+: RuntimeError: the reason"
    ),
}


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    """A folder for what the cases came to; the first test to need it runs them all."""
    return tmp_path_factory.mktemp("outcomes")


@pytest.fixture
def outcome(case, trained, mpirun, outcomes, tmp_path):
    """What each rank noted of a case."""
    cases, notes = outcomes / "cases.json", outcomes / "notes"
    if not cases.exists():
        write_bad_things(tmp_path, case, trained(2))
        cases.write_text(json.dumps({name: bad.arguments for name, bad in CASES.items()}))
        notes.mkdir()
        done = mpirun(
            2, sys.executable, DRIVER, cases, notes, cwd=tmp_path, env=QUICK, timeout_s=280
        )
        (outcomes / "job.txt").write_text(done.stdout + done.stderr)

    def read(name):
        files = [notes / f"{name}.{rank}.json" for rank in range(2)]
        if not all(file.exists() for file in files):
            said = [path.read_text() for path in sorted(notes.glob("*.txt"))[-2:]]
            pytest.fail(
                "\n".join(["the job ended before:", *said, (outcomes / "job.txt").read_text()])
            )
        return [json.loads(file.read_text()) for file in files]

    return read


def write_bad_things(folder, case, run):
    """All that the cases need, some of it broken."""
    shutil.copy(case.config, folder / "tiny.toml")
    (folder / "broken.toml").write_text('[run]\nname = "x\n')
    for name, text in OWN.items():
        (folder / name).write_text(text)
    shutil.copytree(run, folder / "run")
    shutil.copytree(run, folder / "damaged")
    *older, newest = checkpoints(folder / "damaged")
    for path in older:
        path.unlink()
    damage(newest)
    holed = datasets.DatasetDict.load_from_disk(str(case.folder / "tiny" / "prepared"))
    columns, features = holed["train"][:], holed["train"].features
    states = np.array(columns["u"])
    states[1, 3, 0] = np.nan
    holed["train"] = datasets.Dataset.from_dict(columns | {"u": states}, features=features)
    holed.save_to_disk(str(folder / "holed"))


@pytest.mark.parametrize("name", CASES)
def test_bad_input(outcome, name):
    noted = outcome(name)
    said = "".join(rank["said"] for rank in noted)
    assert has_one_message(said), said
    (message,) = messages(said)
    assert re.search(CASES[name].message, message), said
    assert {rank["code"] for rank in noted} == {2}
    assert noted[0]["after"] == noted[0]["before"]


def test_a_real_job_with_bad_input_ends_in_the_same_way(case, nodepint, tmp_path):
    words = sets(data__source="nowhere")
    done = nodepint(2, "train", case.config, "--out", tmp_path / "run", *words, code=2)
    assert "`nodepint data prepare nowhere`" in done.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".pid"}


def test_a_field_that_turns_to_nan_ends_the_run_before_the_checkpoint(case, nodepint, tmp_path):
    (tmp_path / "exploding.py").write_text(OWN["exploding.py"])
    # Adam's first step is the learning rate, whatever the gradient: the rate leaves [-1, 1].
    keys = sets(optim__learning_rate=2.0, output__checkpoint_every=1)
    field = "--set", 'network={name = "exploding.py:field"}'
    done = nodepint(2, "train", case.config, "--out", "run", *field, *keys, code=2)
    where = r"in slice 0 \(of 0 to 6; t from 0 to 0\.5\) on rank 0 on "
    said = f"^nodepint: Step 2: the loss is nan.* the state first became non-finite {where}"
    assert re.search(said, done.stderr, re.MULTILINE | re.IGNORECASE)
    names = [path.name for path in checkpoints(tmp_path / "run")]
    assert names == ["step-000000.h5", "step-000001.h5"]  # what the last finite step began with
    assert not (tmp_path / "run" / "DONE").exists()
