"""Stochastic training that is saved on one grid of ranks and goes on on another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.stochastic import NoisyArgs
from nodepint_mpi.core.sweeps import end_times
from nodepint_mpi.parallel.comms import alone, make_comms, world
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.saving import resume_run, save_run
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.test_noise import LAST, N_FINE, N_SLICES, model_file, text

__all__ = ["model_file", "text"]  # fixtures
pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]
SAVED, MORE = 2, 2
GRIDS = {"one rank": None, "2 along time": 1, "2 along samples": 2}


def made_on(name: str):
    """A grid of two ranks, or each of them alone."""
    groups = GRIDS[name]
    return make_comms(alone()) if groups is None else make_comms(world(), n_groups=groups)


def steps(experiment, state, stepper, first, n):
    found = []
    for k in range(first, first + n):
        taken = stepper.take(state, experiment.batch(k), k)
        state = taken.state
        found.append(float(taken.report.loss))
    return found, state


def increments(experiment, step: int) -> dict[int, np.ndarray]:
    """Of this rank's slices in a step, (slices, fine steps, 2), by the global row."""
    problem, batch = experiment.train_problem, experiment.batch(step)
    noise, owned = problem.noise, problem.observations.owned
    field = noise.field(max, max, (2,))
    times = end_times(owned, jnp.zeros(()))
    keys = noise.keys(jnp.asarray(batch.rows), jnp.asarray(step))

    def draw(key, index, length):
        return field.draw(NoisyArgs(None, key), index, length, N_FINE).w

    of_slices = jax.vmap(draw, in_axes=(None, 0, 0))
    drawn = jax.jit(jax.vmap(of_slices, in_axes=(0, None, None)))(
        keys, times.global_index, times.length
    )
    return dict(zip(np.asarray(batch.rows).tolist(), np.asarray(drawn), strict=True))


def by_hand(row: int, step: int | None) -> np.ndarray:
    """The same of all slices from seed, row, step and number by JAX alone."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0x4E6F6973), row)
    key = key if step is None else jax.random.fold_in(key, step)
    widths = np.diff(np.linspace(0.0, LAST, N_SLICES + 1)) / N_FINE

    def one(number):
        own = jax.random.fold_in(jax.random.fold_in(key, number), 0)
        return jax.random.normal(own, (2,), float)

    normals = np.asarray(jax.vmap(one)(jnp.arange(N_SLICES * N_FINE)))
    return np.sqrt(widths)[:, None, None] * normals.reshape(N_SLICES, N_FINE, 2)


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize(
    "paths, options, grids",
    [
        ("fresh", "", ["2 along samples", "2 along time"]),
        ("common", "tracking = {}", ["one rank"]),
    ],
)
def test_a_run_goes_on_with_its_paths_on_any_grid(shared_tmp_path, text, paths, options, grids):
    config = parse_config(text(f'seed = 5\npaths = "{paths}"', options=options))
    folder, saved_on = shared_tmp_path / "run", "2 along samples"
    if world().rank == 0:
        (folder / "ckpt").mkdir(parents=True)
    world().Barrier()
    grid = made_on(saved_on)
    experiment = set_up(config, grid)
    stepper = make_stepper(experiment)
    _, reached = steps(experiment, fresh_state(experiment), stepper, 0, SAVED)
    save_run(experiment, folder, reached, stepper, SAVED)
    wanted, _ = steps(experiment, reached, stepper, SAVED, MORE)
    for name in grids:
        grid = made_on(name)
        resumed = resume_run(set_up(config, grid), folder, "auto")
        assert resumed.step == SAVED
        drawn = increments(resumed.experiment, SAVED)
        owned = resumed.experiment.train_problem.observations.owned
        for row, mine in drawn.items():
            whole = by_hand(row, SAVED if paths == "fresh" else None)
            np.testing.assert_array_equal(mine, whole[owned.indices])
        losses, _ = steps(resumed.experiment, resumed.state, resumed.stepper, SAVED, MORE)
        if name == saved_on:
            assert losses == wanted  # to the last bit
        np.testing.assert_allclose(losses, wanted, rtol=1e-12)
        jax.effects_barrier()
