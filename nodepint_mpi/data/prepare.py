"""Run a dataset's recipe and publish what it makes, whole and with its provenance.

A recipe is a file `data/NAME/prepare.py` with one function
`prepare(folder: Path, **options) -> datasets.DatasetDict`; `folder` is the one the recipe is in,
and downloads go to `folder/download`. The result appears as `data/NAME/prepared` by a rename, so
that folder is complete whenever it exists.

A recipe that computes with other files of the repository names them, relative to its folder, in
`USES`: they count as parts of it where the checksum tells whether data are those of this recipe.
One whose data hold NaN for observations that were not made says `MISSING = "nan"`.
"""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets

from nodepint_mpi.data.prepared import no_progress_bars, save_prepared
from nodepint_mpi.data.shipped import DATA, IN_WHEEL, copy_recipe
from nodepint_mpi.data.sources import (
    PREPARED,
    PROVENANCE,
    RECIPE,
    data_folders,
    first_line,
    known_names,
    unknown,
    verify_files,
)
from nodepint_mpi.errors import DataError, NodepintError
from nodepint_mpi.names import NAME_RULE, is_name

_log = logging.getLogger(__name__)


def prepare_dataset(
    name_or_path: str | Path,
    *,
    root: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Make the prepared files of a dataset, unless they are there already.

    Local; to be called by one process, as a step before the job.

    Args:
        name_or_path: Name of a dataset with a recipe `NAME/prepare.py` under `root`, or the path
            of a recipe or of its folder.
        root: Folder of datasets. By default ./data, then that of the repository; a
            recipe that is inside an installed package is copied to ./data first.
        options: For the recipe's `prepare`, by name; text is read as the type of the default.
            Options left out have their defaults.
        force: Make them again, even where they exist; the old ones go when the new are whole.

    Returns:
        The folder `prepared` beside the recipe. Its `provenance.json` holds the options, rows,
        columns, versions, and the checksums of recipe and files.

    Raises:
        DataError: for an unknown name or option, a recipe that fails, data that are empty or
            hold NaN, infinities or missing values, and prepared files that are damaged or were
            made by another recipe or other options (unless `force`). Existing files stay.
    """
    recipe = _find_recipe(name_or_path, root)
    source = recipe.read_bytes()
    function = _load_function(recipe, source)
    resolved = resolve_options(
        list(inspect.signature(function).parameters.values())[1:], options or {}, recipe.parent.name
    )
    origin = {
        "name": recipe.parent.name,
        "options": resolved,
        "recipe_sha256": _checksum(source, function, recipe),
    }
    target = recipe.parent / PREPARED
    if target.exists() and not force:
        _check_same(target, origin)
        _log.info("%s is already prepared, with these options: nothing to do", recipe.parent.name)
        return target

    made = _run_recipe(function, recipe, resolved)
    missing = getattr(function, "__globals__", {}).get("MISSING") == "nan"
    rows = save_prepared(made, target, origin, missing=missing)
    counts = ", ".join(f"{count} rows {split}" for split, count in rows.items())
    _log.info("%s prepared: %s", recipe.parent.name, counts)
    return target


def _find_recipe(name_or_path: str | Path, root: str | Path | None) -> Path:
    """The absolute path of the recipe."""
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or os.sep in text or text.endswith(".py"):
        path = Path(text).expanduser().absolute()
        path = path / RECIPE if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"there is no recipe {path}: give a path to a prepare.py, or a name")
        return path
    for folder in data_folders(root):
        if is_name(text) and (path := folder / text / RECIPE).is_file():
            if IN_WHEEL and folder == DATA:  # nothing is prepared inside an installed package
                copy_recipe(text, Path.cwd())
                return Path.cwd() / "data" / text / RECIPE
            return path
    raise DataError(
        unknown("dataset", text, known_names(root))
        + (
            f"; looked for {RECIPE} in {', '.join(f'{d}/{text}' for d in data_folders(root))}"
            if is_name(text)
            else f"; a dataset's name is {NAME_RULE}"
        )
    )


def _load_function(recipe: Path, source: bytes) -> Callable[..., Any]:
    """The recipe's `prepare`, from exactly the bytes whose checksum is recorded."""
    module = ModuleType(f"recipe_{recipe.parent.name}")
    module.__file__ = str(recipe)
    try:
        exec(compile(source, str(recipe), "exec"), module.__dict__)
    except ImportError as error:
        raise DataError(_missing_package(recipe, error)) from error
    except Exception as error:
        raise DataError(
            f"recipe {recipe} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, "prepare", None)
    if not callable(function):
        raise DataError(f"recipe {recipe} has no function `prepare(folder, **options)`")
    return function


def _checksum(source: bytes, function: Callable[..., Any], recipe: Path) -> str:
    """SHA-256 of the recipe, followed by the files that it uses."""
    digest = hashlib.sha256(source)
    for used in getattr(function, "__globals__", {}).get("USES", ()):
        try:
            digest.update((recipe.parent / used).read_bytes())
        except OSError as error:
            raise DataError(
                f"recipe {recipe} uses {used}, which cannot be read ({error}): add it"
            ) from error
    return digest.hexdigest()


def resolve_options(
    parameters: Sequence[inspect.Parameter], options: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """All options of a function, defaults included, each in the type of its default. Local.

    Args:
        parameters: Those of the function's that are options.
        options: What is given.
        name: Of what the options are for.

    Raises:
        DataError: for an option nobody knows, of the wrong type, or missing.
    """
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):  # else it takes any option
        for option in options:
            if option not in named:
                raise DataError(unknown("option", option, named) + f" for {name}")
    resolved = dict(options)
    for option, parameter in named.items():
        if option in options and parameter.default is not parameter.empty:
            resolved[option] = _as_type_of(parameter.default, options[option], option)
        elif parameter.default is not parameter.empty:
            resolved[option] = parameter.default
        elif option not in options:
            raise DataError(f"{name} needs the option {option!r}")
    try:
        return json.loads(json.dumps(resolved, sort_keys=True))  # as it will be read back
    except (TypeError, ValueError) as error:
        raise DataError(
            f"options must be numbers, text, or lists of them, given {resolved}"
        ) from error


def _as_type_of(default: Any, value: Any, name: str) -> Any:
    """`value` in the type of `default`; text from a command line is converted."""
    kind = type(default)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind in (int, float) and isinstance(value, str):
            return kind(value)
    except (KeyError, ValueError):
        pass
    if default is None or kind not in (bool, int, float, str):
        return value
    raise DataError(
        f"option {name!r} must be of type {kind.__name__} (default {default}), given {value!r}"
    )


def _run_recipe(
    function: Callable[..., Any], recipe: Path, options: Mapping[str, Any]
) -> dict[Any, datasets.Dataset]:
    """Call the recipe; the splits it returns."""
    try:
        with no_progress_bars():
            made = function(recipe.parent, **options)
    except NodepintError:
        raise
    except ImportError as error:
        raise DataError(_missing_package(recipe, error)) from error
    except Exception as error:
        raise DataError(f"recipe {recipe} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, datasets.DatasetDict) or not made:
        raise DataError(
            f"recipe {recipe} must return a datasets.DatasetDict with at least one split, "
            f"given {type(made).__name__} of {len(made) if hasattr(made, '__len__') else 0}"
        )
    for split, part in made.items():
        if not part.num_rows:
            raise DataError(f"recipe {recipe} made no rows for split {split!r}")
    return dict(made)


def _check_same(target: Path, origin: Mapping[str, Any]) -> None:
    """Make sure that what is prepared is whole and what would be made now."""
    command = f"nodepint data prepare {origin['name']} --force"
    try:
        record = json.loads((target / PROVENANCE).read_text())
        old_options, old_recipe = dict(record["options"]), record["recipe_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{target} exists but has no valid {PROVENANCE}: `{command}` replaces it"
        ) from error
    new_options = origin["options"]
    if old_options != new_options:
        names = sorted(old_options.keys() | new_options.keys())
        changes = [
            f"{name} {old_options.get(name)!r}, now {new_options.get(name)!r}"
            for name in names
            if old_options.get(name) != new_options.get(name)
        ]
        raise DataError(
            f"{target} was made with other options ({'; '.join(changes)}): `{command}`, with "
            "the options you want, replaces it"
        )
    if old_recipe != origin["recipe_sha256"]:
        raise DataError(
            f"{target} was made by another version of its recipe: `{command}` makes it again"
        )
    verify_files(target)


def _missing_package(recipe: Path, error: ImportError) -> str:
    """What to say of a package that the recipe needs."""
    package = {"sklearn": "scikit-learn"}.get((error.name or "").split(".")[0], error.name)
    return (
        f"the recipe of {recipe.parent.name} cannot import what it needs "
        f"({first_line(error)}): `pip install {package}` in this environment"
    )
