"""The encoder dealt over the ranks of a line: the same step, and where it should pay."""

import equinox as eqx
import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from nodepint_mpi.bench.planning.lines import Layout, imagined_line
from nodepint_mpi.bench.planning.recording import StepRecorder
from nodepint_mpi.bench.planning.stages import Sweeps, count_work
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.scopes import ENCODER
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.parallel.comms import alone, free_comms, make_comms, world
from nodepint_mpi.training.encoder import deals_encoder, saves_time
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.evaluate import evaluate
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.small_config import small_config

pytestmark = pytest.mark.standard_promotion

ENCODED = 'name = "mlp"\nwidth = 8\nlatent = 2'
TRACKED = "tracking = { bound = 1e9, check_every = 0 }"


def config_of(source, run="", options=TRACKED, data="batch_size = 3"):
    return parse_config(small_config(source, options, run=run, data=data, network=ENCODED))


def take_two(comms, config):
    """Losses, gradient and scores of two steps; the second batch has other samples."""
    experiment = set_up(config, comms)
    stepper, state, losses = make_stepper(experiment), fresh_state(experiment), []
    gradient = None
    for step in range(2):
        taken = stepper.take(state, experiment.batch(step), step)
        losses.append(float(taken.report.loss))
        gradient, state = experiment.update.whole_params(taken.gradient), taken.state
    scores = evaluate(comms, experiment, state.params)
    return losses, ravel_pytree(gradient)[0], scores, experiment.train_problem.dealt_encoder


@pytest.mark.timeout_s(200)
@pytest.mark.parametrize(
    ("options", "n_groups"),
    [
        pytest.param(TRACKED, 1, marks=pytest.mark.mpi(sizes=(2, 3, 4))),
        pytest.param("stopping = { tol = 1e-12 }", 1, marks=pytest.mark.mpi(sizes=(2, 3, 4))),
        pytest.param(TRACKED, 2, marks=pytest.mark.mpi(sizes=(2, 4))),
    ],
)
def test_a_step_is_that_of_one_rank(source, on_one_rank, options, n_groups):
    """Of three samples: on four ranks one of them encodes none."""
    data = "batch_size = 4" if n_groups > 1 else "batch_size = 3"
    run = f"dealt_encoder = true\ndata_ranks = {n_groups}"
    comms = make_comms(world(), n_groups=n_groups)
    try:
        losses, gradient, scores, dealt = take_two(comms, config_of(source, run, options, data))
        assert dealt == (comms.time.size > 1)
    finally:
        jax.effects_barrier()
        free_comms(comms)

    def by_one():
        return take_two(make_comms(alone()), config_of(source, "", options, data))

    one = on_one_rank(by_one)
    assert not one[3]
    np.testing.assert_allclose(losses, one[0], rtol=1e-10)
    np.testing.assert_allclose(gradient, one[1], rtol=1e-9, atol=1e-12)
    assert scores == pytest.approx(one[2], rel=1e-9)


@pytest.mark.mpi(max_size=1)
def test_every_rank_of_a_plan_encodes_its_share(source):
    for run, wanted in (("", [1, 0, 0]), ("dealt_encoder = true", [2 / 5, 2 / 5, 1 / 5])):
        line = StepRecorder.of(config_of(source, run, data="batch_size = 5")).line(Layout(3))
        counted = count_work(line, Sweeps())[ENCODER, "encoded"]
        assert counted.tolist() == pytest.approx(wanted)


@pytest.mark.mpi(max_size=1)
def test_it_is_dealt_where_more_is_saved_than_twice_what_messages_cost():
    # Two ranks save half of 3 passes; a round each way of 20 us, and 1e-9 s for a byte.
    costs = 2 * (2e-5 + 64 * 40 * 1e-9)
    enough = 2 * costs * 5e9 / (3 * 32)
    assert saves_time(2, 64, 1.01 * enough, 40) and not saves_time(2, 64, 0.99 * enough, 40)
    # With a sample there is nothing to share, with more ranks there are more rounds.
    assert not saves_time(2, 1, 1e12, 40)
    assert not saves_time(64, 64, 1.5 * enough, 40) and saves_time(8, 64, 2.0 * enough, 40)


@pytest.mark.mpi(max_size=1)
def test_a_large_encoder_is_dealt_of_itself(source):
    samples = StepRecorder.of(config_of(source))._samples
    line = imagined_line(Layout(2), 0)
    for width, wanted in ((8, False), (2000, True)):
        encoder = eqx.nn.MLP(2, 3, width, 2, key=jax.random.key(0))
        model = EncodeProcessDecode(encoder, lambda t, u, args: u, eqx.nn.Identity())
        assert deals_encoder(config_of(source), line, model, samples) == wanted
        for given in (False, True):
            asked = config_of(source, f"dealt_encoder = {str(given).lower()}")
            assert deals_encoder(asked, line, model, samples) == given
    assert not deals_encoder(
        config_of(source, "dealt_encoder = true"), imagined_line(Layout(1), 0), model, samples
    )
