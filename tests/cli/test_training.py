"""Training from end to end: the run directory, the same run on any number of ranks, own code."""

import textwrap

import datasets
import h5py
import matplotlib.image
import numpy as np
import pytest

from nodepint_mpi.config.experiment import read_config
from tests.cli.small_case import checkpoints, read_json, read_metrics
from tests.training.test_scalars import read_events

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(400)]


def test_a_run_directory_has_all_it_takes_to_understand_the_run(case, trained, runs):
    run = trained(2)
    names = {path.name for path in run.iterdir()}
    wanted = {"config.toml", "provenance.json", "metrics.jsonl", "metrics.h5", "ckpt", "DONE"}
    assert wanted | {"phases.json"} <= names
    assert not [name for name in names if "partial" in name]
    given, resolved = read_config(case.config), read_config(run / "config.toml")
    assert resolved == given
    assert resolved.fingerprint() == given.fingerprint()
    (start,) = read_json(run / "provenance.json")["starts"]
    assert start["n_ranks"] == 2
    assert start["fingerprint"] == given.fingerprint()
    assert {"jax", "mpi4jax", "h5py"} <= start["versions"].keys()
    for name in ("loss.png", "trajectories.png"):
        picture = matplotlib.image.imread(run / name)
        assert min(picture.shape[:2]) > 300
        assert np.ptp(picture) > 0.5  # something is drawn
    assert [path.name for path in checkpoints(run)] == [
        f"step-{step:06d}.h5" for step in (5, 10, 15, 20)
    ]
    assert read_json(run / "DONE") == read_json(runs / "2.json")
    times = read_json(run / "phases.json")
    assert len(times["step_s"]["ranks"]) == 2 and times["phases_s"]["fine_forward"]["min"] > 0
    assert times["host_s"]["checkpoint"]["min"] > 0 and times["counts"]["messages"]["min"] > 0


def test_metrics_are_the_same_in_both_files(trained):
    run = trained(2)
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert records[-1]["loss"] < records[0]["loss"]
    spent = np.array([[record["training_s"], record["step_s"]] for record in records])
    np.testing.assert_allclose(np.diff(spent[:, 0], prepend=0), spent[:, 1])  # each is reported
    with h5py.File(run / "metrics.h5") as file:
        for name in ("step", "loss", "grad_norm", "sweeps", "adjoint_sweeps", "jump"):
            np.testing.assert_array_equal(file[name], [record[name] for record in records])
        assert file.attrs["config"] == (run / "config.toml").read_text()


def test_tensorboard_gets_the_same_metrics_and_the_test_scores(trained, runs):
    run = trained(2)
    assert len(list((run / "tensorboard").iterdir())) == 1  # of rank 0 alone
    *steps, scores = read_events(run)[1:]  # the first one names the format
    records = read_metrics(run)
    assert [event.step for event in steps] == [record["step"] for record in records]
    for event, record in zip(steps, records, strict=True):
        found = {value.tag: value.simple_value for value in event.summary.value}
        assert found.keys() == record.keys() - {"step"}
        np.testing.assert_allclose(found["loss"], record["loss"], rtol=1e-6)  # single precision
    found = {value.tag: value.simple_value for value in scores.summary.value}
    result = read_json(runs / "2.json")
    assert (scores.step, found.keys()) == (20, {"test_loss", "test_relative_error"})
    for name, score in found.items():
        np.testing.assert_allclose(score, result[name], 1e-6)


def test_evaluate_gives_the_loss_that_train_gave(trained, runs, nodepint, tmp_path):
    run = trained(2)
    result = read_json(runs / "2.json")
    assert (result["status"], result["step"], result["n_ranks"]) == ("finished", 20, 2)
    assert result["train_loss"] == read_metrics(run)[-1]["loss"]
    said = nodepint(1, "evaluate", run, "--json", "e.json").stdout
    scores = read_json(tmp_path / "e.json")
    assert scores["step"] == 20
    np.testing.assert_allclose(scores["loss"], result["test_loss"], rtol=1e-10)
    for text in (said, (runs / "2.txt").read_text()):
        assert f"loss: {result['test_loss']:.6g}" in text


@pytest.mark.parametrize("n_ranks", [1, 3])  # 7 slices: uneven on all but one
def test_training_losses_do_not_depend_on_the_number_of_ranks(trained, n_ranks):
    expected, records = (read_metrics(trained(n)) for n in (2, n_ranks))
    assert len(records) == 20
    for name, rtol in {"loss": 1e-10, "grad_norm": 1e-10, "sweeps": 0}.items():
        np.testing.assert_allclose(
            [record[name] for record in records],
            [record[name] for record in expected],
            rtol=rtol,
            err_msg=name,
        )


OWN = """
import equinox as eqx, jax, jax.numpy as jnp
from nodepint_mpi.core.objective import Mean

class Oscillator(eqx.Module):
    rates: jax.Array

    def __call__(self, t, u, args):
        return jnp.stack([self.rates[0] * u[1], -self.rates[1] * u[0]])

def field(key, *, input_shape, output_size, first_rate):
    assert input_shape == (2,) and output_size == 2
    return Oscillator(jnp.array([first_rate, 1.0]))

def mean_absolute_error(predictions, targets):
    errors = jnp.abs(predictions - targets)
    return Mean(jnp.sum(errors), jnp.asarray(errors.size, errors.dtype))
"""

OWN_CONFIG = """
run = {name = "own", precision = "float64", n_steps = 30}
network = {name = "own.py:field", options = {first_rate = 1.2}}
loss = {name = "own:mean_absolute_error"}
optim = {learning_rate = 0.02}
output = {log_every = 1}
[data]
source = "saved"
input = "state"
target = "state"
times = "time"
train_split = "fit"
test_split = "check"
[time]
horizon = [0.0, 2.0]
n_slices = 4
fine = {solver = "rk4", n_steps = 4}
coarse = {solver = "euler", n_steps = 1}
"""


def test_a_users_own_field_loss_and_data(nodepint, tmp_path):
    times = np.linspace(0, 2, 9)
    phases = {"fit": [0.0, 0.5, 1.1], "check": [0.3]}
    features = datasets.Features(
        time=datasets.List(datasets.Value("float64"), length=9),
        state=datasets.Array2D((9, 2), "float64"),
    )
    splits = {}
    for split, starts in phases.items():
        states = [np.stack([np.sin(times + s), np.cos(times + s)], axis=1) for s in starts]
        columns = {"time": [times] * len(starts), "state": states}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "own.toml").write_text(OWN_CONFIG)
    nodepint(2, "train", "own.toml", "--json", "r.json")
    result = read_json(tmp_path / "r.json")
    records = read_metrics(tmp_path / "runs" / "own")
    assert records[-1]["loss"] < 0.2 * records[0]["loss"]  # rates (1, 1) are the truth
    assert result["test_loss"] < 0.05
