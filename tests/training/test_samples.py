"""Samples with times, gaps, inputs and features of their own, against plain diffrax."""

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.parallel.comms import alone, make_comms
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.evaluate import evaluate
from nodepint_mpi.training.plain import make_plain_loss
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.small_config import EXACT, small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]
N_ROWS, LAST = 6, 2.0


def turned(start, t, force=0.0):
    z = (start[0] + 1j * start[1]) * np.exp((-0.2 + 2.0j) * t) + force
    return np.stack([z.real, z.imag], axis=-1)


def make_rows(kind: str) -> dict:
    """Damped rotations, observed in the ways that the tests are about."""
    draw = np.random.default_rng(1)
    starts = draw.uniform(0.5, 1.5, (N_ROWS, 2))
    common = np.linspace(0.0, LAST, 9)
    rows: dict = {"t": [common.tolist()] * N_ROWS}
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


@pytest.fixture(params=["common", "own times", "gaps"])
def kind(request):
    return request.param


INPUTS = 'inputs = "c"\ninput_times = "s"\n'
ADAPTIVE = 'fine = { solver = "tsit5", rtol = 1e-9, atol = 1e-9 }'
TANGENT = 'method = "tangent"\nbasis = { kind = "jumps", rank = 2, new = 2 }'
CASES = {
    "own times": ("own times", "", ""),
    "own times, adaptive": ("own times", "", ADAPTIVE),
    "own times, tangent": ("own times", "", TANGENT),
    "gaps": ("gaps", 'missing = "nan"', ""),
    "mask and weights": ("common", 'mask = "m"\nweights = "w"', ""),
    "linear inputs": ("common", INPUTS, ""),
    "cubic inputs, static": ("own times", INPUTS + 'interpolation = "cubic"\nstatic = "p"', ""),
    "initial": ("common", 'initial = "u0"', ""),
}
HEAVY = {"own times, adaptive", "own times, tangent", "gaps", "initial"}


def config_of(folder, data: str, options: str) -> str:
    steps = 'coarse = { solver = "euler", n_steps = 2 }'
    if "fine" not in options:
        steps += '\nfine = { solver = "tsit5", n_steps = 8 }'
    text = small_config(folder, EXACT + options, steps=steps, data=data)
    return text.replace('input = "u"\n', "") if "initial" in data else text


def losses(comms, text: str, n_steps: int) -> np.ndarray:
    experiment = set_up(parse_config(text), comms)
    stepper, state, found = make_stepper(experiment), fresh_state(experiment), []
    for k in range(n_steps):
        taken = stepper.take(state, experiment.batch(k), k)
        state = taken.state
        found.append(float(taken.report.loss))
    return np.array([*found, *evaluate(comms, experiment, state.params).values()])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[pytest.mark.mpi(max_size=2)] if name in HEAVY else [])
        for name in CASES
    ],
)
def test_loss_and_gradient_are_those_of_a_solve_for_each_sample(
    comms, on_one_rank, shared_tmp_path, case
):
    """The first step against plain diffrax with `SaveAt(ts=...)`, all against one rank."""
    kind, data, options = CASES[case]
    text = config_of(save(comms, shared_tmp_path / "set", make_rows(kind)), data, options)
    experiment = set_up(parse_config(text), comms)
    state = fresh_state(experiment)
    taken = make_stepper(experiment).take(state, experiment.batch(0), 0)
    if comms.time.size == 1:
        plain = jax.jit(jax.value_and_grad(make_plain_loss(experiment)))
        loss, gradient = plain(state.params, experiment.whole_batch(0))
        np.testing.assert_allclose(float(taken.report.loss), float(loss), rtol=1e-8)
        ours, wanted = (ravel_pytree(tree)[0] for tree in (taken.gradient, gradient))
        assert jnp.linalg.norm(ours - wanted) < 1e-8 * jnp.linalg.norm(wanted)
    found = losses(comms, text, 4)
    assert np.all(np.isfinite(found))
    if comms.time.size > 1:
        alone_ = on_one_rank(lambda: losses(make_comms(alone()), text, 4))
        np.testing.assert_allclose(found, alone_, rtol=1e-10)
