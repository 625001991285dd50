#!/usr/bin/env python
"""How well does a Neural ODE predict flows of particles? Accuracy, energy, momentum, vorticity.

    tools/judge_sph.py runs/sph                       on its own held-out flows
    tools/judge_sph.py runs/sph_particles runs/sph    both on the held-out flows of the first

Accuracy is 1 - the relative L2 error of the velocity on a grid, over all flows and all times after
the first. Beside it stands what nothing but the error of the learned basis would leave, where there
is one, and what would be right if nothing moved. Writes `pictures/vorticity.png` and
`pictures/energy.png` into the first run, which `nodepint report` shows.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from nodepint_mpi.build.imports import import_file
from nodepint_mpi.data.datasets import open_split
from nodepint_mpi.data.sources import load
from nodepint_mpi.errors import DataError, NodepintError
from nodepint_mpi.models.networks import LinearMap
from nodepint_mpi.parallel.comms import Comms, alone, make_comms
from nodepint_mpi.rom.evaluate import full_model, run_batch
from nodepint_mpi.rom.load import stepper_of
from nodepint_mpi.training.evaluate import TrainedRun, open_run

SEEN = "seen"
"""Column of the velocity on the grid, where the state is that of particles."""
N_PANELS = 4
"""Times in the picture of the vorticity."""

sph = import_file(Path(__file__).with_name("sph.py"), "tools/judge_sph.py")


class Flows(NamedTuple):
    """Velocities (flows, times, places, 2), the first of the times that of the start.

    `seen` is on a square grid, `carried` what energy and momentum are taken of: the same, or that
    of the particles.
    """

    seen: np.ndarray
    carried: np.ndarray


class Scores(NamedTuple):
    """1 - relative L2 error; `basis` of the best on the learned basis, None without one."""

    accuracy: float
    basis: float | None
    persistence: float


def has_particles(run: TrainedRun) -> bool:
    """Whether its states are positions and velocities, seen on a grid in another column. Local."""
    section = run.experiment.test.section
    columns = load(section.source, verify=False)[section.test_split].column_names
    return SEEN in columns and section.target != SEEN


def held_out(run: TrainedRun) -> Flows:
    """The true flows of its test split. Local."""
    samples = run.experiment.test
    rows = np.arange(samples.n_rows)
    states = np.asarray(samples.take(rows).targets)
    if not has_particles(run):
        return Flows(by_place(states), by_place(states))
    section = samples.section
    seen = open_split(section.source, section.test_split, [SEEN]).take(SEEN, rows)
    return Flows(by_place(seen), by_place(states[..., states.shape[-1] // 2 :]))


def predict(run: TrainedRun, of: TrainedRun) -> Flows:
    """The flows of another run's test split, or its own, from their start. Local: one rank.

    Raises:
        DataError: if it knows other states than there are.
    """
    samples = of.experiment.test
    inputs = np.asarray(samples.take(np.arange(samples.n_rows)).initial)
    if has_particles(of) and not has_particles(run):
        seen = held_out(of).seen
        inputs = seen[:, 0].reshape(len(seen), -1)
    wanted = run.experiment.test.input_shape
    if inputs.shape[1:] != wanted:
        raise DataError(
            f"The run {run.experiment.config.run.name} starts from {wanted[0]} numbers, but the "
            f"flows of {of.experiment.config.run.name} from {inputs.shape[1]}: give runs of the "
            "same grid, the one of particles first."
        )
    config = run.experiment.config
    ts = np.asarray(samples.times, dtype=float)
    states = run_batch(full_model(run, stepper_of(config)).solve, inputs, ts)
    if not has_particles(run):
        return Flows(by_place(states), by_place(states))
    n_grid = round(held_out(of).seen.shape[2] ** 0.5)
    x, v = (by_place(half) for half in np.split(states, 2, axis=-1))
    return Flows(see(x, v, n_grid), v)


def see(x: np.ndarray, v: np.ndarray, n_grid: int) -> np.ndarray:
    """The velocity of particles on a grid, (flows, times, points, 2). Local."""
    spacing = x.shape[2] ** -0.5
    particles = sph.Particles(*(jnp.asarray(a.reshape(-1, *a.shape[2:])) for a in (x, v)))
    look = jax.jit(lambda u: sph.velocity_at(sph.grid(n_grid), u, spacing))
    return np.asarray(jax.lax.map(look, particles)).reshape(*x.shape[:2], n_grid**2, 2)


def by_place(states: np.ndarray) -> np.ndarray:
    """Vectors as pairs: (..., places, 2). Local."""
    return states.reshape(*states.shape[:-1], -1, 2)


def score(truth: np.ndarray, predicted: np.ndarray, basis: np.ndarray | None) -> Scores:
    """Of velocities (flows, times, points, 2); the columns of `basis` span what is possible. Local.

    The start does not count.
    """
    wanted = truth[:, 1:].reshape(-1, truth.shape[2] * 2).astype(float)

    def right(found: np.ndarray) -> float:
        return float(1 - np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    best = None
    if basis is not None:
        directions = np.linalg.qr(basis.astype(float))[0]
        best = right(wanted @ directions @ directions.T)
    still = np.broadcast_to(truth[:, :1], truth[:, 1:].shape)
    return Scores(
        right(predicted[:, 1:].reshape(wanted.shape)), best, right(still.reshape(wanted.shape))
    )


def learned_basis(run: TrainedRun) -> np.ndarray | None:
    """What spans its predictions, (entries, directions), if it is linear. Local."""
    decoder = run.params.decoder
    return np.asarray(decoder.matrix) if isinstance(decoder, LinearMap) else None


def energy_left(velocities: np.ndarray) -> np.ndarray:
    """Kinetic energy of every flow at every time, over that at its start. Local."""
    sums = np.sum(np.square(velocities, dtype=float), axis=(2, 3))
    return sums / sums[:, :1]


def momentum(velocities: np.ndarray) -> np.ndarray:
    """Length of the mean velocity of every flow at every time. Local."""
    return np.linalg.norm(np.mean(velocities, axis=2, dtype=float), axis=-1)


def vorticity(seen: np.ndarray) -> np.ndarray:
    """By central differences, (flows, times, x, y). Local."""
    n = round(seen.shape[2] ** 0.5)
    u = seen.reshape(*seen.shape[:2], n, n, 2)
    along_x, along_y = ((np.roll(u, -1, axis) - np.roll(u, 1, axis)) * n / 2 for axis in (2, 3))
    return along_x[..., 1] - along_y[..., 0]


def draw_vorticity(times: np.ndarray, flows: dict[str, Flows]) -> Figure:
    """The first flow at some times, a row for the truth and for every run."""
    shown = np.linspace(0, len(times) - 1, N_PANELS).round().astype(int)
    rows = {name: vorticity(each.seen[:1])[0, shown] for name, each in flows.items()}
    most = max(float(np.abs(row).max()) for row in rows.values())
    scale = {"cmap": "RdBu", "vmin": -most, "vmax": most}
    figure = Figure(figsize=(9, 2.2 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), N_PANELS, sharex=True, sharey=True)
    for line, (name, row) in zip(panels, rows.items(), strict=True):
        for panel, picture, t in zip(line, row, times[shown], strict=True):
            panel.imshow(picture.T, origin="lower", extent=(0, 1, 0, 1), **scale)
            panel.set_title(f"{name}, t = {t:.3g}", fontsize="small")
    figure.colorbar(panels[0, 0].images[0], ax=panels, label="vorticity", shrink=0.6)
    return figure


def draw_energy(times: np.ndarray, flows: dict[str, Flows]) -> Figure:
    """Energy and momentum against time, the mean and the largest of all flows."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for style, (name, each) in zip(("k-", "C0--", "C1-.", "C2:"), flows.items(), strict=False):
        left.plot(times, energy_left(each.carried).mean(axis=0), style, label=name)
        right.plot(times, momentum(each.carried).max(axis=0), style, label=name)
    left.set(xlabel="time", ylabel="energy left, mean of flows", ylim=(0, None))
    right.set(xlabel="time", ylabel="momentum, largest of flows", ylim=(0, None))
    left.legend(fontsize="small")
    return figure


