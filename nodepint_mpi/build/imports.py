"""The user's own Python objects, named in a config as `module:name` or `file.py:name`."""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from nodepint_mpi.build.objects import find_object, is_object
from nodepint_mpi.config.control import RUN, ControlSection
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.optim import OptimSection
from nodepint_mpi.errors import ConfigError

_log = logging.getLogger(__name__)


def is_import_path(name: str) -> bool:
    """Whether a name in a config points to the user's own code. Local."""
    return ":" in name


def named_code(config: Config) -> dict[str, str]:
    """The import paths in a config by their keys: the code that running it would import. Local.

    Without what stands for an object, which a program has to give itself.
    """
    found = dict(_solvers(config.time.model_dump(), "time"))
    found["time.method"] = config.time.method
    found |= dict(_of_optim(config.optim, "optim"))
    if config.network is not None:
        found["network.name"] = config.network.name
    if config.loss is not None:
        found["loss.name"] = config.loss.name
        found |= {f"loss.metrics[{i}]": path for i, path in enumerate(config.loss.metrics)}
        found |= {f"loss.terms[{i}].name": one.name for i, one in enumerate(config.loss.terms)}
    if config.data is not None and config.data.is_made:
        found["data.source"] = config.data.source
    if config.problem is not None and not config.problem.field.startswith(RUN):
        found["problem.field"] = config.problem.field
    if config.control is not None:
        found |= dict(_of_control(config.control))
    found |= {f"output.callbacks[{i}]": path for i, path in enumerate(config.output.callbacks)}
    return {k: path for k, path in found.items() if is_import_path(path) and not is_object(path)}


def _of_optim(section: OptimSection, key: str) -> Iterator[tuple[str, str]]:
    yield f"{key}.name", section.name
    yield f"{key}.schedule", section.schedule
    for i, group in enumerate(section.groups):
        for name, path in (("name", group.name), ("schedule", group.schedule)):
            if path is not None:
                yield f"{key}.groups[{i}].{name}", path


def _of_control(section: ControlSection) -> Iterator[tuple[str, str]]:
    yield "control.kind", section.kind
    yield "control.cost.name", section.cost.name
    if isinstance(section.initial, str):
        yield "control.initial", section.initial
    if section.optim is not None:
        yield from _of_optim(section.optim, "control.optim")


def require_trust(config: Config, folder: Path, *, trust: bool) -> None:
    """Refuse a run directory whose config names code, unless the user trusts it. Local.

    Raises:
        ConfigError: with the code it names.
    """
    code = named_code(config)
    if code and not trust:
        listing = ", ".join(f'`{key} = "{path}"`' for key, path in code.items())
        raise ConfigError(
            f"The config in {folder} names code to import and run: {listing}. Expected built-in "
            "names only, since a run directory may come from somebody else: look at that code, "
            "then pass `--trust` (in Python, `trust=True`)."
        )


def _solvers(section: Mapping[str, Any], key: str) -> Iterator[tuple[str, str]]:
    """All solvers in a section and in those within it."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _solvers(value, f"{key}.{name}")
        elif name == "solver" and isinstance(value, str):
            yield f"{key}.{name}", value


def import_object(path: str, key: str) -> Any:
    """Import what a config key names, or find the object it stands for. Local.

    Args:
        path: `module:name`, or `file.py:name` relative to the working directory, or the name of an
            object that the program has given.
        key: The config key, for messages.

    Raises:
        ConfigError: if there is no such module, file or name, or importing it fails.
    """
    if is_object(path):
        return find_object(path, key)
    home, _, name = path.rpartition(":")
    known = set(sys.modules)
    try:
        module = import_file(Path(home), key) if home.endswith(".py") else _load_module(home)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f'`{key} = "{path}"`: importing {home} failed: {type(error).__name__}: {error}'
        ) from error
    if module.__name__ not in known:
        where = getattr(module, "__file__", None) or "this interpreter"
        _log.info('imported `%s = "%s"` from %s', key, path, where)
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f'`{key} = "{path}"`: {home} has nothing named {name!r}.') from None


def import_function(path: str, key: str) -> Callable[..., Any]:
    """Import a function that a config key names. Local.

    Raises:
        ConfigError: as `import_object`, and if what is named is not a function.
    """
    found = import_object(path, key)
    if not callable(found):
        kind = type(found).__name__
        raise ConfigError(f'`{key} = "{path}"` is of type {kind}; expected a function.')
    return found


def _load_module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def import_file(path: Path, key: str) -> Any:
    """The module in a Python file, imported once. Local.

    Raises:
        ConfigError: if there is no such file, in the name of the config key `key`.
    """
    if not path.is_file():
        raise ConfigError(f"`{key}`: there is no file {path} (seen from {Path.cwd()}).")
    name = f"nodepint_user_{path.stem}_{xxhash.xxh3_64_hexdigest(os.fsencode(path.resolve()))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # a .py file has both
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
