"""Ranks that differ, and steps that explode, end a run with one sentence: who, where, what now."""

import json
import math
import re
import socket
import sys
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.build import user_code
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.errors import AgreementError, ConfigError, NodepintError, NonFiniteError
from nodepint_mpi.io.checkpoint_folder import checkpoint_path
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.training import train as training
from nodepint_mpi.training.error_control import Anew
from nodepint_mpi.training.nonfinite import raise_nonfinite
from nodepint_mpi.training.sameness import require_same_values
from nodepint_mpi.training.setup import fresh_state, set_up, slice_rows
from nodepint_mpi.training.start import require_same_options
from nodepint_mpi.training.step import StepReport, make_train_step

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]
ONE_RANK = pytest.mark.mpi(max_size=1)
TRACKED = ("time.method=tangent", "time.basis.kind=identity", "time.tracking.bound=0.01")
SEVERAL = pytest.mark.mpi(min_size=2)

TEXT = """
[run]
name = "test"
precision = "float64"
n_steps = 6
compare_every = 2
[data]
source = "{source}"
input = "u"
target = "u"
times = "t"
[network]
name = "{network}"
[loss]
name = "mean_squared_error"
[time]
horizon = [0.0, 2.0]
n_slices = 8
method = "{method}"
fine = {{ solver = "rk4", n_steps = 2 }}
coarse = {{ solver = "euler", n_steps = 1 }}
[output]
log_every = 100
checkpoint_every = 3
"""

OWN = """
import equinox as eqx, jax, jax.numpy as jnp
from nodepint_mpi.core.objective import Mean

class Field(eqx.Module):
    rate: jax.Array

    def __call__(self, t, u, args):
        # Infinity from t = 1.1 on: in slice 4, from 1 to 1.25, and not before.
        return self.rate[0] * u + jnp.where(t > 1.1, jnp.exp(1e6 * self.rate[0]), 0.0)

def exploding(key, *, input_shape, output_size):
    return Field(jnp.ones(1))

class Steep(Field):
    def __call__(self, t, u, args):
        # Finite, with a slope that is not: the square root at 0.
        return self.rate[0] * u + jnp.where(t > 1.1, 1.0, 0.0) * jnp.sqrt(0.0 * u)

class Calm(Field):
    def __call__(self, t, u, args):
        return -self.rate[0] * u

class Rising(Field):
    def __call__(self, t, u, args):
        return self.rate[0] * u

def rising(key, *, input_shape, output_size):
    return Rising(jnp.ones(1))

def steep(key, *, input_shape, output_size):
    return Steep(jnp.ones(1))

def calm(key, *, input_shape, output_size):
    return Calm(jnp.ones(1))

def late_loss(predictions, targets):
    # Targets fall from above 1; what is observed at the end of the horizon is below 0.2.
    return Mean(jnp.sum(jnp.where(targets < 0.2, jnp.nan, predictions)), jnp.array(1.0))

def by_file(key, *, input_shape, output_size):
    return Field(jnp.ones({n}))
"""


def write_set(folder: Path, n_rows=6, n_times=9, dtype="float64", shift=0.0):
    t = np.linspace(0.0, 2.0, n_times)
    u = np.exp(-t)[None, :, None] * np.linspace(1.0, 2.0, n_rows)[:, None, None] + shift
    features = datasets.Features(
        t=datasets.Sequence(datasets.Value("float64")),
        u=datasets.Sequence(datasets.Sequence(datasets.Value(dtype))),
    )
    rows = {"t": [t.tolist()] * n_rows, "u": u.astype(dtype).tolist()}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(folder))


def config(source, network="mlp", method="serial", extra=()):
    text = TEXT.format(source=source, network=network, method=method)
    return parse_config(text, extra)


@pytest.fixture
def source(comms, tmp_path, shared_tmp_path):
    if comms.control.rank == 0:
        write_set(shared_tmp_path / "set")
    comms.control.Barrier()
    return shared_tmp_path / "set"


@pytest.fixture
def own(comms, tmp_path):
    """A file of the user's, in a folder of this rank: `by_file` has as many rates as ranks."""
    path = tmp_path / "own.py"
    path.write_text(OWN.replace("{n}", str(1 + comms.control.rank)))
    return path


# ---- Shapes and data, before the first message ---------------------------------------------


@SEVERAL
@pytest.mark.parametrize(
    "other, message",
    [
        ({"n_rows": 5}, "the number of rows: 5 on {who}, 6 on "),
        ({"n_times": 11}, r"the rows of 'u': float64\[11, 1\] on {who}, float64\[9, 1\] on "),
        ({"dtype": "float32"}, r"the rows of 'u': float32\[9, 1\] on {who}"),
        ({"shift": 1e-14}, "the values of 'u': CRC .* on {who}"),
    ],
)
def test_data_that_differ_on_one_machine_are_named(comms, source, tmp_path, other, message):
    """As with another file behind the same path."""
    last = comms.control.size - 1
    if comms.control.rank == last:
        source = tmp_path / "other"
        write_set(source, **other)
    message = message.replace("{who}", f"rank {last} on {socket.gethostname()}")
    with pytest.raises(AgreementError, match=message):
        set_up(config(source), comms)


