"""Random basis descent on grids of ranks: against NumPy and optax, and against one rank's run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.random_basis import RandomBasis, Segment, direction_keys, draw
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import free_comms, make_comms, world
from nodepint_mpi.parallel.counters import WORD_BYTES, Tally
from nodepint_mpi.parallel.warm_start import Misfits
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.plain import make_plain_stepper
from nodepint_mpi.training.random_descent import RandomDescent
from nodepint_mpi.training.saving import resume_run, save_run
from nodepint_mpi.training.setup import fresh_state, set_up
from nodepint_mpi.training.train_state import Sums, TrainState
from nodepint_mpi.training.update import Update
from tests.training.small_config import small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]

SHAPES = {"field": {"w": (16, 12), "b": (12,)}, "frozen": (9,), "scale": ()}
TRAINED = [True, True, False, True]  # in the order of the leaves: b, w, frozen, scale
N_STEPS = 3
OPTIMIZERS = {"sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(0.1)}


def filled(seed):
    key, (shapes, structure) = jax.random.key(seed), jax.tree.flatten(SHAPES, is_leaf=is_shape)
    keys = jax.random.split(key, len(shapes))
    leaves = [jax.random.normal(*one) for one in zip(keys, shapes, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def is_shape(one):
    return isinstance(one, tuple)


def by_hand(basis, optimizer):
    """Parameters after some steps, by optax on gradients that NumPy projects."""
    params, state, flat = filled(0), optimizer.init(filled(0)), np.zeros(0)
    for step in range(N_STEPS):
        leaves, structure = jax.tree.flatten(filled(step + 1))
        flat = np.concatenate(
            [np.ravel(x) for x, used in zip(leaves, TRAINED, strict=True) if used]
        )
        keys = direction_keys(basis, jnp.array(step), jnp.arange(basis.n_directions))
        rows = np.asarray(draw(basis.kind, keys, [Segment(0, flat.size)], float))
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        flat = rows.T @ (rows @ flat) * (flat.size / len(rows) if basis.unbiased else 1.0)
        parts, taken = [], 0
        for leaf, used in zip(leaves, TRAINED, strict=True):
            parts.append(flat[taken : taken + leaf.size].reshape(leaf.shape) if used else 0 * leaf)
            taken += leaf.size if used else 0
        updates, state = optimizer.update(jax.tree.unflatten(structure, parts), state, params)
        params = optax.apply_updates(params, updates)
    return params, np.linalg.norm(flat)


def stepped(comm, update):
    """The same on a grid, each of whose ranks has a part of twice the gradient."""
    lines = comm.size * comm.n_groups
    place = comm.grid_rank // comm.n_basis
    weight = 2 * (place + 1) / (lines * (lines + 1) / 2)
    state, zero, seen = TrainState(filled(0), update.init(filled(0))), jnp.zeros(()), None
    for step in range(N_STEPS):
        part = jax.tree.map(lambda x: x * weight, filled(step + 1))
        sums = Sums(jnp.ones(()), jnp.array(2.0 / lines), Misfits(zero, zero, zero, zero))
        state, _, seen = update(
            lambda updated: (updated.grad_norm, updated.loss, updated.tally), state, part, sums,
            step=jnp.array(step),
        )  # fmt: skip
        bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]
        assert world().allgather(bits) == [bits] * world().size
    assert seen is not None
    return state, seen


@pytest.mark.parametrize("kind", ["signs", "normal", "hadamard"])
@pytest.mark.parametrize("sharded", [None, True])
def test_ranks_with_some_directions_equal_one_with_all(on_one_rank, kind, sharded):
    """Along time, along the basis, and both: the steps that one makes by hand, on all ranks."""
    size = world().size
    name = "sgd" if kind == "signs" else "adam"
    basis, optimizer = (
        RandomBasis(11, seed=2, kind=kind, unbiased=sharded is None),
        OPTIMIZERS[name],
    )
    params, norm = on_one_rank(lambda: by_hand(basis, optimizer))
    for n_groups, n_basis in {(1, 1), (1, size), (size // 2 or 1, 1), (1, 2 if size == 4 else 1)}:
        grid = make_comms(world(), n_groups=n_groups, n_basis=n_basis)
        descent = RandomDescent(grid.time, basis, filled(0), trained=TRAINED)
        update = Update(grid.time, optimizer, filled(0), sharded=sharded, descent=descent)
        assert update.is_sharded == (sharded is True and size > 1)
        state, (grad_norm, loss, _) = stepped(grid.time, update)
        for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)
        assert float(grad_norm) == pytest.approx(norm, rel=1e-12)
        assert float(loss) == pytest.approx(size / n_basis / 2, rel=1e-12)
        free_comms(grid)


@pytest.mark.mpi(2, 2)
def test_ranks_send_coefficients_only(comms):
    comm, basis = comms.time, RandomBasis(11)
    descent = RandomDescent(comm, basis, filled(0))
    update = Update(comm, optax.sgd(0.1), filled(0), descent=descent)
    assert update.describe().startswith("on every rank: ranks send coefficients")
    _, (_, _, tally) = stepped(comm, update)
    sent = Tally(*np.asarray(tally).tolist()).words * WORD_BYTES
    assert sent == 8 * (2 * 11 + 6)  # and loss, divisor and misfits


@pytest.mark.mpi(max_size=1)
def test_directions_that_do_not_fit_are_refused(comms):
    with pytest.raises(ConfigError, match="is 214, but the network has only 205 parameters"):
        RandomDescent(comms.time, RandomBasis(214), filled(0), trained=TRAINED)
    mixed = {"w": jnp.zeros(8), "b": jnp.zeros(8, jnp.float32)}
    with pytest.raises(ConfigError, match="one real type; the network has float32, float64"):
        RandomDescent(comms.time, RandomBasis(2), mixed)


def config_of(source, keys, *, time="stopping = { tol = 1e-12 }", run="", more=()):
    text = small_config(source, time, n_slices=5, run=run, data="batch_size = 4")
    return parse_config(text, [f"optim.random_basis={{ {keys} }}", "optim.name=sgd", *more])


def walk(experiment, state, stepper, first, last):
    report = None
    for step in range(first, last):
        taken = stepper.take(state, experiment.batch(step), step)
        state, report = taken.state, taken.report
    assert report is not None
    return state, report


def flat(state):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


def run_alone(config, make=make_stepper, n_steps=8):
    from nodepint_mpi.parallel.comms import alone

    grid = make_comms(alone())
    experiment = set_up(config, grid)
    stepper = make(experiment)
    state, report = walk(experiment, fresh_state(experiment), stepper, 0, n_steps)
    assert stepper.n_compiled() == 1
    jax.effects_barrier()
    free_comms(grid)
    return flat(state), float(report.loss), float(report.grad_norm)


@pytest.mark.mpi(max_size=1)
def test_tangents_find_the_coefficients_of_the_adjoint_gradient(source):
    """And plain diffrax the same; redrawn directions are other ones."""
    runs = {}
    for name, keys in {
        "projection": "dims = 6",
        "tangents": "dims = 6, by = 'tangents'",
        "fixed": "dims = 6, redraw = false",
    }.items():
        runs[name] = run_alone(config_of(source, keys))
    runs["plain"] = run_alone(config_of(source, "dims = 6"), make_plain_stepper)
    for name in ("tangents", "plain"):
        for one, other in zip(runs[name], runs["projection"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
    assert np.abs(runs["fixed"][0] - runs["projection"][0]).max() > 1e-4


WAYS = {
    "every": ("dims = 6", ["run.basis_ranks=2"], []),
    "sharded": ("dims = 6", ["run.sharded_update=true"], ["run.basis_ranks=2"]),
    "tangents": ("dims = 6, by = 'tangents'", [], ["run.basis_ranks=2"]),
}


@pytest.mark.mpi(sizes=(2, 4))
@pytest.mark.parametrize("way", WAYS)
def test_any_grid_takes_the_same_steps_and_goes_on_from_another(
    source, on_one_rank, shared_tmp_path, way
):
    """Five steps on a grid, saved, three more on another; all against one rank alone. Momentum is
    in the checkpoint."""
    keys, *grids = WAYS[way]
    momentum = ["optim.options={ momentum = 0.5 }"]
    wanted = on_one_rank(lambda: run_alone(config_of(source, keys, more=momentum)))
    first, other = (config_of(source, keys, more=momentum + grid) for grid in grids)
    if world().rank == 0:
        (shared_tmp_path / "ckpt").mkdir()
    world().Barrier()
    grid = make_comms(world(), n_basis=first.run.basis_ranks)
    experiment = set_up(first, grid)
    stepper = make_stepper(experiment)
    state, _ = walk(experiment, fresh_state(experiment), stepper, 0, 5)
    save_run(experiment, shared_tmp_path, state, stepper, 5)
    jax.effects_barrier()
    free_comms(grid)
    grid = make_comms(world(), n_basis=other.run.basis_ranks)
    resumed = resume_run(set_up(other, grid), shared_tmp_path, "auto")
    assert resumed.step == 5
    np.testing.assert_array_equal(flat(resumed.state), flat(state))
    state, report = walk(resumed.experiment, resumed.state, resumed.stepper, 5, 8)
    found = flat(state), float(report.loss), float(report.grad_norm)
    for one, another in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-9, atol=1e-11)
    bits = flat(state).tobytes()
    assert world().allgather(bits) == [bits] * world().size
    jax.effects_barrier()
    free_comms(grid)


@pytest.mark.mpi(max_size=1)
def test_tracked_steps_are_projected_too(source):
    tracked = config_of(source, "dims = 6", time="tracking = { bound = 1e-6 }")
    anew = run_alone(config_of(source, "dims = 6"))
    for one, other in zip(run_alone(tracked)[:2], anew, strict=False):
        np.testing.assert_allclose(one, other, rtol=1e-4)


REFUSED = {
    "dims = 0": "greater than",
    "dims = 3, by = 'tangent'": "'projection' or 'tangents'",
    "dims = 3, redaw = false": "did you mean `optim.random_basis.redraw`",
    "by = 'tangents'": "`optim.random_basis.dims`",
    "dims = 3, by = 'tangents'": "`\\[time.tracking\\]` needs the adjoint",
    "dims = 3, scale = 2": "'none' or 'unbiased'",
}


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("keys", REFUSED)
def test_keys_that_make_no_sense_are_refused(keys):
    with pytest.raises(ConfigError, match=REFUSED[keys]):
        config_of("x", keys, time="tracking = {}")


@pytest.mark.mpi(max_size=1)
def test_basis_ranks_share_directions_whatever_the_method():
    config = config_of("x", "dims = 3", run="basis_ranks = 3")
    assert config.time.method == "parareal"
    with pytest.raises(ConfigError, match="are more than the 3 directions"):
        config_of("x", "dims = 3", run="basis_ranks = 4")
