"""The code that a run computes with: what a config names is imported early, and has a digest.

Ranks read their own copies of these files. An old copy on one machine trains to other numbers, and
nothing else would show it.
"""

import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nodepint_mpi.build.imports import import_object, is_import_path
from nodepint_mpi.build.objects import is_object
from nodepint_mpi.config.embedded import named_code
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import ConfigError, NodepintError
from nodepint_mpi.parallel.fingerprint import fingerprint

PACKAGE = Path(__file__).resolve().parents[1]
"""Where this package is."""


class LoadedCode(NamedTuple):
    """Digests of source files, and of objects that a program gives, by what they are called on all
    ranks; or why importing failed."""

    digests: dict[str, str]
    error: NodepintError | None


def load_code(config: Config) -> LoadedCode:
    """Import what the config names and take the digests of all source files. Local.

    Raises nothing that importing raises: the ranks first have to meet. A function that makes the
    data runs on one rank, and data are compared by their values.
    """
    digests = {"the package nodepint_mpi": _digest(sorted(PACKAGE.rglob("*.py")))}
    try:
        for key, name in named_code(config.model_dump()):
            if is_import_path(name) and key not in ("data.source", "problem.field"):
                found = _import(name, key)
                if is_object(name):
                    digests[name] = f"{fingerprint(found):016x}"
                    continue
                home = name.rpartition(":")[0]
                sources = _file_of(home, found)
                if sources:
                    digests[home] = _digest(sources)
    except NodepintError as error:
        return LoadedCode(digests, error)
    return LoadedCode(digests | {name: _digest([path]) for name, path in _own_modules()}, None)


def _import(name: str, key: str) -> object:
    try:
        return import_object(name, key)
    except SystemExit as error:
        raise ConfigError(
            f'`{key} = "{name}"`: importing it ended with {error!r}; what a script does belongs '
            'under `if __name__ == "__main__":`.'
        ) from error


def _file_of(home: str, found: object) -> list[Path]:
    """The source of a file or module; none of what is not written in Python."""
    if home.endswith(".py"):
        return [Path(home)]
    module = sys.modules.get(home) or inspect.getmodule(found)
    source = getattr(module, "__file__", None)
    return [Path(source)] if source and source.endswith(".py") else []


def _own_modules() -> Iterator[tuple[str, Path]]:
    """Modules that are neither installed nor of Python or this package: the user's own."""
    places = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    places |= {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), PACKAGE}
    for name, module in list(sys.modules.items()):
        source = getattr(module, "__file__", None)
        if not isinstance(source, str) or not source.endswith(".py"):
            continue
        if name.startswith("nodepint_user_"):  # named by the config, and there by its path
            continue
        path = Path(source)
        if places.isdisjoint(_folders_of(source)) and path.is_file():
            yield f"the module {name}", path


@functools.cache  # of thousands of modules: following the links takes most of the time
def _folders_of(source: str) -> frozenset[Path]:
    return frozenset(Path(source).resolve().parents)


def _digest(paths: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        whole.update(f"{path.name} {len(content)}\n".encode() + content)
    return whole.hexdigest()[:12]
