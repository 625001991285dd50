"""What mkdocs calls while it builds docs/: formulas as MathML, tables of keys, and pictures."""

import html
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from docs_flow import draw, parse
from latex2mathml.converter import convert
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.time import Time, TimeSection

KEYS = "[config keys]"
"""The line of a page that is replaced by the tables."""

_FLOW = re.compile(r"^```flow\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the tables of keys in their place, and pictures instead of `flow` blocks."""
    markdown = _FLOW.sub(lambda found: f"<div>\n{draw(parse(found['text']))}\n</div>", markdown)
    return (
        markdown.replace(KEYS, "\n".join(_describe(Config, "", {})))
        if KEYS in markdown
        else markdown
    )


def on_page_content(content: str, **_: Any) -> str:
    """The page with its formulas, which arithmatex has marked, turned into MathML."""
    return _FORMULA.sub(_as_mathml, content)


def _as_mathml(found: re.Match[str]) -> str:
    display = "block" if found["tag"] == "div" else "inline"
    return convert(html.unescape(found["latex"]).strip(), display=display)


def _describe(model: type[BaseModel], path: str, seen: dict[type[BaseModel], str]) -> Iterator[str]:
    """Markdown of a section and of those inside it: docstring and a row for each key."""
    inner: list[tuple[str, type[BaseModel]]] = []
    rows = []
    for key, field in model.model_fields.items():
        sections = [s for s in _parts(field.annotation) if _is_section(s)]
        if path == "" and key == "time":  # of one union: the general one has all keys
            sections = [TimeSection]
        inner += [(key, section) for section in sections]
        if not sections:
            rows.append(f"| `{key}` | {_kind(field)} | {_default(field)} |")
    if path:
        title = f"`[{path}]`"
        if path == "network":  # three kinds share the name
            title += f": {model.__name__.removesuffix('Network').lower()}"
        yield f"\n{'#' * (1 + len(path.split('.')))} {title}\n"
        yield re.sub(r"\n[ ]+", "\n", model.__doc__ or "")
        if model is TimeSection:
            yield from _methods()
    if model in seen:
        yield f"\nThe keys are those of `[{seen[model]}]`."
        return
    seen[model] = path
    if rows:
        yield "\n| key | type | default |\n|---|---|---|\n" + "\n".join(rows)
    for key, section in inner:
        yield from _describe(section, f"{path}.{key}" if path else key, seen)


def _methods() -> Iterator[str]:
    """A row for each section of the union `[time]`: its methods and what they need."""
    yield "\n| `method` | needs |\n|---|---|"
    for section in _parts(typing.get_args(Time)[0]):
        names = typing.get_args(section.model_fields["method"].annotation)
        needs = [
            f"`[time.{key}]`" for key, general in TimeSection.model_fields.items()
            if section.model_fields[key].is_required() and not general.is_required()
            and key != "method"
        ]  # fmt: skip
        shown = ", ".join(f'`"{name}"`' for name in names) or '`"file.py:function"`'
        yield f"| {shown} | {', '.join(needs) or 'nothing more'} |"


def _is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _parts(annotation: Any) -> list[Any]:
    """The alternatives in a type annotation."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [p for option in typing.get_args(annotation) for p in _parts(option)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    return [annotation]


def _kind(field: FieldInfo) -> str:
    """Its type in words."""
    words = []
    for part in _parts(field.annotation):
        if typing.get_origin(part) is typing.Literal:
            words += [f'`"{value}"`' for value in typing.get_args(part)]
        elif part is not type(None):
            name = part.__name__ if part in _PLAIN else str(part)
            name = re.sub(r"typing\.Annotated\[(\w+), [^]]*\]|typing\.", r"\1", name)
            words.append(name.replace(" | ", " or "))
    return ", ".join(words)


_PLAIN = (int, float, str, bool)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    return "" if field.default is None else f"`{json.dumps(field.default)}`"
