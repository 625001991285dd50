"""Ranks along time and along samples: the run is the same on every grid of them."""

import datasets
import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.errors import ConfigError, LayoutError, ProblemError
from nodepint_mpi.parallel.comms import alone, free_comms, make_comms, world
from nodepint_mpi.parallel.dealing import join_samples, own_part, split_samples
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.evaluate import deal_rows, evaluate
from nodepint_mpi.training.saving import resume_run, save_run
from nodepint_mpi.training.setup import fresh_state, set_up, slice_rows
from tests.training.small_config import small_config

N_TRAIN, N_TEST = 12, 5
STOPPING = "stopping = { tol = 1e-12 }\n"
MINI_BATCHES = "tracking = { check_every = 8 }", "batch_size = {}"
TANGENTS = 'method = "tangent"\nbasis = { kind = "jumps", rank = 2, new = 1 }\ntracking = {}', ""

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]


@pytest.fixture
def source(comms, shared_tmp_path):
    """Damped rotations; the test split is one that two, three or four groups cannot share."""
    if comms.control.rank == 0:
        t = np.linspace(0.0, 2.0, 6)
        start = np.random.default_rng(0).uniform(0.5, 1.5, (N_TRAIN + N_TEST, 2))
        z = (start[:, :1] + 1j * start[:, 1:]) * np.exp((-0.2 + 2.0j) * t)
        u = np.stack([z.real, z.imag], axis=-1)
        splits = {"train": u[:N_TRAIN], "test": u[N_TRAIN:]}
        datasets.DatasetDict({
            name: datasets.Dataset.from_dict({"t": [t.tolist()] * len(part), "u": part.tolist()})
            for name, part in splits.items()
        }).save_to_disk(str(shared_tmp_path / "set"))  # fmt: skip
    comms.control.Barrier()
    return shared_tmp_path / "set"


def take_steps(experiment, state, stepper, first, last):
    """Losses of steps `first` to `last`, and the state they led to."""
    losses = []
    for step in range(first, last):
        taken = stepper.take(state, experiment.batch(step), step)
        losses.append(float(taken.report.loss))
        state = taken.state
    return losses, state


def flat(state):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


@pytest.mark.mpi(sizes=(2, 4))
def test_any_grid_trains_alike_and_goes_on_from_any_other(source, on_one_rank, shared_tmp_path):
    """With tracked mini-batches, whose tracks change lines with their samples."""
    check_grids(source, on_one_rank, shared_tmp_path, *MINI_BATCHES)


@pytest.mark.mpi(sizes=(2, 4))
def test_any_grid_finds_the_same_basis_and_tangents(source, on_one_rank, shared_tmp_path):
    """Of time x data x basis 1 x 2 x 1 and 1 x 1 x 2, and on four ranks 1 x 2 x 2."""
    grids = {2: [(2, 1), (1, 2)], 4: [(2, 2)]}[world().size]
    check_grids(source, on_one_rank, shared_tmp_path, *TANGENTS, grids=grids)