def judge(folders: list[Path], comms: Comms) -> dict[str, Scores]:
    """Scores of all runs on the held-out flows of the first; prints and draws. Local: one rank."""
    runs = [open_run(folder, comms, trust=True) for folder in folders]
    first, times = runs[0], runs[0].experiment.test.times
    flows, scores = {"truth": held_out(first)}, {}
    print(f"{len(flows['truth'].seen)} flows held out by {folders[0]}, to t = {times[-1]:g}")
    print(f"{'':28s} accuracy   basis  persistence")
    for folder, run in zip(folders, runs, strict=True):
        name = str(folder)
        flows[name] = predict(run, first)
        scores[name] = score(flows["truth"].seen, flows[name].seen, learned_basis(run))
        shown = ["      -" if s is None else f"{s:7.1%}" for s in scores[name]]
        print(f"{name:28s}  {shown[0]} {shown[1]}      {shown[2]}")
    names = "".join(f"  {name:>26s}" for name in flows)
    print(f"\n  time{names}\n      " + f"  {'energy left':>12s}  {'momentum':>12s}" * len(flows))
    carried = [
        (energy_left(each.carried).mean(axis=0), momentum(each.carried).max(axis=0))
        for each in flows.values()
    ]
    for i in np.linspace(0, len(times) - 1, 6).round().astype(int):
        print(f"{times[i]:6.3f}" + "".join(f"  {e[i]:12.4f}  {p[i]:12.1e}" for e, p in carried))
    for name, figure in (
        ("vorticity", draw_vorticity(times, flows)),
        ("energy", draw_energy(times, flows)),
    ):
        file = folders[0] / "pictures" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, dpi=120)
        print(file)
    return scores


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="the first one's flows are predicted")
    try:
        judge(parser.parse_args().runs, make_comms(alone()))
    except NodepintError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
