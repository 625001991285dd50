"""Losses, encoders and fields that ask for keys, times and masks, on samples of all kinds."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import alone, make_comms
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.sample_case import (
    LAST,
    N_ROWS,
    check_step,
    config_of,
    losses,
    make,
    make_rows,
    save,
)

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]

OWN = """
import jax.numpy as jnp
import equinox as eqx
import jax
from nodepint_mpi import EncodeProcessDecode, Mean, mean_squared_error

def loss(predictions, targets, mask, weights, times, batch):
    assert predictions.shape == targets.shape == mask.shape
    late = jnp.where(times > 1.0, 2.0, 1.0)
    return mean_squared_error(predictions, targets, mask=mask, weights=late)

def penalty(model):
    return sum(jnp.sum(x ** 2) for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))

def drawn(model, key, batch):
    if key is None:
        return jnp.zeros(())
    return jax.vmap(lambda k: jax.random.normal(k))(key)

class Reader(eqx.Module):
    cell: eqx.nn.GRUCell

    def __call__(self, values, *, times, mask, key=None):
        seen = jnp.concatenate([values, mask, times[:, None]], axis=1)

        def step(hidden, row):
            new = self.cell(row, hidden)
            return jnp.where(row[2:4].any(), new, hidden), None

        hidden, _ = jax.lax.scan(step, jnp.zeros(self.cell.hidden_size), seen, reverse=True)
        mean, spread = hidden[:2], 0.1 * hidden[2:4]
        return mean if key is None else mean + spread * jax.random.normal(key, (2,))

def latent(key, *, input_shape, output_size):
    keys = jax.random.split(key, 3)
    field = eqx.nn.MLP(2, 2, 8, 1, activation=jnp.tanh, key=keys[1])
    decoder = eqx.nn.MLP(2, 2, 8, 1, key=keys[2])
    reader = Reader(eqx.nn.GRUCell(5, 6, key=keys[0]))
    return EncodeProcessDecode(reader, lambda t, u, args: field(u), decoder)
"""

DROPPING = """
import equinox as eqx, jax, jax.numpy as jnp
from nodepint_mpi.models.networks import EncodeProcessDecode, Identity

class Dropping(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __call__(self, t, u, args, *, key=None):
        hidden = jnp.tanh(self.first(u))
        if key is not None:
            hidden = jnp.where(jax.random.bernoulli(key, 0.5, hidden.shape), 2 * hidden, 0.0)
        return self.last(hidden)

def make(key, *, input_shape, output_size):
    a, b = jax.random.split(key)
    field = Dropping(eqx.nn.Linear(2, 8, key=a), eqx.nn.Linear(8, 2, key=b))
    return EncodeProcessDecode(Identity(), field, Identity())
"""


@pytest.mark.mpi(max_size=1)
def test_losses_terms_and_encoders_get_what_they_ask_for(comms, shared_tmp_path):
    """A variational latent ODE on series with times and numbers of observations of their own."""
    folder = save(comms, shared_tmp_path / "set", make_rows("own times"))
    file = shared_tmp_path / "own_latent.py"
    if comms.control.rank == 0:
        text = OWN.replace("lambda t, u, args: field(u)", "Flow(field)").replace(
            "def latent", "class Flow(eqx.Module):\n    mlp: eqx.nn.MLP\n\n"
            "    def __call__(self, t, u, args):\n        return self.mlp(u)\n\ndef latent"
        )  # fmt: skip
        file.write_text(text)
    comms.control.Barrier()
    terms = f'[{{ name = "{file}:penalty", weight = 0.01 }}, {{ name = "{file}:drawn" }}]'
    text = config_of(folder, "", "").replace("\nwidth = 8", "").replace('"mlp"', f'"{file}:latent"')
    text = text.replace('name = "mean_squared_error"', f'name = "{file}:loss"\nterms = {terms}')
    made = make(text, comms)
    check_step(made, 3)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("common", marks=pytest.mark.mpi(max_size=2)),
        pytest.param("own times", marks=pytest.mark.mpi(max_size=1)),
    ],
)
def test_dropout_inside_the_field(comms, on_one_rank, shared_tmp_path, kind):
    """One key a sample and step: plain diffrax has the same gradient, any ranks the same losses."""
    folder = save(comms, shared_tmp_path / "set", make_rows(kind))
    file = shared_tmp_path / "dropping.py"
    if comms.control.rank == 0:
        file.write_text(DROPPING)
    comms.control.Barrier()
    text = config_of(folder, "", "").replace("\nwidth = 8", "").replace('"mlp"', f'"{file}:make"')
    made = make(text, comms)
    found = losses(made, 4)
    if comms.time.size > 1:
        alone_ = on_one_rank(lambda: losses(make(text, make_comms(alone())), 4))
        np.testing.assert_allclose(found, alone_, rtol=1e-10)
        return
    check_step(made, 3)
    experiment, stepper = made
    state = fresh_state(experiment)
    first, other = (stepper.take(state, experiment.batch(step), step) for step in (0, 1))
    assert abs(float(first.report.loss - other.report.loss)) > 1e-3  # other units are dropped
    # What is dropped, drawn by hand from seed, step and row.
    model: Any = eqx.combine(state.params, experiment.train_problem.static)
    batch = experiment.whole_batch(0)
    total = 0.0
    for row, times, wanted in zip(batch.rows, batch.times, batch.targets, strict=True):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), row)
        kept = 2.0 * np.asarray(jax.random.bernoulli(key, 0.5, (8,)))
        a, b = model.processor.first, model.processor.last

        def slope(t, u, a=a, b=b, kept=kept):
            return b.weight @ (kept * np.tanh(a.weight @ u + a.bias)) + b.bias

        if kind == "common":
            solved = solve_ivp(slope, (0, LAST), wanted[0], t_eval=times, rtol=1e-9, atol=1e-9)
            total += float(np.mean((solved.y.T[1:] - wanted[1:]) ** 2)) / N_ROWS
    if kind == "common":
        np.testing.assert_allclose(float(first.report.loss), total, rtol=1e-5)


@pytest.mark.mpi(max_size=1)
def test_a_field_works_without_its_key(comms, shared_tmp_path):
    file = shared_tmp_path / "keyed.py"
    folder = save(comms, shared_tmp_path / "set", make_rows("common"))
    if comms.control.rank == 0:
        file.write_text(DROPPING.replace("key=None", "key"))
    comms.control.Barrier()
    text = config_of(folder, "", "").replace("\nwidth = 8", "").replace('"mlp"', f'"{file}:make"')
    with pytest.raises(ProblemError, match="write `key=None`"):
        set_up(parse_config(text), comms)
