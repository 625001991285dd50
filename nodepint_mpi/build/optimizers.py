"""Optimizers of a config: optax's and the user's own, with groups, accumulation and averages."""

import fnmatch
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from nodepint_mpi.build.imports import import_function, is_import_path
from nodepint_mpi.build.model import unknown_name
from nodepint_mpi.build.schedules import build_schedule, check_options, first_line
from nodepint_mpi.config.optim import OptimRule, OptimSection
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.names import hint

FROZEN = "frozen"
REST = "rest"
MANY_PATHS = 40
"""Maximum number of parameter paths listed in a message."""


class AverageState(NamedTuple):
    """The state of an optimizer whose parameters are averaged, and their average.

    `averaged` is debiased, so it needs no correction: it is the initial parameters as long as no
    update is averaged.
    """

    inner: PyTree
    n_averaged: Int[Array, ""]
    averaged: PyTree[Array]


def build_optimizer(section: OptimSection, params: PyTree) -> optax.GradientTransformation:
    """The optimizer of these parameters, by optax. Local.

    In this order: frozen gradients are set to zero, the others clipped, each group is updated,
    the parameters are averaged, and all that only every `accumulate` steps.

    Args:
        section: The section `[optim]`.
        params: Trainable arrays, or their shapes, and None for all else.

    Raises:
        ConfigError: for what does not fit: names, options, schedules, or patterns of groups.
    """
    if section.groups:
        optimizer = _build_groups(section, params)
    else:
        optimizer = build_rule(section, "optim")
        if section.clip_norm is not None:
            optimizer = optax.chain(optax.clip_by_global_norm(section.clip_norm), optimizer)
    if section.average is not None:
        optimizer = average_parameters(optimizer, section.average)
    if section.accumulate > 1:
        steps = optax.MultiSteps(
            optimizer, section.accumulate, accumulator_dtype=jnp.zeros(()).dtype
        )
        optimizer = steps.gradient_transformation()
    return optimizer


def check_optimizer(
    section: OptimSection, optimizer: optax.GradientTransformation, params: PyTree
) -> None:
    """Look at the shapes of an update: what an optimizer cannot do is said before training. Local.

    Raises:
        ConfigError: if it needs more than gradient and parameters, fails, or returns other shapes.
    """

    def update(params: PyTree) -> PyTree:
        state = optimizer.init(params)
        updates, after = optimizer.update(params, state, params)
        return (params, state), (optax.apply_updates(params, updates), after)

    try:
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by its integer count
            before, after = jax.eval_shape(update, params)
    except ConfigError:
        raise
    except Exception as error:  # anything that the user's code can raise
        raise ConfigError(
            f"The optimizer of `[optim]`, {_names(section)}, cannot update from a gradient and "
            f"parameters alone ({type(error).__name__}: {first_line(error)}): choose one that "
            "needs no more, and that takes a schedule if there is one."
        ) from error
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(t)] for t in (before, after)]
    if jax.tree.structure(before) != jax.tree.structure(after) or shapes[0] != shapes[1]:
        raise ConfigError(
            f"The optimizer of `[optim]`, {_names(section)}, returns parameters or a state of "
            "other shapes or types than it was given; expected the same, as optax does it."
        )


def frozen_leaves(section: OptimSection, params: PyTree) -> list[bool]:
    """Which parameters are in a group that is frozen, in the order of the leaves. Local."""
    numbers = jax.tree.leaves(group_numbers(section, params))
    return [number >= 0 and section.groups[number].frozen for number in numbers]


def parameter_paths(params: PyTree) -> list[str]:
    """The paths of all parameters, such as `processor.mlp.layers.0.weight`. Local."""
    found, _ = jax.tree_util.tree_flatten_with_path(params)
    return [_path(path) for path, _ in found]


def group_numbers(section: OptimSection, params: PyTree) -> PyTree[int]:
    """The group of each parameter, counted from 0; -1 for those in none. Local.

    A parameter is in the first group that has a pattern for it.

    Raises:
        ConfigError: for a pattern that matches nothing, a group that is left with nothing, or if
            nothing is left to train.
    """
    paths = parameter_paths(params)
    for number, group in enumerate(section.groups):
        for pattern in group.match:
            if not fnmatch.filter(paths, pattern):
                more = ", ..." if len(paths) > MANY_PATHS else ""
                raise ConfigError(
                    f"`optim.groups[{number}].match`: no parameter matches {pattern!r}"
                    f"{_near(pattern, paths)} The paths are {', '.join(paths[:MANY_PATHS])}{more}."
                )
    numbers = [_number(section, path) for path in paths]
    for number in range(len(section.groups)):
        if number not in numbers:
            raise ConfigError(
                f"`optim.groups[{number}]` is left with no parameter: groups before it match all "
                "that it matches. A parameter is in the first group that has a pattern for it; "
                "put the narrower pattern first."
            )
    if all(number >= 0 and section.groups[number].frozen for number in numbers):
        raise ConfigError("`optim.groups` freezes all parameters: nothing is left to train.")
    return jax.tree.unflatten(jax.tree.structure(params), numbers)


