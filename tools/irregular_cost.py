"""What times of their own cost: a training step of irregular samples against a common grid.

Run on an idle machine, one core a rank, with nothing else on it:

    taskset -c 0 python tools/irregular_cost.py
    mpirun -n 2 --bind-to core python -m mpi4py tools/irregular_cost.py

64 damped rotations with 20 to 200 observations each, drawn anew, against as many observations on
one grid; 16 slices of 32 steps. Steps alternate, and medians are compared.
"""

import statistics
import tempfile
import time
from pathlib import Path

import datasets
import jax
import numpy as np

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.parallel.comms import Comms, make_comms, world
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.setup import fresh_state, set_up

N_SAMPLES, LAST, N_STEPS, WARM = 64, 8.0, 40, 5
CONFIG = """
run = {{ name = "cost", precision = "float64" }}
data = {{ source = "{source}", input = "u", target = "u", times = "t" }}
network = {{ name = "mlp", width = 64, depth = 2 }}
loss = {{ name = "mean_squared_error" }}
[time]
horizon = [0.0, {last}]
n_slices = 16
fine = {{ solver = "tsit5", n_steps = 32 }}
coarse = {{ solver = "rk4", n_steps = 2 }}
{options}
"""


def make_data(folder: Path, *, irregular: bool) -> None:
    """A data set of rotations at times of their own or on one grid. Local."""
    draw = np.random.default_rng(0)
    counts = draw.integers(20, 201, N_SAMPLES)
    grid = np.linspace(0.0, LAST, int(round(counts.mean())) + 1)
    rows: dict[str, list] = {"t": [], "u": []}
    for count in counts:
        t = np.append(0.0, np.sort(draw.uniform(0.01, LAST, count))) if irregular else grid
        z = np.exp((-0.1 + 2j) * t) * draw.uniform(0.5, 1.5)
        rows["t"].append(t.tolist())
        rows["u"].append(np.stack([z.real, z.imag], axis=1).tolist())
    split = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(folder))


def compare(comms: Comms, folder: Path, options: str) -> tuple[float, float]:
    """Median seconds of a step on the grid and of one with own times. Collective."""
    runs, seconds = [], ([], [])
    for name in ("common", "own"):
        text = CONFIG.format(source=folder / name, last=LAST, options=options)
        experiment = set_up(parse_config(text), comms)
        runs.append([experiment, make_stepper(experiment), fresh_state(experiment)])
    for step in range(N_STEPS):
        for run, spent in zip(runs, seconds, strict=True):
            comms.control.Barrier()
            began = time.perf_counter()
            taken = run[1].take(run[2], run[0].batch(step), step)
            run[2] = jax.block_until_ready(taken.state)
            spent.append(time.perf_counter() - began)
    common, own = (statistics.median(spent[WARM:]) for spent in seconds)
    return common, own


def main() -> None:
    """Print a line for tracked steps and one for steps that are solved anew."""
    jax.config.update("jax_enable_x64", True)
    comms = make_comms(world())
    with tempfile.TemporaryDirectory() as made:
        folder = Path(comms.control.bcast(made))
        if comms.control.rank == 0:
            make_data(folder / "common", irregular=False)
            make_data(folder / "own", irregular=True)
        comms.control.Barrier()
        for name, options in (("tracked", "tracking = {}"), ("solved anew", "")):
            common, own = compare(comms, folder, options)
            if comms.control.rank == 0:
                print(
                    f"{name}: common grid {1e3 * common:.0f} ms, own times {1e3 * own:.0f} ms, "
                    f"ratio {own / common:.2f}",
                    flush=True,
                )
        comms.control.Barrier()


if __name__ == "__main__":
    main()
