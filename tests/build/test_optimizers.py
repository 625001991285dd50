"""Optimizers of a config against optax itself, on gradients in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nodepint_mpi.build.imports import named_code
from nodepint_mpi.build.optimizers import (
    averaged_of,
    build_optimizer,
    check_optimizer,
    parameter_paths,
    restart_average,
)
from nodepint_mpi.build.schedules import build_schedule
from nodepint_mpi.build.user_code import load_code
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.config.optim import OptimRule, OptimSection
from nodepint_mpi.errors import ConfigError

pytestmark = [pytest.mark.standard_promotion, pytest.mark.mpi(max_size=1)]

PARAMS = {
    "encoder": {"w": jnp.array([1.0, -2.0])},
    "field": {"b": jnp.array(0.5), "w": jnp.ones(3)},
}
TARGET = {
    "encoder": {"w": jnp.array([0.0, 1.0])},
    "field": {"b": jnp.array(-1.0), "w": jnp.zeros(3)},
}
CODE = """
import optax
import jax.numpy as jnp

def make_optimizer(learning_rate, momentum=0.5):
    return optax.sgd(learning_rate, momentum=momentum)

def schedule(learning_rate, half=2.0):
    return lambda n: learning_rate / (1.0 + n / half)

def number(learning_rate):
    return 3.0

def two_rates(learning_rate):
    return lambda n: jnp.array([1.0, 2.0]) * n

def of_value(learning_rate):
    def update(updates, state, params=None, *, value):
        return updates, state
    return optax.GradientTransformationExtraArgs(lambda params: (), update)

def fails(learning_rate):
    raise RuntimeError("no such day")