@SEVERAL
def test_a_network_of_another_shape_on_one_rank_is_named(comms, source, own):
    with pytest.raises(
        AgreementError, match=r"params/processor/rate is float64\[\d\] on rank 1 on"
    ):
        set_up(config(source, network=f"{own}:by_file"), comms)


def test_equal_data_and_networks_are_set_up(comms, source, own):
    assert set_up(config(source, network=f"{own}:exploding"), comms).state.shape == (6, 1)


# ---- Parameters, while the run goes on -------------------------------------------------------


def test_equal_values_pass_and_one_bit_does_not(comms):
    control = comms.control
    tree = {"params": {"a": jnp.arange(5.0), "b": jnp.ones((2, 3))}, "opt_state": (jnp.zeros(2),)}
    require_same_values(control, tree, 7, 4)
    last = control.size - 1
    if control.rank == last:
        tree["params"]["b"] = tree["params"]["b"].at[1, 2].set(1 + 2**-52)
    if last == 0:
        return require_same_values(control, tree, 7, 4)
    who = f"rank {last} on {socket.gethostname()} holds other values of params/b than rank 0 on"
    with pytest.raises(AgreementError, match=f"Step 7: .*{who}.* were equal at step 4"):
        require_same_values(control, tree, 7, 4)


class Drifting(Anew):
    """Steps after the third of which one rank has one weight wrong by a few bits."""

    guilty = False

    def take(self, state, batch, step):
        taken = super().take(state, batch, step)
        if step == 3 and self.guilty:
            layer = taken.state.params.processor.mlp.layers[0]
            wrong = layer.weight.at[0, 0].multiply(1 + 2**-50)
            params = jax.tree.map(
                lambda leaf: wrong if leaf is layer.weight else leaf, taken.state.params
            )
            taken = taken._replace(state=taken.state._replace(params=params))
        return taken


@SEVERAL
def test_a_drift_ends_the_run_before_it_is_saved(comms, source, shared_tmp_path, monkeypatch):
    def drifting(experiment):
        stepper = Drifting(make_train_step(experiment.train_problem, experiment.update), None)
        stepper.guilty = comms.control.rank == 0
        return stepper

    monkeypatch.setattr(training, "make_stepper", drifting)
    run = shared_tmp_path / "run"
    with pytest.raises(AgreementError) as caught:
        training.train(config(source), run, comms, StopFlag())
    said = str(caught.value)
    odd = 1 if comms.control.size == 2 else 0  # of two ranks either may be the wrong one
    assert said.startswith(f"Step 4: parameters have drifted apart: rank {odd} on ")
    assert "params/processor/mlp/layers/0/weight" in said and "equal at step 3" in said
    assert comms.control.allgather(said) == [said] * comms.control.size
    comms.control.Barrier()
    assert [path.name for path in (run / "ckpt").iterdir()] == ["step-000003.h5"]


# ---- code --------------------------------------------------------------------------------------


@SEVERAL
@pytest.mark.parametrize("key", ["network.name", "loss.name", "loss.metrics", "helper"])
def test_code_that_differs_between_ranks_is_named(
    comms, source, tmp_path, monkeypatch, request, key
):
    """Every rank has its own copy at one and the same name; one of them is an old one."""
    odd = comms.control.size - 1
    monkeypatch.chdir(tmp_path)  # a folder of this rank
    (tmp_path / "mine.py").write_text("import helping\n" + OWN.replace("{n}", "1"))
    (tmp_path / "helping.py").write_text("factor = 1.0\n")
    changed = tmp_path / ("helping.py" if key == "helper" else "mine.py")
    if comms.control.rank == odd:
        changed.write_text(changed.read_text().replace("1.0", "1.01"))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("helping", None)
    request.addfinalizer(lambda: sys.modules.pop("helping", None))
    named = {"network.name": "calm", "loss.name": "late_loss", "loss.metrics": "late_loss"}
    value = f"mine.py:{named.get(key, 'calm')}"
    extra = {"network.name" if key == "helper" else key: value}
    extra = {k: [v] if k == "loss.metrics" else v for k, v in extra.items()}
    with pytest.raises(AgreementError) as caught:
        set_up(config(source, extra=extra), comms)
    said = str(caught.value)
    name = "the module helping" if key == "helper" else "mine.py"
    assert f"The source code differs between ranks: {name} has digest " in said
    assert f"rank {odd} on " in said or comms.control.size == 2
    assert comms.control.allgather(said) == [said] * comms.control.size


