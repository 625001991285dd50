"""Objects of a Python program in the place of names: what `nodepint_mpi.train` is given.

A config names everything, so that a run can be read and resumed. What was given as an object has a
name there that begins with `object.`, such as `object.loss:energy_error`, and is looked up among
the objects that the program has given again.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import equinox as eqx
import optax
from pydantic import ValidationError

from nodepint_mpi.config.data import GIVEN
from nodepint_mpi.config.errors import explain_validation
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.loss import LossSection, LossTerm
from nodepint_mpi.config.network import UserNetwork
from nodepint_mpi.config.optim import OptimSection
from nodepint_mpi.core.objective import Term
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.names import hint

_HOME = "object."
_given: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar(
    "nodepint_objects", default=None
)


class Objects(TypedDict, total=False):
    """What a program may give instead of naming it in a config; all of it is optional.

    `model` is an Equinox module, with its first weights, or a function that makes one, as
    `network.name` takes. `data` are the columns of each split, a `datasets.DatasetDict`, or a
    function that returns either. `loss` and `metrics` are functions of predictions and targets that
    return a `Mean`, `terms` are added to the loss, and `optimizer` is one of optax's, with its
    schedule.
    """

    model: eqx.Module | Callable[..., Any]
    data: Mapping[str, Any] | Callable[..., Any]
    loss: Callable[..., Any]
    metrics: Sequence[Callable[..., Any]]
    terms: Sequence[Term]
    optimizer: optax.GradientTransformation


def is_object(name: str) -> bool:
    """Whether a name in a config stands for an object of a program. Local."""
    return name.startswith(_HOME) and ":" in name


def find_object(path: str, key: str) -> Any:
    """The object that a name in a config stands for. Local.

    Raises:
        ConfigError: if the program has not given it.
    """
    given = _given.get() or {}
    if path in given:
        return given[path]
    if path == GIVEN:
        raise ConfigError(
            "`data.source` is missing: name a prepared folder, 'hub:OWNER/NAME' or "
            "'file.py:function', or pass `data=...` to `nodepint_mpi.train`."
        )
    kind = path.removeprefix(_HOME).partition(":")[0]
    raise ConfigError(
        f'`{key} = "{path}"` stands for an object of the Python program that started the run. '
        f"None is given here: pass it again, `{kind}=...`, to `nodepint_mpi.train`, `load_model` "
        "or `predict`. Commands need code that the config names as `file.py:function`."
    )


@contextlib.contextmanager
def objects_given(objects: Mapping[str, Any]) -> Iterator[None]:
    """Have `find_object` find these, by their names in a config, in the block. Local."""
    token = _given.set(dict(objects))
    try:
        yield
    finally:
        _given.reset(token)


def with_objects(config: Config, objects: Objects) -> tuple[Config, dict[str, Any]]:
    """The config with names for the objects, and the objects by these names. Local.

    Raises:
        ConfigError: if something is given twice, or is not what it should be.
    """
    for name in objects:
        if name not in Objects.__annotations__:
            raise ConfigError(f"Unknown argument {name!r}{hint(name, Objects.__annotations__)}")
    found: dict[str, Any] = {}
    changes: dict[str, Any] = {}

    def enter(kind: str, thing: Any, name: str) -> str:
        path = f"{_HOME}{kind}:{name}"
        if path in found:
            raise ConfigError(f"two of the {kind} are called {name!r}: give them different names.")
        found[path] = thing
        return path

    if "model" in objects:
        _refuse_both(config.network is not None, "model", "`[network]`")
        model = objects["model"]
        path = enter("model", _maker_of(model), _name_of(model))
        changes["network"] = UserNetwork(name=path)
    if "data" in objects:
        if config.data is None:
            raise ConfigError(
                "`data` is given, but the config does not say what its columns are: add a section "
                'with their names, such as `data=DataSection(input="u", target="u", times="t")`.'
            )
        _refuse_both(not is_object(config.data.source), "data", "`data.source`")
        data = objects["data"]
        path = enter("data", data, _name_of(data))
        changes["data"] = config.data.model_copy(update={"source": path})
    loss = _with_loss(config.loss, objects, enter)
    if loss is not None:
        changes["loss"] = loss
    if "optimizer" in objects:
        _refuse_both(config.optim != OptimSection(), "optimizer", "`[optim]`")
        optimizer = objects["optimizer"]
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ConfigError(
                f"`optimizer` is of type {type(optimizer).__name__}; expected one of optax's, such "
                "as `optax.adam(1e-3)`."
            )
        path = enter("optimizer", functools.partial(_give_optimizer, optimizer), "optax")
        changes["optim"] = OptimSection(name=path)
    try:
        return Config(**{**dict(config), **changes}), found
    except ValidationError as error:
        raise ConfigError(explain_validation(error, Config, "the objects given")) from None


def model_of_run(config: Config, model: Any) -> dict[str, Any]:
    """The model, by its name in the config of a run that was given it as an object. Local.

    Raises:
        ConfigError: if that run was given none.
    """
    name = "" if config.network is None else config.network.name
    if not is_object(name):
        raise ConfigError(
            f"`model` is given, but this run was not started with one: its config says "
            f"`network.name = {name!r}`. Leave it out."
        )
    return {name: _maker_of(model)}


def _with_loss(
    section: LossSection | None, objects: Objects, enter: Callable[[str, Any, str], str]
) -> LossSection | None:
    """The section `[loss]` with the names of loss, metrics and terms; None if it stays."""
    if not {"loss", "metrics", "terms"} & set(objects):
        return None
    if "loss" in objects:
        _refuse_both(section is not None, "loss", "`[loss]`")
        name = enter("loss", _function(objects["loss"], "loss"), _name_of(objects["loss"]))
    elif section is None:
        raise ConfigError(
            "`metrics` and `terms` go with a loss: pass `loss=...`, or add a section `[loss]`."
        )
    else:
        name = section.name
    given = [_function(one, "metrics") for one in objects.get("metrics", ())]
    metrics = [enter("metrics", one, _name_of(one)) for one in given]
    terms = []
    for term in objects.get("terms", ()):
        if not isinstance(term, Term):
            raise ConfigError(
                f"`terms` hold a {type(term).__name__}; expected `Term(function, weight)`."
            )
        path = enter("terms", _function(term.function, "terms"), _name_of(term.function))
        terms.append(LossTerm(name=path, weight=float(term.weight)))
    before = ([], []) if section is None else (section.metrics, section.terms)
    return LossSection(name=name, metrics=[*before[0], *metrics], terms=[*before[1], *terms])


def _refuse_both(there: bool, name: str, section: str) -> None:
    if there:
        raise ConfigError(
            f"`{name}` is given, and so is {section} in the config: give one of them."
        )


def _function(thing: Any, name: str) -> Any:
    if not callable(thing):
        raise ConfigError(f"`{name}` holds a {type(thing).__name__}; expected a function.")
    return thing


def _maker_of(model: Any) -> Any:
    """A function that makes the model, as a config names one."""
    if isinstance(model, eqx.Module):
        return functools.partial(_give_model, model)
    return _function(model, "model")


def _give_model(model: eqx.Module, key: Any, *, input_shape: Any, output_size: Any) -> eqx.Module:
    """The module that was given, whatever the data: they are checked against it."""
    del key, input_shape, output_size
    return model


def _give_optimizer(
    optimizer: optax.GradientTransformation, learning_rate: Any
) -> optax.GradientTransformation:
    """The optimizer that was given, which has a learning rate of its own."""
    del learning_rate
    return optimizer


def _name_of(thing: Any) -> str:
    """What an object is called in a config: a function by its name, others by their type."""
    name = getattr(thing, "__name__", type(thing).__name__)
    return name if name.isidentifier() else "function"
