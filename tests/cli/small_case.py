"""What the tests of the command line have in common: a config, its environment, what to look at."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

RECIPE = Path(__file__).parents[2] / "data" / "lotka_volterra" / "prepare.py"

QUICK = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster, and nothing here is large
    "OMPI_MCA_mpi_yield_when_idle": "1",  # more ranks than cores
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",
}

CONFIG = """
[run]
name = "tiny"
precision = "float64"
n_steps = 20

[data]
source = "SOURCE"
input = "u"
target = "u"
times = "t"

[network]
name = "mlp"
width = 8
depth = 1

[loss]
name = "mean_squared_error"

[time]
horizon = [0.0, 3.5]
n_slices = 7

[time.fine]
solver = "rk4"
n_steps = 4

[time.coarse]
solver = "euler"
n_steps = 2

[output]
log_every = 1
checkpoint_every = 5
keep = 100000
tensorboard = true

[problem]
field = "lotka_volterra"
"""


def sets(**keys: object) -> list[str]:
    """`sets(run__n_steps=5)` is `--set run.n_steps=5`."""
    pairs = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in keys.items()]
    return [word for pair in pairs for word in ("--set", pair)]


def free_env() -> dict[str, str]:
    """The environment of a user who types a command without mpirun."""
    own = ("OMPI_", "PMIX_", "PMI_")  # of the MPI that pytest itself has started
    clean = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    if os.geteuid() == 0:  # `doctor` starts two ranks
        clean |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return clean | QUICK


def alone(*arguments, cwd) -> subprocess.CompletedProcess[str]:
    """Run `nodepint` as a user does who types it without mpirun."""
    return subprocess.run(
        [Path(sys.executable).with_name("nodepint"), *map(str, arguments)],
        cwd=cwd,
        env=free_env(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


class Case(NamedTuple):
    """Where the tests find their data and config."""

    folder: Path
    config: Path
    prepared: dict


def make_case(folder: Path) -> Case:
    """Data of four trajectories, prepared by `nodepint data prepare`, and a config that fits."""
    (folder / "tiny").mkdir()
    (folder / "tiny" / "prepare.py").write_bytes(RECIPE.read_bytes())
    sizes = "n_train=4", "n_test=2", "n_obs=15", "horizon=3.5"
    options = [word for size in sizes for word in ("--set", size)]
    done = alone("data", "prepare", "tiny/prepare.py", *options, "--json", "p.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    config = folder / "tiny.toml"
    config.write_text(CONFIG.replace("SOURCE", str(folder / "tiny")))
    return Case(folder, config, json.loads((folder / "p.json").read_text()))


def messages(said: str) -> list[str]:
    """The lines with which the command says what is wrong."""
    return re.findall("^nodepint: .*$", said, re.MULTILINE)


def has_one_message(said: str) -> bool:
    """Whether the user is told once, in words."""
    return len(messages(said)) == 1 and "Traceback" not in said


def read_json(path: Path):
    """Strictly: NaN is no JSON."""
    return json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)


def read_metrics(run: Path) -> list[dict]:
    """The whole lines of `metrics.jsonl`, also while the run goes on."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def checkpoints(run: Path) -> list[Path]:
    """All checkpoints, the oldest first."""
    return sorted((run / "ckpt").glob("step-*.h5"))


def read_arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """All numbers in a checkpoint: parameters, optimizer state, interface states."""
    arrays = {}

    def keep(name, item):
        if isinstance(item, h5py.Dataset) and name.startswith(("replicated/", "rows/")):
            arrays[name] = item[()]

    with h5py.File(checkpoint, "r") as file:
        file.visititems(keep)
    return arrays


def assert_equal(left: Path, right: Path, *, rtol: float = 0.0) -> None:
    """Two checkpoints hold the same numbers."""
    one, other = read_arrays(left), read_arrays(right)
    assert one.keys() == other.keys()
    assert any(name.startswith("replicated/params/") for name in one)
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=rtol, atol=rtol, err_msg=name)


def damage(path: Path) -> None:
    """Flip a byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all that is in a folder, but for locks: every start takes them."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.name != "lock"
    }


def wait_for(condition: Callable[[], bool], *, limit_s: float = 240) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {limit_s:g} s"
        time.sleep(0.02)
