"""Samples with times, gaps, inputs and features of their own, and steps that are taken on them."""

from typing import NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.training.error_control import Stepper, make_stepper
from nodepint_mpi.training.evaluate import evaluate
from nodepint_mpi.training.plain import make_plain_loss
from nodepint_mpi.training.setup import Experiment, fresh_state, set_up
from tests.training.small_config import EXACT, small_config

N_ROWS, LAST = 6, 2.0
INPUTS = 'inputs = "c"\ninput_times = "s"\n'
ADAPTIVE = 'fine = { solver = "tsit5", rtol = 1e-9, atol = 1e-9 }'
FOUR_STAGES = 'fine = { solver = "rk4", n_steps = 8 }'


def turned(start, t):
    z = (start[0] + 1j * start[1]) * np.exp((-0.2 + 2.0j) * t)
    return np.stack([z.real, z.imag], axis=-1)


def make_rows(kind: str) -> dict:
    """Damped rotations, observed in the ways that the tests are about."""
    draw = np.random.default_rng(1)
    starts = draw.uniform(0.5, 1.5, (N_ROWS, 2))
    common = np.linspace(0.0, LAST, 9)
    rows: dict = {"t": [common.tolist() for _ in range(N_ROWS)]}
    if kind == "own times":
        counts = draw.integers(2, 12, N_ROWS)
        inside = [np.sort(draw.uniform(0.0, LAST, n)) for n in counts]
        # One on an edge between slices, one at the very end, and one row that is over early.
        inside[0] = np.append(inside[0][inside[0] < 1.9], LAST)
        inside[1] = np.unique(np.append(inside[1], 4 * LAST / 7))
        inside[2] = inside[2][:2] / 10
        rows["t"] = [[0.0, *times.tolist()] for times in inside]
    rows["u"] = [
        turned(start, np.asarray(t)).tolist() for start, t in zip(starts, rows["t"], strict=True)
    ]
    knots = np.linspace(0.0, 1.5, 6)
    rows["s"] = [(knots + 0.01 * row * (knots > 0)).tolist() for row in range(N_ROWS)]
    rows["c"] = draw.uniform(-1, 1, (N_ROWS, 6, 1)).tolist()
    rows["p"] = draw.uniform(-1, 1, (N_ROWS, 2)).tolist()
    rows["u0"] = (starts + 0.1).tolist()
    rows["m"] = draw.integers(0, 2, (N_ROWS, 9, 2)).astype(bool).tolist()
    for row in rows["m"]:
        row[0] = [True, True]
        row[3] = [True, False]
    rows["w"] = draw.uniform(0.5, 2.0, (N_ROWS, 9)).tolist()
    gaps = np.array(rows["m"]) if kind == "gaps" else None
    if gaps is not None:
        rows["u"] = np.where(gaps, np.array(rows["u"]), np.nan).tolist()
    return rows


def save(comms, folder, rows):
    if comms.control.rank == 0:
        split = datasets.Dataset.from_dict(rows)
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(folder))
    comms.control.Barrier()
    return folder


def config_of(folder, data: str, options: str) -> str:
    steps = 'coarse = { solver = "euler", n_steps = 2 }'
    if "fine" not in options:
        steps += f"\n{FOUR_STAGES}"
    exact = EXACT if "adjoint" not in options else ""
    text = small_config(folder, exact + options, steps=steps, data=data)
    own_input = "initial" in data or "input = " in data.replace('initial = "u0"\ninput', "")
    return text.replace('input = "u"\ntarget', "target") if own_input else text


class Made(NamedTuple):
    """A config made ready, and the steps that are compiled for it once."""

    experiment: Experiment
    stepper: Stepper


def make(text: str, comms) -> Made:
    """Collective over the grid."""
    experiment = set_up(parse_config(text), comms)
    return Made(experiment, make_stepper(experiment))


def losses(made: Made, n_steps: int) -> np.ndarray:
    """Those of the first steps, and the scores after them. Collective over the grid."""
    experiment, stepper = made
    state, found = fresh_state(experiment), []
    for k in range(n_steps):
        taken = stepper.take(state, experiment.batch(k), k)
        state = taken.state
        found.append(float(taken.report.loss))
    return np.array([*found, *evaluate(experiment.comms, experiment, state.params).values()])


def check_step(made: Made, step: int, *, loss_rtol: float = 1e-8) -> None:
    """Loss and gradient of a step are those of plain diffrax, on one rank."""
    experiment, stepper = made
    state = fresh_state(experiment)
    taken = stepper.take(state, experiment.batch(step), step)
    plain = jax.jit(jax.value_and_grad(make_plain_loss(experiment)))
    loss, gradient = plain(state.params, experiment.whole_batch(step))
    np.testing.assert_allclose(float(taken.report.loss), float(loss), rtol=loss_rtol)
    ours, wanted = (
        ravel_pytree(tree)[0] for tree in (experiment.update.whole_params(taken.gradient), gradient)
    )
    assert jnp.linalg.norm(ours - wanted) < 1e-8 * jnp.linalg.norm(wanted)
