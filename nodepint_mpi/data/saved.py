"""Tables of numbers that `save_to_disk` of `datasets` wrote, mapped by pyarrow alone.

Loading `datasets` takes longer than everything else that a command needs of the data.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

_PLAIN = {"Value", "ClassLabel", "List", "LargeList", "Sequence"}
_PLAIN |= {f"Array{n}D" for n in range(2, 6)}


@dataclasses.dataclass(frozen=True)
class SavedTable:
    """One split, with the names that `datasets.Dataset` has for its parts.

    `features` says nothing of its columns, which are numbers, or lists of numbers.
    """

    num_rows: int
    column_names: list[str]
    data: pa.Table
    features: Mapping[str, None]
    _indices: None = None  # a selection of rows, which it never is


def map_saved(folder: Path) -> dict[str, SavedTable] | None:
    """Map the tables of a folder by split. Local; nothing is read but their heads.

    Returns:
        The splits; None if only `datasets` knows what is there: images, selections of rows, other
        layouts, and damaged files, for which it has the message.
    """
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        found = {split: _map_split(folder / split) for split in splits}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException):
        return None
    whole = {split: table for split, table in found.items() if table is not None}
    return whole if len(whole) == len(found) else None


def _map_split(folder: Path) -> SavedTable | None:
    """The table of one split; None if it is not one of plain numbers."""
    state = json.loads((folder / "state.json").read_text())
    info = json.loads((folder / "dataset_info.json").read_text())
    features = info["features"]
    if state.get("_indices_data_files") or not all(map(_is_plain, features.values())):
        return None
    parts = []
    for file in state["_data_files"]:
        with pa.memory_map(str(folder / file["filename"])) as source:
            parts.append(pa.ipc.open_stream(source).read_all())
    table = pa.concat_tables(parts)
    if table.column_names != list(features):
        return None
    return SavedTable(table.num_rows, table.column_names, table, dict.fromkeys(features))


def _is_plain(feature: Mapping[str, Any]) -> bool:
    """Whether a described feature is stored as numbers, or lists of them."""
    if feature["_type"] not in _PLAIN:
        return False
    return "feature" not in feature or _is_plain(feature["feature"])
