"""Learning rates of a config: by keys of its own, by optax, or by the user's own function."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nodepint_mpi.build.imports import import_function, is_import_path
from nodepint_mpi.build.model import unknown_name
from nodepint_mpi.config.optim import SCHEDULES, OptimRule
from nodepint_mpi.errors import ConfigError

PEAKS = ("peak_value", "value", "init_value")
"""What optax's schedules call the learning rate, the first of these that one takes."""

Schedule = Callable[[Any], Any] | float


def build_schedule(rule: OptimRule, key: str) -> Schedule:
    """The learning rate as a number, or as a function of the number of updates done. Local.

    Raises:
        ConfigError: for an unknown schedule, or options that it does not take.
    """
    name = rule.schedule
    if name in SCHEDULES:
        return _schedule_by_keys(rule)
    make, peak = _schedule_maker(name, key)
    given = {"warmup_steps": rule.warmup_steps, "decay_steps": rule.decay_steps,
             "end_factor": rule.end_factor}  # fmt: skip
    for other, value in given.items():
        if value:
            raise ConfigError(
                f'`{key}.{other}` is for "constant", "cosine" and "exponential": give `{key}.'
                f"schedule_options` what {name!r} takes."
            )
    options = _with_whole_keys(rule.schedule_options)
    rate_name = peak or "learning_rate"
    if rate_name in options:
        raise ConfigError(
            f"`{key}.schedule_options` holds {rate_name!r}, which is the learning rate: set `{key}."
            "learning_rate` instead."
        )
    check_options(make, options, f"{key}.schedule_options")
    try:
        if peak is None:
            schedule = make(rule.learning_rate, **options)
        else:
            schedule = make(**{peak: rule.learning_rate}, **options)
        rate = jax.eval_shape(schedule, jnp.zeros([], jnp.int32))
    except Exception as error:  # anything that the user's code can raise
        raise ConfigError(
            f"`{key}.schedule = {name!r}` was called with the learning rate and {options}, and "
            f"failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    if getattr(rate, "shape", None) != ():
        raise ConfigError(
            f"`{key}.schedule = {name!r}` must return a function from the number of updates done "
            "to one number, the learning rate."
        )
    return schedule


def check_options(make: Callable[..., Any], options: Mapping[str, Any], key: str) -> None:
    """Refuse options that a function does not have. Local.

    Raises:
        ConfigError: in the name of `key`, with what may have been meant.
    """
    parameters = inspect.signature(make).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return
    known = [name for name in parameters if name != "learning_rate"]
    for name in options:
        if name not in known:
            raise ConfigError(unknown_name(key, name, known))


def first_line(error: Exception) -> str:
    """Of a message, for another one. Local."""
    return next(iter(str(error).splitlines()), "")


def _schedule_maker(name: str, key: str) -> tuple[Callable[..., Any], str | None]:
    """The function that makes a schedule, and what it calls the learning rate; None for the user's
    own, which takes it first."""
    if is_import_path(name):
        return import_function(name, f"{key}.schedule"), None
    known = _optax_schedules()
    if name not in known:
        raise ConfigError(
            f"{unknown_name(f'{key}.schedule', name, [*SCHEDULES, *known])} Your own schedule is "
            "named `file.py:function`."
        )
    return getattr(optax.schedules, name), known[name]


def _optax_schedules() -> dict[str, str]:
    """Names of optax's schedules, and what each calls the learning rate."""
    found = {}
    for name, make in vars(optax.schedules).items():
        if inspect.isfunction(make):
            takes = inspect.signature(make).parameters
            peak = next((one for one in PEAKS if one in takes), None)
            if peak is not None:
                found[name] = peak
    return found


def _with_whole_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    """Tables from steps to numbers, whose keys are text in TOML, as optax takes them."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict) and value and all(key.isdecimal() for key in value):
            return {int(key): one for key, one in value.items()}
        return value

    return {key: convert(value) for key, value in options.items()}


def _schedule_by_keys(rule: OptimRule) -> Schedule:
    peak, warmup, decay = rule.learning_rate, rule.warmup_steps, rule.decay_steps
    if decay is None:  # "constant", as the config checks
        return optax.linear_schedule(0.0, peak, warmup) if warmup else peak
    if rule.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else peak, peak, warmup, decay, peak * rule.end_factor
        )
    return optax.warmup_exponential_decay_schedule(
        0.0 if warmup else peak,
        peak,
        warmup,
        decay - warmup,
        rule.end_factor,
        end_value=peak * rule.end_factor,
    )
