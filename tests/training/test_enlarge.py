"""Training with a network that grows: on any ranks, and across a resume."""

from typing import Any

import datasets
import jax
import numpy as np
import pytest

from nodepint_mpi.build.optimizers import averaged_of
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.parallel.comms import alone, make_comms
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.rom.export import export_rom
from nodepint_mpi.rom.load import load_rom
from nodepint_mpi.training.enlarge import grow
from nodepint_mpi.training.evaluate import open_run
from nodepint_mpi.training.setup import fresh_state, set_up
from nodepint_mpi.training.step import make_train_step
from nodepint_mpi.training.train import train
from tests.training.small_config import EXACT, small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]

GROWTH = """
[growth]
steps = [3, 5]
sizes = [3, 4]
"""
OUTPUT = """
[output]
log_every = 1
checkpoint_every = 3
keep = 9
"""


def config_text(source, method="tangent", growth=GROWTH):
    return small_config(
        source,
        f'method = "{method}"\nbasis = {{ kind = "learned" }}\n{EXACT}',
        n_slices=5,
        horizon=1.0,
        steps='fine = { solver = "rk4", n_steps = 2 }',
        run="n_steps = 8",
        network='name = "mlp"\nwidth = 6\nlatent = 2',
        sections=growth + OUTPUT,
    )


@pytest.fixture
def source(comms, shared_tmp_path):
    """Decaying oscillations of six numbers, seen through two, then three, then four of them."""
    if comms.control.rank == 0:
        t = np.linspace(0.0, 1.0, 6)
        start = np.random.default_rng(0).normal(size=(5, 1, 6))
        u = start * np.exp(-t[:, None] * np.arange(1, 7)) * [4, 3, 2, 1, 0.5, 0.1]
        rows = {"t": [t.tolist()] * 5, "u": u.tolist()}
        split = datasets.Dataset.from_dict(rows)
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(
            str(shared_tmp_path / "set")
        )
    comms.control.Barrier()
    return shared_tmp_path / "set"


def size_of(run):
    (encoder,) = jax.tree.leaves(run.params.encoder)
    return len(encoder)


@pytest.mark.mpi(max_size=1)
def test_runs_grow_and_resume_on_any_ranks(comms, source, shared_tmp_path):
    config = parse_config(config_text(source, "serial"))  # compiles faster
    flag = StopFlag()
    whole = train(config, shared_tmp_path / "whole", comms, flag)
    run = open_run(shared_tmp_path / "whole", comms)
    assert run.step == 8 and size_of(run) == 4
    # Stopped where it grows (3 steps done, and the network still small), and after it grew (4).
    folder, resume = shared_tmp_path / "stopped", None
    for stop, size in ((3, 2), (4, 3)):
        first = config.model_copy(update={"run": config.run.model_copy(update={"n_steps": stop})})
        train(first, folder, comms, flag, resume=resume)
        assert size_of(open_run(folder, comms)) == size
        resume = "auto"
    resumed = train(config, folder, comms, flag, resume=resume)
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-10)
    made = export_rom(shared_tmp_path / "whole", shared_tmp_path / "rom.h5", comms)
    assert made["state_size"] == 4
    assert load_rom(shared_tmp_path / "rom.h5").origin.optimizer_step == 8


def losses_of(comms, text, n_steps):
    experiment = set_up(parse_config(text), comms)
    state, losses = fresh_state(experiment), []
    step = make_train_step(experiment.train_problem, experiment.update)
    for k in range(n_steps):
        batch = experiment.batch(k)
        if k == 3:
            experiment, state = grow(comms, experiment, state, batch.rows, k)
            problem, update = experiment.train_problem, experiment.update
            step = make_train_step(problem, update)
        state, _, report, *_ = step(state, batch.data, None)
        losses.append(float(report.loss))
    return np.array(losses), state


@pytest.mark.mpi(2, 2)
def test_the_loss_goes_on_where_it_was_and_any_ranks_agree(comms, on_one_rank, source):
    text = config_text(source)
    losses, state = losses_of(comms, text, 5)
    emulated = on_one_rank(lambda: losses_of(make_comms(alone()), text, 5)[0])
    np.testing.assert_allclose(losses, emulated, rtol=1e-9)
    # The step at which the network grows sees the loss that it would have had without.
    experiment = set_up(parse_config(config_text(source, growth="")), comms)
    fixed, plain_losses = fresh_state(experiment), []
    step = make_train_step(experiment.train_problem, experiment.update)
    for k in range(4):
        fixed, _, report, *_ = step(
            fixed, experiment.train.take(experiment.train.batch_rows(0, k)), None
        )
        plain_losses.append(float(report.loss))
    np.testing.assert_allclose(losses[:4], plain_losses, rtol=1e-9)
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]
    assert comms.control.allgather(bits) == [bits] * comms.control.size


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "change, error, message",
    [
        (("sizes = [3, 4]", "sizes = [3, 7]"), ProblemError, "`network.latent` is 7"),
        (("sizes = [3, 4]", "sizes = [2, 4]"), ConfigError, "above the first size, 2"),
        (("sizes = [3, 4]", "sizes = [4, 3]"), ConfigError, "strictly increasing"),
        (("sizes = [3, 4]", "sizes = [3]"), ConfigError, "as many `sizes` as `steps`"),
        (("latent = 2", ""), ConfigError, "with `latent`, or 'conv'"),
        (("learning_rate", "name = 'adafactor'\nlearning_rate"), ConfigError, "adafactor"),
    ],
)
def test_growth_that_cannot_be_is_refused(comms, source, change, error, message):
    with pytest.raises(error, match=message):
        losses_of(comms, config_text(source).replace(*change), 4)


@pytest.mark.mpi(max_size=1)
def test_the_average_starts_anew_when_the_network_grows(comms, source):
    text = config_text(source, "serial", "[growth]\nsteps = [4]\nsizes = [3]\n")
    text = text.replace(
        "learning_rate = 0.02",
        'learning_rate = 0.02\naverage = 0.9\naccumulate = 2\n[[optim.groups]]\n'
        'match = ["encoder.*"]\nfrozen = true',
    )  # fmt: skip
    experiment = set_up(parse_config(text), comms)
    state = fresh_state(experiment)
    opt_state: Any = state.opt_state
    for _ in range(2):
        _, opt_state = experiment.update.optimizer.update(state.params, opt_state, state.params)
    state = state._replace(opt_state=opt_state)
    section = experiment.config.optim
    before = averaged_of(section, state.params, opt_state)
    assert int(opt_state.inner_opt_state.n_averaged) == 1
    assert not np.allclose(*(jax.tree.leaves(t)[1] for t in (before, state.params)))
    _, grown = grow(comms, experiment, state, experiment.batch(4).rows, 4)
    after: Any = grown.opt_state
    assert int(after.inner_opt_state.n_averaged) == 0
    anew = averaged_of(section, grown.params, grown.opt_state)
    jax.tree.map(np.testing.assert_array_equal, anew, grown.params)
    with pytest.raises(ConfigError, match="multiples of `optim.accumulate`"):
        parse_config(text.replace("steps = [4]", "steps = [3]"))
