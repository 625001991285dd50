"""The update on a grid of ranks against optax on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nodepint_mpi.build.optimizers import average_parameters
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.io.checkpoint import load_checkpoint, save_checkpoint
from nodepint_mpi.parallel.comms import alone, make_time_comm
from nodepint_mpi.parallel.counters import WORD_BYTES, Tally
from nodepint_mpi.parallel.warm_start import Misfits
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.memory import tree_bytes
from nodepint_mpi.training.setup import fresh_state, set_up
from nodepint_mpi.training.train_state import Sums, TrainState
from nodepint_mpi.training.update import Update
from tests.training.small_config import small_config

PARAMS = {"field": {"w": (16, 12), "b": (12,)}, "scale": ()}
"""205 parameters: pieces of 2, 3 and 4 ranks are filled up."""


def draw(seed):
    key = jax.random.key(seed)
    shapes, structure = jax.tree.flatten(PARAMS, is_leaf=lambda one: isinstance(one, tuple))
    keys = jax.random.split(key, len(shapes))
    return jax.tree.unflatten(
        structure, [jax.random.normal(*one) for one in zip(keys, shapes, strict=True)]
    )


def part_of(comm, tree):
    """What this rank adds to a sum that is twice the tree."""
    weights = np.arange(1.0, comm.n_grid + 1)
    return jax.tree.map(lambda x: 2 * x * weights[comm.grid_rank] / weights.sum(), tree)


def groups():
    labels = {"field": {"w": "slow", "b": "fast"}, "scale": "fast"}
    return optax.partition({"slow": optax.adam(1e-3), "fast": optax.sgd(1e-2, 0.9)}, labels)


OPTIMIZERS = {
    "adamw": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.exponential_decay(0.1, 2, 0.5))
    ),
    "lamb": optax.lamb(1e-2),  # norms of each array
    "groups": optax.chain(optax.clip_by_global_norm(0.1), groups()),
    "accumulated": optax.MultiSteps(
        average_parameters(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)), 0.9), 2
    ).gradient_transformation(),
}


def take(comm, update, n_steps=4):
    state, seen = TrainState(draw(0), update.init(draw(0))), None
    zero = jnp.zeros(())
    for step in range(n_steps):
        sums = Sums(jnp.ones(()), jnp.array(2.0 / comm.n_grid), Misfits(zero, zero, zero, zero))
        state, _, seen = update(
            lambda updated: updated._replace(state=None, gradient=None), state,
            part_of(comm, draw(step + 1)), sums,
        )  # fmt: skip
        bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]
        assert comm.control.allgather(bits) == [bits] * comm.n_grid
    assert seen is not None
    return state, seen


def reference(optimizer, n_steps=4):
    params, state = draw(0), optimizer.init(draw(0))

    @jax.jit
    def step(gradient, state, params):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(n_steps):
        params, state = step(draw(number + 1), state, params)
    return params, state


def same(found, wanted):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_steps_are_those_of_optax(comms, on_one_rank, shared_tmp_path, name):
    """Parameters, moments, norms; and on one rank what was saved on all."""
    comm, optimizer = comms.time, OPTIMIZERS[name]
    update = Update(comm, optimizer, draw(0), sharded=True)
    assert update.is_sharded == (comm.size > 1), update.reason
    state, seen = take(comm, update)
    params, whole = on_one_rank(lambda: reference(optimizer))
    same(state.params, params)
    same(update.whole(state.opt_state), whole)
    same(seen.grad_norm, optax.tree.norm(draw(4)))
    assert float(seen.loss) == pytest.approx(comm.n_grid / 2, rel=1e-12)
    kept, rows = update.held.kept(state)
    # As many slices as an array has elements, but dealt in another way: all to the last rank.
    slices = np.arange(12.0) if comm.rank == comm.size - 1 else np.zeros(0)
    path = save_checkpoint(
        comms.control, shared_tmp_path, step=1, replicated=kept, rows={"ends": slices},
        row_start=0, n_rows=12, meta={"fingerprint": ""}, keep=1, dealt=rows,
    )  # fmt: skip
    for where in (comm, make_time_comm(alone())):
        there = Update(where, optimizer, draw(0), sharded=False)
        loaded = load_checkpoint(
            where.control, path, like_at=lambda step, there=there: there.held.like(), row_start=0,
            n_owned_rows=0, fingerprint=None,
            dealt_at=lambda step, there=there: there.held.row_specs(),
        )  # fmt: skip
        again = there.held.restored(loaded.replicated, loaded.dealt)
        for one, other in zip(
            jax.tree.leaves((again.params, there.whole(again.opt_state))),
            jax.tree.leaves((state.params, update.whole(state.opt_state))),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


@pytest.mark.mpi(min_size=2)
def test_moments_and_messages_are_divided(comms):
    comm, shape = comms.time, (64, 60)
    params = {"w": jnp.ones(shape)}
    update = Update(comm, optax.adam(1e-3), params, sharded=True)
    state = TrainState(params, update.init(params))
    moments = 2 * params["w"].nbytes
    assert tree_bytes(state.opt_state) == pytest.approx(moments / comm.size, abs=8)
    zero = jnp.zeros(())
    sums = Sums(zero, jnp.ones(()), Misfits(zero, zero, zero, zero))
    *_, tally = update(lambda updated: updated.tally, state, params, sums)
    work = Tally(*np.asarray(tally).tolist())
    dealt = params["w"].nbytes * (comm.size - 1) // comm.size  # what a reduce-scatter sends
    shard = params["w"].nbytes // comm.size  # what a rank hands over to be gathered
    scalars = 8 * zero.nbytes  # loss, divisor, misfits and the gradient's norm
    assert work.words * WORD_BYTES <= dealt + shard + scalars
    rounds = {2: 1, 3: 2, 4: 2}[comm.size]
    assert work.messages == rounds + 1 + 1


@pytest.mark.mpi(2, 2)
def test_what_needs_whole_arrays_is_done_on_the_first_rank(comms, on_one_rank):
    comm, optimizer = comms.time, optax.adafactor(1e-2, min_dim_size_to_factor=4)
    with pytest.raises(ConfigError, match="`run.sharded_update` is true, but .* sums along axes"):
        Update(comm, optimizer, draw(0), sharded=True)
    update = Update(comm, optimizer, draw(0))
    assert not update.is_sharded and update.describe().startswith("on the first rank: it has 205")
    large = Update(comm, optimizer, {"w": jax.ShapeDtypeStruct((256, 256), float)})
    assert "the optimizer needs whole arrays: it needs sums along axes" in large.describe()
    state, _ = take(comm, update)
    params, whole = on_one_rank(lambda: reference(optimizer))
    same(state.params, params)
    same(update.whole(state.opt_state), whole)
    large = Update(comm, optax.adam(1e-3), {"w": jax.ShapeDtypeStruct((256, 256), float)})
    assert large.describe() == "sharded over 2 ranks"
    mixed = {"w": jax.ShapeDtypeStruct((256, 256), float), "b": jax.ShapeDtypeStruct((3,), "f4")}
    assert "of several types" in Update(comm, optax.adam(1e-3), mixed).describe()


@pytest.mark.mpi(2, 2)
@pytest.mark.parametrize("sharded", [True, False])
def test_ranks_that_compile_differently_hold_the_same_bits(comms, source, sharded):
    """In every step, though one of them optimizes its programs and the other does not."""
    options = "tracking = { bound = 1e-2, check_every = 8 }\n"
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", comms.control.rank == 0)
    try:
        text = small_config(source, options)
        config = parse_config(text, [f"run.sharded_update={str(sharded).lower()}"])
        experiment = set_up(config, comms)
        state, stepper = fresh_state(experiment), make_stepper(experiment)
        for step in range(20):
            state = stepper.take(state, experiment.batch(step), step).state
            bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]
            assert comms.control.allgather(bits) == [bits] * 2
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
