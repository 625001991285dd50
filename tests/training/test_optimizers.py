"""Groups, accumulation and averages in training: on any ranks, across a resume, taken home."""

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import nodepint_mpi as nm
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.io.history import read_history
from nodepint_mpi.parallel.comms import Comms, alone, make_comms
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.evaluate import evaluate, evaluate_run, open_run
from nodepint_mpi.training.plain import make_plain_loss, make_plain_stepper
from nodepint_mpi.training.setup import Experiment, evaluated_params, fresh_state, set_up
from nodepint_mpi.training.train import train
from tests.training.small_config import EXACT, small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]

ALL_AT_ONCE = """accumulate = 2
average = 0.9
clip_norm = 0.05
[[optim.groups]]
match = ["*.layers.0.*"]
name = "sgd"
learning_rate = 0.5
[[optim.groups]]
match = ["*.bias"]
frozen = true
"""


def config_text(source, *, n_steps=5, sections="", data="batch_size = 3"):
    text = small_config(
        source, f'method = "parareal"\n{EXACT}', run=f"n_steps = {n_steps}", data=data,
        sections=sections,
    )  # fmt: skip
    return text.replace("learning_rate = 0.02\n", "learning_rate = 0.02\n" + ALL_AT_ONCE)


def run_steps(experiment: Experiment, make, n_steps: int):
    """The newest and the evaluated parameters after some steps."""
    stepper, state = make(experiment), fresh_state(experiment)
    for k in range(n_steps):
        state = stepper.take(state, experiment.batch(k), k).state
    return [np.asarray(leaf) for leaf in leaves_of(experiment, state)]


def leaves_of(experiment, state):
    return jax.tree.leaves((state.params, evaluated_params(experiment, state)))


def arrays_of(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array_like))


def same(found, wanted, rtol=1e-10):
    """All arrays; a module also holds functions."""
    for a, b in zip(arrays_of(found), arrays_of(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13)


@pytest.mark.mpi(2, 2)
def test_all_at_once_on_any_ranks_is_what_plain_optax_does(comms: Comms, on_one_rank, source):
    """Against a loop of plain optax over plain diffrax gradients, and against `--plain`."""
    text = config_text(source)
    experiment = set_up(parse_config(text), comms)
    found = run_steps(experiment, make_stepper, 5)

    def by_hand():
        single = set_up(parse_config(text), make_comms(alone()))
        gradient = jax.jit(jax.grad(make_plain_loss(single)))
        params = first = fresh_state(single).params
        labels = jax.tree_util.tree_map_with_path(lambda path, _: label(path), params)
        optimizer = optax.chain(
            optax.masked(optax.set_to_zero(), jax.tree.map(lambda one: one == "frozen", labels)),
            optax.clip_by_global_norm(0.05),
            optax.partition(
                {"sgd": optax.sgd(0.5), "adam": optax.adam(0.02), "frozen": optax.set_to_zero()},
                labels,
            ),
        )
        state, passed = optimizer.init(params), []
        for k in (0, 2):  # the fifth gradient waits for a sixth
            pair = [gradient(params, single.batch(j).data) for j in (k, k + 1)]
            mean = jax.tree.map(lambda a, b: (a + b) / 2, *pair)
            # Two batches of three are all six samples.
            same(mean, gradient(params, single.train.take(np.arange(6))), 1e-9)
            updates, state = optimizer.update(mean, state, params)
            params = optax.apply_updates(params, updates)
            passed.append(params)
        average = jax.tree.map(lambda a, b: (0.9 * a + b) / 1.9, *passed)
        plain = run_steps(single, make_plain_stepper, 5)
        frozen = jax.tree.map(lambda one: one == "frozen", labels)
        wanted = [np.asarray(leaf) for leaf in jax.tree.leaves((params, average))]
        return (
            wanted,
            plain,
            jax.tree.leaves(frozen),
            [np.asarray(x) for x in jax.tree.leaves(first)],
        )

    wanted, plain, frozen, first = on_one_rank(by_hand)
    same(found, wanted, 1e-8)
    same(plain, wanted, 1e-8)
    moved = [not np.array_equal(a, b) for a, b in zip(found, first, strict=False)]
    assert moved == [not one for one in frozen] and any(frozen)
    bits = [leaf.tobytes() for leaf in found]
    assert comms.control.allgather(bits) == [bits] * comms.control.size


def label(path):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if ".layers.0." in name:
        return "sgd"
    return "frozen" if name.endswith(".bias") else "adam"


@pytest.mark.mpi(max_size=1)
def test_a_resumed_run_is_the_uninterrupted_one_and_its_average_is_evaluated(
    comms, source, shared_tmp_path
):
    """Stopped between two batches of an update."""
    whole, parts = shared_tmp_path / "whole", shared_tmp_path / "parts"
    done = train(parse_config(config_text(source)), whole, comms, StopFlag())
    train(parse_config(config_text(source, n_steps=3)), parts, comms, StopFlag())
    again = train(parse_config(config_text(source)), parts, comms, StopFlag(), resume="auto")
    assert again["train_loss"] == done["train_loss"]
    assert again["test_loss"] == done["test_loss"] == evaluate_run(whole, comms)["loss"]
    histories = [read_history(folder) for folder in (whole, parts)]
    for found in histories:  # one record only is reported, of the last step
        assert found["step"].tolist() == [1, 2, 3, 4, 5]
        assert found["loss"][-1] == done["train_loss"]
    np.testing.assert_array_equal(histories[0]["grad_norm"], histories[1]["grad_norm"])
    models = [nm.load_model(folder) for folder in (whole, parts)]
    same(*models, rtol=0)
    raw, average = nm.load_model(whole, averaged=False), models[0]
    trained = open_run(whole, comms)
    same(trained.params, average, rtol=0)
    assert not np.allclose(*(m.processor.mlp.layers[0].weight for m in (raw, average)), rtol=1e-6)
    newest = jax.tree.unflatten(jax.tree.structure(trained.params), arrays_of(raw))
    scores = evaluate(comms, trained.experiment, newest)
    assert scores["loss"] != done["test_loss"]
