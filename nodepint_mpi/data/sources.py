"""Where datasets lie, and whether their files are as they were written.

A dataset NAME has a folder `data/NAME` with its recipe `prepare.py`; what the recipe made is in
`data/NAME/prepared`, with a `provenance.json` that knows size and checksum of each file.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nodepint_mpi.data.saved import map_saved
from nodepint_mpi.data.shipped import DATA
from nodepint_mpi.errors import DataError

PREPARED = "prepared"
PROVENANCE = "provenance.json"
RECIPE = "prepare.py"
MADE = Path("data") / "made"
"""What functions of the user's own have made, under the working directory."""
_VERIFY_LIMIT_BYTES = 256 * 2**20


def data_folders(root: str | Path | None = None) -> tuple[Path, ...]:
    """Where datasets are looked for by name: `root`, or ./data and the package's. Local."""
    if root is not None:
        return (Path(root).absolute(),)
    here = Path.cwd() / "data"
    return (here,) if here.resolve() == DATA else (here, DATA)


def known_names(root: str | Path | None = None) -> list[str]:
    """Names of the datasets that have a recipe, in order. Local."""
    found = {p.parent.name for d in data_folders(root) for p in d.glob(f"*/{RECIPE}")}
    return sorted(found)


def load(source: str | Path, *, verify: bool) -> dict[str, Any]:
    """Map the files that `source` stands for (see `open_split`). Local.

    Args:
        source: Name, folder or `hub:OWNER/NAME`.
        verify: Whether to compare checksums, of files up to 256 MiB; sizes are compared always.

    Returns:
        By split a `datasets.Dataset`, or a `SavedTable` like it; one saved without a name for its
        split is `train`.

    Raises:
        DataError: with what to type, whatever went wrong.
    """
    if str(source).startswith("hub:"):
        import datasets  # slow to load, and rarely needed

        try:
            return _by_split(datasets.load_dataset(str(source).removeprefix("hub:")))
        except Exception as error:
            raise DataError(
                f"cannot load {source} ({first_line(error)}); without a network give the name "
                "of a prepared dataset or a folder in hub layout"
            ) from error
    folder = find_folder(source)
    is_saved = _is_saved(folder)
    if is_saved:
        verify_files(folder, limit_bytes=_VERIFY_LIMIT_BYTES if verify else -1)
        mapped = map_saved(folder)
        if mapped is not None:
            return {str(split): table for split, table in mapped.items()}
    import datasets

    try:
        if is_saved:
            return _by_split(datasets.load_from_disk(str(folder), keep_in_memory=False))
        return _by_split(datasets.load_dataset(str(folder)))
    except Exception as error:
        raise DataError(
            f"the data in {folder} are damaged or of another kind ({first_line(error)}); "
            f"{_remake(folder)}"
        ) from error


def find_folder(source: str | Path) -> Path:
    """The folder of the data that `source`, a dataset's name or a path, stands for. Local.

    Raises:
        DataError: if there is none, with the command that makes it.
    """
    given = Path(source).expanduser().absolute()
    is_name = str(source) == given.name
    # Absolute throughout: `load_dataset` takes a bare name for one on the hub, or the reverse.
    named = [folder / given.name for folder in data_folders()] if is_name else []
    for folder in [*named, given]:
        for place in (folder / PREPARED, folder):
            if _is_saved(place) or _has_parquet(place):
                return place
    if given.parent.parts[-2:] == MADE.parts:
        raise DataError(
            f"no data at {source}: they were made by the function that the config named as "
            "`data.source`, which makes them again, the same from the same code"
        )
    raise DataError(f"no prepared data at {source}: run `nodepint data prepare {_name(given)}`")


def verify_files(prepared: Path, *, limit_bytes: int | None = None) -> None:
    """Compare prepared files with what their provenance.json says of them. Local.

    Sizes are compared always, checksums of files up to `limit_bytes` (no bound if None). Folders
    without a provenance.json, made by other means, are taken as they are.

    Raises:
        DataError: naming the file that is missing or differs.
    """
    record = prepared / PROVENANCE
    if not record.is_file():
        return
    try:
        files = json.loads(record.read_text())["files"]
        expected = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{record} is damaged; {_remake(prepared)}") from error
    for name, (size, digest) in expected.items():
        path = prepared / name
        if not path.is_file():
            raise DataError(f"{path} is missing; {_remake(prepared)}")
        if (found := path.stat().st_size) != size:
            raise DataError(
                f"{path} is damaged: {found} bytes instead of {size}; {_remake(prepared)}"
            )
        if (limit_bytes is None or size <= limit_bytes) and sha256_of(path) != digest:
            raise DataError(
                f"{path} is damaged: its SHA-256 is not the one noted when it was prepared; "
                f"{_remake(prepared)}"
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits. Local."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unknown(what: str, name: str, known: Iterable[Any]) -> str:
    """The words for a name that is not among those known. Local."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"no {what} {name!r} (there are {', '.join(map(repr, names)) or 'none'}{meant})"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none. Local."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _by_split(loaded: Any) -> dict[str, Any]:
    """What `datasets` loaded, a dataset or several, as a plain dictionary."""
    import datasets

    if isinstance(loaded, datasets.Dataset):
        return {str(loaded.split or "train"): loaded}
    return {str(split): part for split, part in loaded.items()}


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _has_parquet(folder: Path) -> bool:
    """Whether this folder has the hub's layout."""
    return any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))


def _name(folder: Path) -> str:
    """What `nodepint data prepare` would be called with to make `folder`."""
    folder = Path(os.path.abspath(folder))  # without '..', which is not a name
    home = folder.parent if folder.name == PREPARED else folder
    known = known_names()
    if home.name in known or not (home / RECIPE).is_file():
        near = difflib.get_close_matches(home.name, known, n=1)
        return near[0] if near else home.name
    return str(home / RECIPE)


def _remake(folder: Path) -> str:
    """What to do when prepared data cannot be used."""
    if folder.name != PREPARED:
        return "fix or replace that folder"
    return f"run `nodepint data prepare {_name(folder)} --force`"