"""


def optim(**keys: Any) -> OptimSection:
    return OptimSection.model_validate(keys)


def gradient(params):
    """Of half the squared distance to the target."""
    return jax.tree.map(jnp.subtract, params, TARGET)


def walk(optimizer, n_updates, of=gradient) -> tuple[list[Any], Any]:
    """Parameters after each update, and the last state."""
    params: Any = PARAMS
    found = []
    state = optimizer.init(params)
    for n in range(n_updates):
        updates, state = optimizer.update(of(params) if of is gradient else of(n), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found, state


def same(found, wanted, rtol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), found, wanted)


@pytest.fixture
def code(tmp_path):
    (tmp_path / "own_optim.py").write_text(CODE)
    return str(tmp_path / "own_optim.py")


def test_import_paths_make_optimizer_and_schedule(code):
    section = optim(
        name=f"{code}:make_optimizer", learning_rate=0.1, options={"momentum": 0.9},
        schedule=f"{code}:schedule", schedule_options={"half": 3.0},
    )  # fmt: skip
    wanted = optax.sgd(lambda n: 0.1 / (1.0 + n / 3.0), momentum=0.9)
    same(walk(build_optimizer(section, PARAMS), 4)[0], walk(wanted, 4)[0])
    loaded = load_code(parse_config(CONFIG + f'[optim]\nname = "{code}:make_optimizer"\n'))
    assert loaded.error is None and code in loaded.digests  # compared over the ranks


@pytest.mark.parametrize(
    "name, options, wanted",
    [
        ("adamw", {"weight_decay": 0.1, "mu_dtype": "bfloat16"}, optax.adamw),
        ("adafactor", {"min_dim_size_to_factor": 2, "factored": False}, optax.adafactor),
    ],
)
def test_options_reach_optax_as_they_are(name, options, wanted):
    section = optim(name=name, learning_rate=0.01, options=options)
    found = walk(build_optimizer(section, PARAMS), 3)[0]
    same(found, walk(wanted(0.01, **options), 3)[0])


@pytest.mark.parametrize(
    "name, options, wanted",
    [
        ("polynomial_schedule", {"end_value": 0.01, "power": 2, "transition_steps": 7}, None),
        (
            "cosine_onecycle_schedule",
            {"transition_steps": 8},
            optax.cosine_onecycle_schedule(8, 0.5),
        ),
        (
            "piecewise_constant_schedule",
            {"boundaries_and_scales": {"2": 0.1, "5": 0.5}},
            optax.piecewise_constant_schedule(0.5, {2: 0.1, 5: 0.5}),
        ),
        (
            "warmup_constant_schedule",
            {"init_value": 0.1, "warmup_steps": 3},
            optax.warmup_constant_schedule(0.1, 0.5, 3),
        ),
    ],
)
def test_any_schedule_of_optax_by_its_name(name, options, wanted):
    rule = OptimRule(learning_rate=0.5, schedule=name, schedule_options=options)
    wanted = wanted or optax.polynomial_schedule(0.5, **options)
    found = build_schedule(rule, "optim")
    assert callable(found)
    for n in range(9):
        assert np.asarray(found(n)) == pytest.approx(np.asarray(wanted(n)), rel=1e-12)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"name": "adma"}, r"`optim\.name` 'adma'; did you mean .*'adam'"),
        ({"options": {"b_1": 0.9}}, r"`optim\.options` 'b_1'; did you mean 'b1'"),
        ({"options": {"learning_rate": 0.9}}, r"`optim\.options` 'learning_rate'"),
        ({"name": "sgd", "options": {"momentum": "much"}}, "sgd"),
        ({"schedule": "linear_shedule"}, "did you mean 'linear_schedule'.*file.py:function"),
        ({"schedule": "linear_schedule", "warmup_steps": 3}, "`optim.warmup_steps` is for"),
        ({"schedule": "linear_schedule"}, "missing"),
        (
            {"schedule": "constant_schedule", "schedule_options": {"value": 1.0}},
            "the learning rate",
        ),
        (
            {"schedule": "linear_schedule", "schedule_options": {"end_valu": 1.0}},
            r"`optim\.schedule_options` 'end_valu'; did you mean 'end_value'",
        ),
        ({"name": "own_optim.py:fails"}, "RuntimeError: no such day"),
        ({"name": "own_optim.py:number"}, "returned a float"),
        ({"name": "own_optim.py:make_optimizer", "options": {"momentun": 1}}, "'momentum'"),
        ({"name": "own_optim.py:of_value"}, "from a gradient and parameters alone"),
        ({"schedule": "own_optim.py:two_rates"}, "one number"),
        ({"schedule": "own_optim.py:number"}, "failed"),
        (
            {"groups": [{"match": ["fild.*"], "frozen": True}]},
            "'fild.*'.*The paths are encoder.w, f",
        ),
        ({"groups": [{"match": ["field.bb"], "frozen": True}]}, "did you mean 'field.b'"),
        ({"groups": [{"match": ["*"], "frozen": True}]}, "nothing is left to train"),
        (
            {"groups": [{"match": ["f*"]}, {"match": ["field.w"]}]},
            r"`optim\.groups\[1\]` is left with no parameter",
        ),
        ({"groups": [{"match": ["f*"], "name": "sdg"}]}, r"`optim\.groups\[0\]\.name` 'sdg'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(code, monkeypatch, tmp_path, keys, message):
    monkeypatch.chdir(tmp_path)
    section = optim(**keys)
    with pytest.raises(ConfigError, match=message):
        check_optimizer(section, build_optimizer(section, PARAMS), PARAMS)


def test_groups_are_updated_each_in_its_way():
    """The clipped norm is that of what is trained; the group takes over what it does not set."""
    section = optim(
        name="adam", learning_rate=0.1, options={"b1": 0.5}, clip_norm=0.7,
        groups=[
            {"match": ["*.b"], "name": "sgd", "learning_rate": 0.3},
            {"match": ["encoder.*"], "frozen": True},
        ],
    )  # fmt: skip
    assert parameter_paths(PARAMS) == ["encoder.w", "field.b", "field.w"]
    found, state = walk(build_optimizer(section, PARAMS), 5)
    field: Any = PARAMS["field"]
    adam, sgd = optax.adam(0.1, b1=0.5), optax.sgd(0.3)
    of_w, of_b = adam.init(field["w"]), sgd.init(field["b"])
    clip = optax.clip_by_global_norm(0.7)
    for step in found:
        raw = jax.tree.map(jnp.subtract, field, TARGET["field"])
        clipped: Any = clip.update(raw, clip.init(field))[0]
        w, of_w = adam.update(clipped["w"], of_w)
        b, of_b = sgd.update(clipped["b"], of_b)
        field = optax.apply_updates(field, {"b": b, "w": w})
        same(step, {"encoder": PARAMS["encoder"], "field": field})
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state))
    assert shapes == [(), (3,), (3,)]  # Adam's count and moments; nothing for the others


def test_the_first_group_that_matches_and_what_it_inherits():
    section = optim(
        name="sgd", learning_rate=0.5, schedule="cosine", decay_steps=4,
        groups=[
            {"match": ["field.b"], "learning_rate": 0.1},
            {"match": ["field.*"], "schedule": "constant"},
        ],
    )  # fmt: skip
    found, _ = walk(
        build_optimizer(section, PARAMS), 1, lambda n: jax.tree.map(jnp.ones_like, PARAMS)
    )
    same(jax.tree.map(jnp.subtract, PARAMS, found[0])["field"], {"b": 0.1, "w": 0.5 * np.ones(3)})
    with pytest.raises(ValueError, match="does not take `decay_steps`"):
        optim(groups=[{"match": ["a"], "schedule": "constant", "decay_steps": 3}])
    with pytest.raises(ValueError, match="is `frozen` and takes no `learning_rate`"):
        optim(groups=[{"match": ["a"], "frozen": True, "learning_rate": 0.3}])


def test_accumulated_batches_are_one_of_their_mean():
    """Three steps an update; schedule and clipping see the mean, and count updates."""
    keys = {
        "name": "adam", "learning_rate": 0.1, "schedule": "cosine", "decay_steps": 4,
        "clip_norm": 0.8,
    }  # fmt: skip
    drawn = np.random.default_rng(0).normal(size=12)
    parts = [jax.tree.map(lambda p, x=x: x * jnp.ones_like(p), PARAMS) for x in drawn]

    def mean(n):
        return jax.tree.map(lambda *three: sum(three) / 3, *parts[3 * n : 3 * n + 3])

    found, _ = walk(build_optimizer(optim(**keys, accumulate=3), PARAMS), 12, parts.__getitem__)
    rate = optax.cosine_decay_schedule(0.1, 4)
    wanted, _ = walk(optax.chain(optax.clip_by_global_norm(0.8), optax.adam(rate)), 4, mean)
    same(found[2::3], wanted, rtol=1e-9)
    same(found[3], found[2])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_the_debiased_one(accumulate):
    section = optim(
        name="sgd", learning_rate=0.1, average=0.9, accumulate=accumulate,
        groups=[{"match": ["encoder.*"], "frozen": True}],
    )  # fmt: skip
    optimizer, n = build_optimizer(section, PARAMS), 6
    found, state = walk(optimizer, n * accumulate)
    seen = found[accumulate - 1 :: accumulate]
    weights = 0.1 * 0.9 ** np.arange(n)[::-1] / (1 - 0.9**n)
    wanted = jax.tree.map(
        lambda *all_: sum(w * p for w, p in zip(weights, all_, strict=True)), *seen
    )
    average = averaged_of(section, found[-1], state)
    same(average, wanted, rtol=1e-9)
    np.testing.assert_array_equal(average["encoder"]["w"], PARAMS["encoder"]["w"])
    again = averaged_of(section, PARAMS, restart_average(state, PARAMS))
    same(again, PARAMS, rtol=0)


CONFIG = """
[run]
name = "a"
[time]
horizon = [0, 1]
n_slices = 4
fine = { solver = "rk4", n_steps = 4 }
coarse = { solver = "euler", n_steps = 1 }
"""


def test_code_that_the_optimizer_names_is_named_and_found_at_home():
    text = CONFIG + (
        '[optim]\nname = ":make"\nschedule = ":rate"\n'
        '[[optim.groups]]\nmatch = ["*"]\nname = ":other"\nschedule = ":slow"\n'
    )
    config = parse_config(text, home="own.py")
    assert named_code(config) == {
        "optim.name": "own.py:make",
        "optim.schedule": "own.py:rate",
        "optim.groups[0].name": "own.py:other",
        "optim.groups[0].schedule": "own.py:slow",
    }


def test_fingerprints_of_configs_without_the_new_keys_stay():
    """As they were before there were such keys; whole numbers in options were read as floats."""
    assert parse_config(CONFIG).fingerprint() == "4b1838b9c5d473cf"
    text = CONFIG + "[optim]\noptions = { b1 = 1, nesterov = true }\nclip_norm = 1\n"
    assert parse_config(text).fingerprint() == "bc1a1d4ebd9ed6c7"
    for more in ("accumulate = 2", "average = 0.9", "groups = [{match = ['a'], frozen = true}]"):
        assert parse_config(text + more).fingerprint() != parse_config(text).fingerprint()
