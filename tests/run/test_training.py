"""Training steps in one process per rank: rank independence, equal bits, no recompilation."""

from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.config import parse_config
from nodepint_mpi.parallel.comms import Comms, alone, make_comms
from nodepint_mpi.run.setup import fresh_state, set_up
from nodepint_mpi.run.step import make_train_step

TEXT = """
[run]
name = "test"
precision = "float64"
[data]
source = "{source}"
input = "u"
target = "u"
times = "t"
[network]
name = "mlp"
width = 8
[loss]
name = "mean_squared_error"
[optim]
learning_rate = 0.02
[time]
horizon = [0.0, 2.0]
n_slices = 7
{options}
fine = {{ solver = "rk4", n_steps = 4 }}
coarse = {{ solver = "euler", n_steps = 2 }}
stopping = {{ tol = 1e-12 }}
adjoint = {{ tol = 1e-12 }}
"""


FEW_RANKS = pytest.mark.mpi(max_size=2)  # the others compile for minutes


@pytest.fixture
def source(comms, shared_tmp_path):
    """A few damped rotations, observed at times on and between the slice boundaries."""
    if comms.control.rank == 0:
        t = np.linspace(0.0, 2.0, 9)
        start = np.random.default_rng(0).uniform(0.5, 1.5, (6, 2))
        turn = np.exp((-0.2 + 2.0j) * t)
        z = (start[:, :1] + 1j * start[:, 1:]) * turn
        rows = {"t": [t.tolist()] * 6, "u": np.stack([z.real, z.imag], axis=-1).tolist()}
        split = datasets.Dataset.from_dict(rows)
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(
            str(shared_tmp_path / "set")
        )
    comms.control.Barrier()
    return shared_tmp_path / "set"


def train(comms: Comms, text: str, n_steps: int):
    """Losses of the first steps, the last state, and how often the step was traced."""
    experiment = set_up(parse_config(text), comms)
    warm = experiment.config.time.warm_start
    step: Any = make_train_step(experiment.train_problem, experiment.optimiser, warm_start=warm)
    state, losses = fresh_state(experiment), []
    for k in range(n_steps):
        state, report = step(state, *map(jnp.asarray, experiment.train.batch(0, k)))
        assert report.finite
        losses.append(float(report.loss))
    return np.array(losses), state, step._cache_size()


@pytest.mark.standard_promotion
@pytest.mark.timeout_s(300)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param('method = "parareal"', id="parareal"),
        pytest.param('method = "picard"\nwarm_start = true', id="picard-warm", marks=FEW_RANKS),
        pytest.param("warm_start = true", id="parareal-warm", marks=FEW_RANKS),
        pytest.param(
            'method = "tangent"\nwarm_start = true\nbasis = { kind = "jumps", rank = 2, new = 1 }',
            id="tangent-warm",
        ),
    ],
)
def test_twenty_steps_do_not_depend_on_the_ranks(comms, source, options):
    text = TEXT.format(source=source, options=options)
    losses, state, n_traces = train(comms, text, 20)
    emulated, _, _ = train(make_comms(alone()), text, 20)
    np.testing.assert_allclose(losses, emulated, rtol=1e-10)
    assert losses[-1] < 0.8 * losses[0]
    assert n_traces == (2 if "warm" in options else 1)
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]
    assert comms.control.allgather(bits) == [bits] * comms.control.size
