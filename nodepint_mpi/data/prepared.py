"""Prepared data on disk: written whole, checked, published by a rename, with their provenance."""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from nodepint_mpi.data.columns import RaggedColumn, ViewColumn, open_series
from nodepint_mpi.data.sources import PROVENANCE, sha256_of
from nodepint_mpi.errors import DataError

GAPS = (
    'where NaN stands for an observation that was not made, say so: `data.missing = "nan"`, and '
    '`MISSING = "nan"` in a recipe'
)
"""What to do about NaN in data that are prepared."""


def save_prepared(
    made: Mapping[Any, datasets.Dataset],
    target: Path,
    origin: Mapping[str, Any],
    *,
    replace: bool = True,
    missing: bool = False,
) -> dict[str, int]:
    """Write splits to the folder `target`, which is complete whenever it exists. Local.

    One that is there by then is replaced, or else kept and the new one dropped. With the files goes
    a provenance.json: `origin`, rows, columns, versions and checksums.

    Returns:
        Rows by split.

    Raises:
        DataError: for data that are empty or hold infinities, missing values, or NaN where these
            do not stand for observations that are `missing`, and if they cannot be written.
    """
    partial = target.parent / f"{target.name}-partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        try:
            with no_progress_bars():
                datasets.DatasetDict(made).save_to_disk(str(partial))
            rows = _check_saved(partial, missing)
            columns = {split: made[split].column_names for split in made}
            record = {**origin, "rows": rows, "columns": columns, **_circumstances(partial)}
            (partial / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
            _publish(partial, target, replace)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write {target} ({error}): free some space or get write permission"
        ) from error
    return rows


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep `datasets` quiet for a moment. Local."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _check_saved(folder: Path, missing: bool) -> dict[str, int]:
    """Read back what was written; rows by split."""
    saved = datasets.DatasetDict.load_from_disk(str(folder), keep_in_memory=False)
    for split, part in saved.items():
        for name, feature in part.features.items():
            if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
                continue  # notes beside the numbers
            try:
                column = open_series(name, part.data.column(name), feature)
                if isinstance(column, ViewColumn | RaggedColumn):
                    column.check_finite(name, missing=missing)
            except DataError as error:
                hint = "" if missing or " holds nan" not in str(error) else f"; {GAPS}"
                raise DataError(f"{error}{hint} (split {split!r})") from error
    return {str(split): part.num_rows for split, part in saved.items()}


def _circumstances(folder: Path) -> dict[str, Any]:
    """When and by which versions the files in `folder` were made, and their checksums."""
    versions = {"python": platform.python_version()}
    for package in ("nodepint_mpi", "datasets", "pyarrow", "numpy", "scipy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "versions": versions, "files": files}


def _publish(partial: Path, target: Path, replace: bool) -> None:
    """Put `partial` in the place of `target`; who has the old files mapped keeps them."""
    if not replace:
        try:
            partial.rename(target)
        except OSError:
            if not (target / PROVENANCE).is_file():  # else another job was faster
                raise
        return
    old = target.with_name(f"{target.name}-old-{secrets.token_hex(4)}")
    if not target.exists():
        partial.rename(target)
        return
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