def check_grids(source, on_one_rank, shared_tmp_path, options, batch, grids=None):
    """Ten steps on a grid, saved, ten more on another; all against one rank alone.

    Grids are numbers of groups and of ranks that share tangents.
    """
    size = world().size
    grids = grids or [(n, 1) for n in range(2, size + 1) if size % n == 0]
    batch = batch.format(3 if size == 3 else 4)
    text = small_config(source, STOPPING + options, n_slices=5, data=batch)
    config = parse_config(text)

    def emulate():
        experiment = set_up(config, make_comms(alone()))
        start, stepper = fresh_state(experiment), make_stepper(experiment)
        losses, state = take_steps(experiment, start, stepper, 0, 20)
        return losses, flat(state), evaluate(experiment.comms, experiment, state.params)

    losses, wanted, scores = on_one_rank(emulate)
    sharded = parse_config(text, ["run.sharded_update=true"])
    for n_groups, n_basis in grids:
        folder = shared_tmp_path / f"run-{n_groups}-{n_basis}"
        if world().rank == 0:
            (folder / "ckpt").mkdir(parents=True)
        world().Barrier()
        grid = make_comms(world(), n_groups=n_groups, n_basis=n_basis)
        experiment = set_up(sharded, grid)
        assert experiment.state.shape[0] * n_groups == len(experiment.batch(0).rows)
        start, stepper = fresh_state(experiment), make_stepper(experiment)
        begun, reached = take_steps(experiment, start, stepper, 0, 10)
        bits = flat(reached).tobytes()
        assert grid.control.allgather(bits) == [bits] * size
        save_run(experiment, folder, reached, stepper, 10)
        if n_groups == size or n_basis > 1:
            found = evaluate(grid, experiment, ravel_pytree(start.params)[1](wanted))
            assert found == pytest.approx(scores, rel=1e-10)
        if n_basis > 1 and size > 2:
            line = make_comms(world(), n_basis=n_basis)
        else:
            line = make_comms(world(), n_groups=1 if n_groups == size else size)
        resumed = resume_run(set_up(config, line), folder, "auto")
        assert resumed.step == 10
        np.testing.assert_array_equal(flat(resumed.state), flat(reached))
        rest, ended = take_steps(resumed.experiment, resumed.state, resumed.stepper, 10, 20)
        np.testing.assert_allclose(begun + rest, losses, rtol=1e-10)
        np.testing.assert_allclose(flat(ended), wanted, rtol=1e-9, atol=1e-10)
        jax.effects_barrier()
        free_comms(grid)
        free_comms(line)
    assert losses[-1] < losses[0]


def test_samples_change_groups_and_come_back(comms):
    """Rows (slices, samples) are joined whatever the grid, each once, and split again."""
    size = world().size
    whole = np.arange(7 * 5 * 2).reshape(7, 5, 2)
    for n_groups in [n for n in range(1, size + 1) if size % n == 0]:
        grid = make_comms(world(), n_groups=n_groups)
        owned = owned_range(7, grid.time.size, grid.time.rank)
        block = whole[owned.start : owned.stop]
        mine = split_samples(grid.time, {"a": block, "b": block[..., 0]})
        assert mine["a"].shape[1] == len(range(5)[own_part(grid.time, 5)])
        joined, first = join_samples(grid.data, mine, owned.start)
        np.testing.assert_array_equal(joined["a"], whole[first : first + len(joined["a"])])
        np.testing.assert_array_equal(joined["b"], joined["a"][..., 0])
        held = comms.control.allgather(list(range(first, first + len(joined["a"]))))
        assert sorted(sum(held, [])) == list(range(7))
        free_comms(grid)


def test_rows_to_score_are_dealt_once_each(comms):
    size = world().size
    for n_rows, batch in ((11, 4), (2, 500), (12, 3), (1, 1)):
        grid = make_comms(world(), n_groups=size)
        dealt = list(deal_rows(grid.time, n_rows, batch))
        everybody = comms.control.allgather(dealt)
        assert {len(part) for part in everybody} == {len(dealt)}
        counted = [rows.tolist() for part in everybody for rows, counts in part if counts]
        assert sorted(sum(counted, [])) == list(range(n_rows))
        assert len({tuple(len(rows) for rows, _ in part) for part in everybody}) == 1
        free_comms(grid)


@pytest.mark.mpi(min_size=2)
def test_a_grid_that_does_not_fit_is_refused(source, comms):
    size = world().size
    with pytest.raises(LayoutError, match=f"{size} ranks cannot form {size + 1} lines"):
        make_comms(world(), n_groups=size + 1)
    text = small_config(source, n_slices=5, data="batch_size = 7")
    grid = make_comms(world(), n_groups=size)
    with pytest.raises(ConfigError, match="7 samples, which .* `run.data_ranks` to one of 1, 7"):
        set_up(parse_config(text), grid)
    free_comms(grid)
    grid = make_comms(world(), n_basis=size)
    with pytest.raises(ProblemError, match=f"{size} ranks are to share .* Parareal has none"):
        set_up(parse_config(small_config(source, n_slices=5)), grid)
    free_comms(grid)
    assert slice_rows(parse_config(text), comms.time)[1] >= 1
