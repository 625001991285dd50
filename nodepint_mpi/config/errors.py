"""Pydantic's findings in the words of a config file: the key, what was given, what to do."""

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from nodepint_mpi.names import hint

_TAGS = ("mlp", "conv", "own")


def explain_validation(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """All findings of one validation, a line each. Local."""
    lines = [_explain(finding, model) for finding in error.errors(include_url=False)]
    return f"{source}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])


def _explain(finding: Mapping[str, Any], model: type[BaseModel]) -> str:
    path = [part for part in finding["loc"] if part not in _TAGS]
    key = ".".join(map(str, path))
    given = _show(finding.get("input"))
    match finding["type"]:
        case "extra_forbidden":
            return f"unknown key `{key}`{_did_you_mean(path, finding['loc'], model)}"
        case "missing":
            kind = model.model_fields[key].annotation if key in model.model_fields else None
            section = isinstance(kind, type) and issubclass(kind, BaseModel)
            return f"`[{key}]` is missing." if section else f"`{key}` is missing."
        case "value_error":
            reason = str(finding["ctx"]["error"])
            return f"`[{key}]` {reason}." if key else f"{reason}."
        case "union_tag_invalid":
            return _unknown_tag(key, finding["ctx"]["tag"])
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"`{key}` is {given}; it must be a section `[{key}]`."
    message = finding["msg"].removeprefix("Input ")
    return f"`{key}` is {given}; it {message[:1].lower()}{message[1:]}."


def _unknown_tag(key: str, name: str) -> str:
    """What to say of a network that has neither a known name nor an import path."""
    known = [tag for tag in _TAGS if tag != "own"]
    return (
        f"unknown `{key}.name` {name!r}{hint(name, known)} "
        "Your own network is named `file.py:function`."
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
    current: list[type[BaseModel]] = [model]
    for part in loc:
        if isinstance(part, int):  # a place in a list of sections
            continue
        if part in _TAGS:
            wanted = [m for m in current if _accepts_tag(m, part)]
            current = wanted or current
            continue
        fields = [m.model_fields[part] for m in current if part in m.model_fields]
        current = [m for field in fields for m in _models(field.annotation)]
    return current[0] if current else None


def _accepts_tag(model: type[BaseModel], tag: str) -> bool:
    options = typing.get_args(model.model_fields["name"].annotation)
    return tag in options if options else tag == "own"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Section classes in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list):
        return [m for option in typing.get_args(annotation) for m in _models(option)]
    return []


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
