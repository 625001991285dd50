"""Configs and recipes that come with the package: in a wheel inside it, else in the repository.

All functions are local. Importing this module loads neither MPI nor JAX.
"""

import re
import shutil
from pathlib import Path

from nodepint_mpi.errors import ConfigError, OutputError
from nodepint_mpi.names import hint

_INSIDE = Path(__file__).resolve().parents[1] / "shipped"
IN_WHEEL = _INSIDE.is_dir()
"""Whether the recipes are those of a wheel, beside which nothing should be written."""
ROOT = _INSIDE if IN_WHEEL else Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
CONFIGS = ROOT / "configs"
_RECIPE = re.compile(r"\bdata/(\w+)/|^source = \"(\w+)\"", re.MULTILINE)
_USED = re.compile(r"\.\./\.\./(tools/\w+\.py)")


def config_names() -> list[str]:
    """The configs there are, such as `mnist` and `control/heat`, in order."""
    found = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.toml"))
    return sorted(path.as_posix() for path in found)


def find_config(name: str) -> Path:
    """The file of a config.

    Raises:
        ConfigError: for a name that none has.
    """
    known = config_names()
    if name not in known:
        raise ConfigError(
            f"unknown config {name!r}{hint(name, known)}; `nodepint config` lists all"
        )
    return CONFIGS / f"{name}.toml"


def copy_config(name: str, folder: Path) -> list[Path]:
    """Copy a config, and the code and recipes that it names, into a folder.

    They have the places there that they have in the repository: `configs/` and `data/`. Recipes
    that are there stay as they are.

    Returns:
        The files that were written, the config first.

    Raises:
        ConfigError: for an unknown name.
        OutputError: if the config is there already, or cannot be written.
    """
    source = find_config(name)
    target = folder / source.relative_to(ROOT)
    if target.exists():
        raise OutputError(f"Cannot write {target}: it exists. Remove it, or choose another folder.")
    recipes = {one or other for one, other in _RECIPE.findall(source.read_text(encoding="utf-8"))}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written = [Path(shutil.copyfile(source, target))]
        for recipe in sorted(recipes):
            written += copy_recipe(recipe, folder)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror}.") from error
    return written


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copy what is in `data/NAME` but prepared data, and the files it uses, into a folder.

    Files that are there stay as they are. An unknown name copies nothing.

    Raises:
        OSError: if it cannot be written.
    """
    files = sorted(path for path in (DATA / name).glob("*") if path.suffix in (".py", ".md"))
    used = {match for path in files for match in _USED.findall(path.read_text(encoding="utf-8"))}
    written = []
    for source in (*files, *(ROOT / file for file in sorted(used))):
        target = folder / source.relative_to(ROOT)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            written.append(Path(shutil.copyfile(source, target)))
    return written
