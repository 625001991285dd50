"""A config inside a Python file: one file then holds data, field, loss and settings of a problem.

The file has `CONFIG = \"\"\"...\"\"\"`, the settings in TOML, where `":make_data"` stands for the
function of that name in the same file. It is read as text and not run: the settings say what a
rank may take before JAX starts.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nodepint_mpi.errors import ConfigError

NAME = "CONFIG"

_OWN = (
    ("data", "source"),
    ("network", "name"),
    ("loss", "name"),
    ("loss", "metrics"),
    ("loss", "terms", "name"),
    ("optim", "name"),
    ("optim", "schedule"),
    ("optim", "groups", "name"),
    ("optim", "groups", "schedule"),
    ("time", "method"),
    ("problem", "field"),
    ("control", "kind"),
    ("control", "initial"),
    ("control", "cost", "name"),
    ("control", "optim", "name"),
    ("control", "optim", "schedule"),
    ("control", "optim", "groups", "name"),
    ("control", "optim", "groups", "schedule"),
    ("output", "callbacks"),
    *(("time", steps, "solver") for steps in ("fine", "coarse", "tangents")),
)
"""Where a config names code."""


def is_python(path: str | Path) -> bool:
    """Whether a config is one inside a Python file. Local."""
    return Path(path).suffix == ".py"


def extract_config(text: str, source: str) -> str:
    """The TOML text in the source text of a Python file. Local.

    Raises:
        ConfigError: if that is no Python, or has no settings or something else in their place.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{source} is not valid Python: {error}.") from error
    values = [node for node in tree.body if _is_config(node)]
    if not values:
        raise ConfigError(
            f'{source} has no settings: they are the TOML text in `{NAME} = """..."""`, at the '
            "top level of the file."
        )
    match values:
        case [ast.Assign(value=ast.Constant(value=str(found)))]:
            return found
    raise ConfigError(
        f"`{NAME}` in {source} must be one plain string, assigned once: the file is read and not "
        "run, so nothing can be computed there. `--set` changes settings."
    )


def code_of(text: str) -> str:
    """What a Python file does, without its settings, comments and layout. Local."""
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not _is_config(node)]
    return ast.dump(tree)


def name_home(data: dict[str, Any], source: str) -> None:
    """Write `":name"`, wherever a config names code, as `"source:name"`. Local; in place."""
    for _, table, key in _places(data):
        match table[key]:
            case str(name):
                table[key] = _at_home(name, source)
            case list(names):
                table[key] = [_at_home(n, source) if isinstance(n, str) else n for n in names]


def named_code(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and value wherever a config, as nested tables, names code or what could be. Local."""
    for path, table, key in _places(data):
        named = table[key] if isinstance(table[key], list) else [table[key]]
        yield from ((path, name) for name in named if isinstance(name, str))


def _places(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    for *path, key in _OWN:
        tables: list[Any] = [data]
        for part in path:
            found = [table.get(part) for table in tables if isinstance(table, dict)]
            tables = [one for all_ in found for one in (all_ if isinstance(all_, list) else [all_])]
        for table in tables:
            if isinstance(table, dict) and key in table:
                yield ".".join([*path, key]), table, key


def _at_home(name: str, source: str) -> str:
    return source + name if name.startswith(":") else name


def _is_config(node: ast.stmt) -> bool:
    match node:
        case ast.Assign(targets=targets):
            return any(isinstance(t, ast.Name) and t.id == NAME for t in targets)
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
            return name == NAME
    return False
