"""The example of a latent SDE: the same losses on any number of ranks, and by serial steps."""

import numpy as np
import pytest

from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.data.own import share_own_data
from nodepint_mpi.parallel.comms import alone, make_comms
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.plain import make_plain_stepper
from nodepint_mpi.training.setup import fresh_state, set_up

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]
SMALL = {
    "run.precision": "float64", "data.batch_size": 4, "time.stopping.tol": 1e-11,
    "time.adjoint.tol": 1e-11, "time.n_slices": 5, "time.fine.n_steps": 8,
    "network.options": {"latent": 2, "context": 2, "width": 8},
}  # fmt: skip
N_STEPS = 20


def losses(comms, make=make_stepper):
    config = share_own_data(comms.control, read_config("docs/examples/latent_sde.py", SMALL))
    experiment = set_up(config, comms)
    state, stepper, found = fresh_state(experiment), make(experiment), []
    for k in range(N_STEPS):
        taken = stepper.take(state, experiment.batch(k), k)
        state = taken.state
        found.append(float(taken.report.loss))
    return np.array(found)


@pytest.mark.mpi(min_size=2, max_size=2)
def test_twenty_losses_are_those_of_one_rank_and_of_plain_diffrax(comms, on_one_rank):
    found = losses(comms)
    np.testing.assert_allclose(found, on_one_rank(lambda: losses(make_comms(alone()))), rtol=1e-10)
    plain = on_one_rank(lambda: losses(make_comms(alone()), make_plain_stepper))
    np.testing.assert_allclose(found, plain, rtol=1e-8)
    assert found[-1] < found[0]
