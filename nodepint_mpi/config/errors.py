"""Pydantic's findings in the words of a config file: the key, what was given, what to do."""

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Tag, ValidationError

from nodepint_mpi.config.network import NETWORKS
from nodepint_mpi.config.time import METHODS
from nodepint_mpi.names import hint

_CHOICES = {"network": ("name", NETWORKS), "time": ("method", METHODS)}
"""Sections that are unions: by which key, and what it may be beside the user's own."""


def explain_validation(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """All findings of one validation, a line each. Local."""
    lines = [_explain(finding, model) for finding in error.errors(include_url=False)]
    return f"{source}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])


def _explain(finding: Mapping[str, Any], model: type[BaseModel]) -> str:
    path = _keys(model, finding["loc"])
    key = ".".join(map(str, path))
    given = _show(finding.get("input"))
    match finding["type"]:
        case "extra_forbidden":
            return f"unknown key `{key}`{_did_you_mean(path, finding['loc'], model)}"
        case "missing" if finding["loc"][0] == "time" and path[1:] in (["coarse"], ["basis"]):
            return f"`[time]` with `method = '{finding['loc'][1]}'` needs a section `[{key}]`."
        case "missing":
            kind = model.model_fields[key].annotation if key in model.model_fields else None
            section = isinstance(kind, type) and issubclass(kind, BaseModel)
            return f"`[{key}]` is missing." if section else f"`{key}` is missing."
        case "value_error":
            reason = str(finding["ctx"]["error"])
            return f"`[{key}]` {reason}." if key else f"{reason}."
        case "union_tag_invalid":
            return _unknown_choice(key, finding["ctx"]["tag"])
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"`{key}` is {given}; it must be a section `[{key}]`."
    message = finding["msg"].removeprefix("Input ")
    return f"`{key}` is {given}; it {message[:1].lower()}{message[1:]}."


def _unknown_choice(section: str, given: str) -> str:
    """What to say of a network or a method that is neither a known name nor an import path."""
    key, known = _CHOICES[section]
    what = {"network": "network", "time": "method"}[section]
    return (
        f"unknown `{section}.{key}` {given!r}{hint(given, known)} "
        f"A {what} of your own is named `file.py:function`."
    )


def _did_you_mean(path: Sequence, loc: Sequence, model: type[BaseModel]) -> str:
    """The valid key a mistyped one most likely meant: in its section, else anywhere."""
    section = _section(model, loc[:-1])
    known = sorted(section.model_fields) if section else []
    close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{'.'.join(map(str, [*path[:-1], close[0]]))}`?"
    given = ".".join(map(str, path))  # a key of another kind of network is known, but not here
    keys = sorted(_all_keys(model), key=lambda key: -key.count("."))  # `optim` before its groups
    everywhere = {key.rsplit(".", 1)[-1]: key for key in keys if key != given}
    close = difflib.get_close_matches(str(path[-1]), list(everywhere), n=1, cutoff=0.8)
    if close:
        return f"; did you mean `{everywhere[close[0]]}`?"
    return f"; known keys here are {', '.join(f'`{one}`' for one in known)}." if known else "."


def _section(model: type[BaseModel], loc: Sequence) -> type[BaseModel] | None:
    """The model at a place in the config, walking through optional and tagged sections."""
    *_, (_, options) = _walk(model, loc)
    return next(iter(options)) if options else None


def _keys(model: type[BaseModel], loc: Sequence) -> list[str | int]:
    """A place in the config as the user writes it, without the tags of unions."""
    return [part for part, _ in _walk(model, loc) if part is not None]


def _walk(
    model: type[BaseModel], loc: Sequence
) -> Iterator[tuple[str | int | None, Mapping[type[BaseModel], str | None]]]:
    """Each part of a place (None for the start and for a tag) and the sections it may stand for."""
    options: Mapping[type[BaseModel], str | None] = {model: None}
    yield None, options
    for part in loc:
        tagged = {one: tag for one, tag in options.items() if tag is not None and tag == part}
        if tagged:
            options = tagged
            yield None, options
            continue
        if not isinstance(part, int):  # else a place in a list of sections
            fields = [one.model_fields[part] for one in options if part in one.model_fields]
            found = [_models(field.annotation) for field in fields]
            options = {one: tag for models in found for one, tag in models.items()}
        yield part, options


def _models(annotation: Any, tag: str | None = None) -> dict[type[BaseModel], str | None]:
    """Section classes in a type annotation, each with its tag in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation: tag}
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType, typing.Annotated, list):
        return {}
    first, *others = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        tags = [one.tag for one in others if isinstance(one, Tag)]
        return _models(first, tags[0] if tags else None)
    found = [_models(option) for option in (first, *others)]
    return {one: tag for models in found for one, tag in models.items()}


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _models(field.annotation):
            yield from _all_keys(section, f"{prefix}{name}.")


def _show(value: Any) -> str:
    """A value as the user wrote it."""
    names = {str: "the string", bool: "the boolean", int: "the integer", float: "the number"}
    kind = names.get(type(value))
    if kind is None:
        return f"a {type(value).__name__}"
    return f"{kind} {json.dumps(value)}"
