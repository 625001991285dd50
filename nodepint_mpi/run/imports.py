"""The user's own Python objects, named in a config as `module:name` or `file.py:name`."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from nodepint_mpi.errors import ConfigError


def is_import_path(name: str) -> bool:
    """Whether a name in a config points to the user's own code. Local."""
    return ":" in name


def import_object(path: str, key: str) -> Any:
    """Import what a config key names. Local.

    Args:
        path: `module:name`, or `file.py:name` relative to the working directory.
        key: The config key, for messages.

    Raises:
        ConfigError: if there is no such module, file or name, or importing it fails.
    """
    home, _, name = path.rpartition(":")
    try:
        module = import_file(Path(home), key) if home.endswith(".py") else _load_module(home)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f'`{key} = "{path}"`: importing {home} failed: {type(error).__name__}: {error}'
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f'`{key} = "{path}"`: {home} has nothing named {name!r}.') from None


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
    name = f"nodepint_user_{path.stem}_{abs(hash(path.resolve())):x}"
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