def build_rule(rule: OptimRule, key: str) -> optax.GradientTransformation:
    """An optimizer with its schedule, by optax or by the user's own function. Local.

    Args:
        rule: Name, options and schedule.
        key: Of the section, for messages.

    Raises:
        ConfigError: if there is none of that name, or it does not take the options.
    """
    schedule, name = build_schedule(rule, key), rule.name
    if is_import_path(name):
        make = import_function(name, f"{key}.name")
        check_options(make, rule.options, f"{key}.options")
        try:
            optimizer = make(schedule, **rule.options)
        except Exception as error:  # anything that the user's code can raise
            raise ConfigError(
                f'`{key}.name = "{name}"` was called with the learning rate and '
                f"{sorted(rule.options)}, and failed: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ConfigError(
                f'`{key}.name = "{name}"` returned a {type(optimizer).__name__}; it takes the '
                "learning rate, a number or a function of the updates done, and `options`, and "
                "returns an `optax.GradientTransformation`."
            )
        return optimizer
    make = getattr(optax, name, None)
    if make is None or name.startswith("_"):
        known = [one for one, found in vars(optax).items() if callable(found)]
        raise ConfigError(unknown_name(f"{key}.name", name, known))
    try:
        if "learning_rate" in inspect.signature(make).parameters:
            check_options(make, rule.options, f"{key}.options")
        optimizer = make(learning_rate=schedule, **rule.options)
        if not isinstance(optimizer, optax.GradientTransformation):
            raise TypeError(f"it returns a {type(optimizer).__name__}")
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f'`{key}.name = "{name}"` does not take a learning rate and the options '
            f"{rule.options}: {error}"
        ) from error
    return optimizer


def average_parameters(
    inner: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """An optimizer that also keeps the debiased exponential moving average of parameters. Local.

    After n updates the average is the sum of (1 - d) d^(n-k) p[k], divided by 1 - d^n; written as a
    step towards the newest parameters, so that those that stay the same are averaged exactly.
    """

    def init(params: PyTree) -> AverageState:
        return AverageState(inner.init(params), jnp.zeros([], jnp.int32), params)

    def update(updates: PyTree, state: Any, params: PyTree | None = None):
        if params is None:
            raise ValueError("an average of parameters needs the parameters")
        updates, after = inner.update(updates, state.inner, params)
        n = jnp.asarray(optax.safe_increment(state.n_averaged))
        new = optax.apply_updates(params, updates)
        precision = jnp.zeros(()).dtype
        power = n.astype(precision) * jnp.log(jnp.asarray(decay, precision))
        share = jnp.minimum((1 - decay) / -jnp.expm1(power), 1.0)  # 1 for the first
        averaged = jax.tree.map(
            lambda old, p: old + share.astype(old.dtype) * (p - old), state.averaged, new
        )
        return updates, AverageState(after, n, averaged)

    return optax.GradientTransformation(init, update)


def averaged_of(section: OptimSection, params: PyTree, opt_state: Any) -> PyTree:
    """The parameters to evaluate: the average if one is kept, else `params`. Local."""
    if section.average is None:
        return params
    return (opt_state.inner_opt_state if section.accumulate > 1 else opt_state).averaged


def averaged_prefix(section: OptimSection) -> str | None:
    """What the average's leaves are called in a checkpoint; None if none is kept. Local."""
    if section.average is None:
        return None
    return f"opt_state/{'inner_opt_state/' if section.accumulate > 1 else ''}averaged/"


def restart_average(opt_state: PyTree, params: PyTree) -> PyTree:
    """The state with an average that starts anew at these parameters, if it has one. Local."""

    def restart(part: Any) -> Any:
        if isinstance(part, AverageState):
            return AverageState(part.inner, jnp.zeros_like(part.n_averaged), params)
        return part

    return jax.tree.map(restart, opt_state, is_leaf=lambda part: isinstance(part, AverageState))


def _build_groups(section: OptimSection, params: PyTree) -> optax.GradientTransformation:
    """Frozen parameters take no part in the norm that is clipped."""
    numbers = group_numbers(section, params)

    def label(number: int) -> str:
        if number < 0:
            return REST
        return FROZEN if section.groups[number].frozen else f"group-{number}"

    labels = jax.tree.map(label, numbers)
    parts = {REST: build_rule(section, "optim"), FROZEN: optax.set_to_zero()}
    for number, group in enumerate(section.groups):
        if not group.frozen:
            rule = group.rule(section)
            parts[label(number)] = build_rule(rule, f"optim.groups[{number}]")
    used = set(jax.tree.leaves(labels))
    partition = optax.partition({k: v for k, v in parts.items() if k in used}, labels)
    if section.clip_norm is None:
        return partition
    clip = optax.clip_by_global_norm(section.clip_norm)
    if FROZEN not in used:
        return optax.chain(clip, partition)
    frozen = jax.tree.map(lambda one: one == FROZEN, labels)
    return optax.chain(optax.masked(optax.set_to_zero(), frozen), clip, partition)


def _number(section: OptimSection, path: str) -> int:
    for number, group in enumerate(section.groups):
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in group.match):
            return number
    return -1


def _near(pattern: str, paths: list[str]) -> str:
    """Paths that resemble a pattern, if any does; else the end of the sentence."""
    found = hint(pattern, paths)
    return found if "did you mean" in found else "."


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _names(section: OptimSection) -> str:
    names = {section.name: None} | {g.name: None for g in section.groups if g.name is not None}
    return ", ".join(map(repr, names))