@SEVERAL
def test_a_package_that_differs_between_ranks_is_named(comms, source, tmp_path, monkeypatch):
    if comms.control.rank == 1:
        (tmp_path / "older.py").write_text("x = 1\n")
        monkeypatch.setattr(user_code, "PACKAGE", tmp_path)
    with pytest.raises(AgreementError, match="the package nodepint_mpi has digest"):
        set_up(config(source), comms)


def test_options_that_differ_between_ranks_are_named(comms):
    held = {"the command": "'nodepint train'", "`--out`": "'runs/a'"}
    require_same_options(comms.control, held)
    if comms.control.size > 1:
        other = held | ({"`--out`": "'runs/b'"} if comms.control.rank == 0 else {})
        with pytest.raises(ConfigError, match=r"`--out` is 'runs/.' on rank . on .*same command"):
            require_same_options(comms.control, other)


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "raise KeyError('x')", "import nowhere"])
def test_an_import_that_fails_is_one_sentence_on_all_ranks(comms, source, tmp_path, body):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(NodepintError, match=r"`network\.name = \".*import") as caught:
        set_up(config(source, network=f"{tmp_path}/mine.py:f"), comms)
    assert "\n" not in str(caught.value)


# ---- NaN ---------------------------------------------------------------------------------------


def test_the_slice_that_explodes_is_named_with_its_rank(comms, source, own, shared_tmp_path):
    made = config(source, network=f"{own}:exploding")
    with pytest.raises(NonFiniteError) as caught:
        training.train(made, shared_tmp_path / "run", comms, StopFlag())
    said = str(caught.value)
    edges, size = np.linspace(0.0, 2.0, 9), comms.time.size
    owner = next(r for r in range(size) if 4 in own_slices(edges, size, r).indices)
    assert said.startswith("Step 1: the loss is ")
    assert "No step of this start was finite: it saved no checkpoint." in said
    assert (
        f"first became non-finite in slice 4 (of 0 to 7; t from 1 to 1.25) on rank {owner} on "
        f"{socket.gethostname()}" in said
    )
    assert comms.control.allgather(said) == [said] * size
    assert list((shared_tmp_path / "run" / "ckpt").iterdir()) == []


@pytest.mark.mpi(2, 2)
@pytest.mark.parametrize("extra", [(), TRACKED])
def test_a_training_that_diverges_names_its_losses_and_keeps_the_last_good_step(
    comms, source, own, shared_tmp_path, extra
):
    steep = ("optim.name=sgd", "optim.learning_rate=1.0", "output.log_every=1")
    made = config(source, network=f"{own}:rising", extra=(*steep, *extra))
    run = shared_tmp_path / "run"
    with pytest.raises(NonFiniteError) as caught:
        training.train(made, run, comms, StopFlag())
    said = str(caught.value)
    failed = int(re.match(r"Step (\d+): ", said)[1])  # pyright: ignore[reportOptionalSubscript]
    assert "The training diverged: " in said
    assert f"step {failed - 1} had loss " in said
    assert f"Step {failed - 1} changed the parameters by " in said
    path = checkpoint_path(run / "ckpt", failed - 2)  # what step `failed - 1` began with
    assert f"{path} has the parameters" in said
    with pytest.raises(NonFiniteError, match=f"^Step {failed}: "):
        training.train(made, run, comms, StopFlag(), resume=str(path))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(v) for row in rows if row["finite"] for v in row.values())


@ONE_RANK
@pytest.mark.parametrize(
    "network, loss, message",
    [
        ("exploding", "mean_squared_error", "parameters were not finite before it, first "
         "processor/rate"),
        ("calm", "{own}:late_loss", "All states are finite, but not the loss of what is observed "
         "in slices 0 to 7"),
        ("calm", "mean_squared_error", "finite: the sweeps diverged"),
    ],
)  # fmt: skip
def test_what_else_is_not_finite_is_told_apart(comms, source, own, network, loss, message):
    with pytest.raises(NonFiniteError, match=message):
        explain(comms, source, own, network, loss.replace("{own}", str(own)))


@pytest.mark.mpi(max_size=3)
def test_cotangents_that_explode_are_told_from_states(comms, source, own):
    """They come from the right: the last rank is the first where something is wrong."""
    first = max(comms.control.allgather(slice_rows(config(source), comms.time)[0]))
    message = f"going back, cotangents first were not in slices {first} to 7 .* on rank "
    with pytest.raises(NonFiniteError, match=message + str(comms.control.size - 1)):
        explain(comms, source, own, "steep", "mean_squared_error")


def explain(comms, source, own, network, loss):
    """As after a step that was not finite."""
    made = config(source, f"{own}:{network}", extra=[f"loss.name={loss}"])
    experiment = set_up(made, comms)
    state, batch = fresh_state(experiment), experiment.batch(3)
    if network == "exploding":
        state = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state)
    report = StepReport(*[jnp.array(jnp.nan)] * len(StepReport._fields))
    raise_nonfinite(comms, experiment, state, batch, 3, report)
