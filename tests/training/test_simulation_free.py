"""Training without a solve: losses and gradients on any ranks against jax.grad of the formula."""

import datasets
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.parallel.comms import alone, make_comms
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.evaluate import evaluate
from nodepint_mpi.training.plain import make_plain_loss
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.sample_case import losses, make

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(120)]

MODEL = """
import equinox as eqx
import jax
import jax.numpy as jnp
from nodepint_mpi import EncodeProcessDecode, SimulationFree, VariancePreserving


class Field(eqx.Module):
    matrix: jax.Array
    path: VariancePreserving = VariancePreserving(beta_max=6.0)

    def __call__(self, t, u, args, *, key=None):
        own = args.static[0] if key is None else args.static[0] + jax.random.uniform(key)
        return self.matrix @ jnp.sin(u) + own * t


class Halve(eqx.Module):
    scale: jax.Array

    def __call__(self, x):
        return self.scale * x


def make(key, input_shape, output_size):
    matrix = jax.random.normal(key, (3, 3))
    return EncodeProcessDecode(Halve(jnp.array(0.5)), Field(matrix), eqx.nn.Identity())


@SimulationFree
def scalar(model, *, batch):
    return jnp.sum(model.processor.matrix)
"""
N_ROWS = 7
TEXT = """
[run]
name = "test"
precision = "float64"
n_steps = 3
[data]
source = "{folder}"
input = "x"
target = "label"
static = "label"
weights = "w"
{data}
[network]
name = "{file}:make"
[loss]
name = "{loss}"
{more}
[optim]
learning_rate = 0.05
[time]
horizon = [0.0, 1.0]
n_slices = 5
fine = {{ solver = "euler", n_steps = 2 }}
coarse = {{ solver = "euler", n_steps = 1 }}
{time}
"""


@pytest.fixture
def text(shared_tmp_path, comms):
    """The text of a config, by what is special about it."""
    folder, file = shared_tmp_path / "vectors", shared_tmp_path / "field.py"
    draw = np.random.default_rng(2)
    if comms.control.rank == 0:
        file.write_text(MODEL)
        rows = {
            "x": draw.normal(size=(N_ROWS, 3)).tolist(),
            "label": draw.integers(0, 4, N_ROWS).tolist(),
            "w": draw.uniform(0.5, 2.0, N_ROWS).tolist(),
        }
        split = datasets.Dataset.from_dict(rows)
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(folder))
    comms.control.Barrier()

    def of(loss="flow_matching", *, data="", more="", time=""):
        loss = f"{file}:scalar" if loss == "scalar" else loss
        return TEXT.format(folder=folder, file=file, loss=loss, data=data, more=more, time=time)

    return of


def by_hand(experiment, params, step: int, of_noise: bool):
    """The weighted mean over samples, written out."""
    batch = experiment.train.take(np.arange(N_ROWS), step)
    model = eqx.combine(params, experiment.train_problem.static)
    b_min, b_max = 0.1, 6.0
    total = 0.0
    for x, label, row, w in zip(
        batch.initial, batch.static, batch.rows, batch.weights[:, 0], strict=True
    ):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), row)
        for_time, for_noise, for_field = jax.random.split(key, 3)
        s = 1 - jax.random.uniform(for_time, (), float)
        z = jax.random.normal(for_noise, (3,), float)
        own = label[0] + jax.random.uniform(for_field)
        whole = b_min * s + (b_max - b_min) * s**2 / 2
        beta = b_min + (b_max - b_min) * s
        alpha, sigma = jnp.exp(-whole / 2), jnp.sqrt(1 - jnp.exp(-whole))
        y = model.encoder.scale * x
        u = alpha * y + sigma * z
        found = model.processor.matrix @ jnp.sin(u) + own * (1 - s)
        d_alpha, d_sigma = beta / 2 * alpha, -beta / 2 * alpha**2 / sigma
        wrong = found - (d_alpha * y + d_sigma * z)
        if of_noise:  # the noise that goes with this velocity
            wrong = alpha * wrong / (alpha * d_sigma - d_alpha * sigma)
        total = total + w * jnp.mean(wrong**2)
    return total / np.sum(batch.weights)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("loss", ["flow_matching", "denoising_score_matching"])
def test_step_against_the_formula(text, comms, loss):
    experiment = set_up(parse_config(text(loss)), comms)
    state = fresh_state(experiment)
    taken = make_stepper(experiment).take(state, experiment.batch(2), 2)
    value, gradient = jax.value_and_grad(
        lambda params: by_hand(experiment, params, 2, "score" in loss)
    )(state.params)
    np.testing.assert_allclose(taken.report.loss, value, rtol=1e-12)
    found, wanted = ravel_pytree(taken.gradient)[0], ravel_pytree(gradient)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert int(taken.report.sweeps) == 0


@pytest.mark.mpi(2, 3)
def test_same_losses_on_any_ranks(text, comms, on_one_rank):
    """Also with groups of ranks, on mini-batches that the ranks of a line cannot share evenly."""
    text = text(data="batch_size = 6")
    wanted = on_one_rank(lambda: losses(make(text, make_comms(alone())), 3))
    np.testing.assert_allclose(losses(make(text, comms), 3), wanted, rtol=1e-12)
    again = set_up(parse_config(text), comms)
    params = fresh_state(again).params
    assert evaluate(comms, again, params) == evaluate(comms, again, params)


@pytest.mark.mpi(max_size=1)
def test_plain_is_the_same(text, comms):
    experiment = set_up(parse_config(text()), comms)
    params = fresh_state(experiment).params
    found = make_plain_loss(experiment)(params, experiment.whole_batch(1))
    np.testing.assert_allclose(found, by_hand(experiment, params, 1, False), rtol=1e-12)
    assert not experiment.predicts  # of labels: nothing to draw, nothing to confuse


REFUSED = {
    "tracking": ({"time": "tracking = {}"}, ConfigError, "remove `time.tracking`"),
    "basis ranks": (
        {
            "time": 'method = "tangent"\nbasis = { kind = "identity" }',
            "run": {"run.basis_ranks": 2},
        },
        ConfigError,
        "remove `run.basis_ranks`",
    ),
    "metrics": (
        {"more": 'metrics = ["nodepint_mpi.core.objective:accuracy"]'},
        ConfigError,
        "no predictions",
    ),
    "one number": ({"loss": "scalar"}, ProblemError, "one real number for each sample"),
}


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(text, comms, name):
    special, kind, words = REFUSED[name]
    changes = special.get("run", {})
    special = {key: value for key, value in special.items() if key != "run"}
    with pytest.raises(kind, match=words):
        set_up(parse_config(text(**special), changes), comms)
