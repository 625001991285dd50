"""What may be in an HDF5 file that is read here: plain arrays of numbers in the file itself.

HDF5 can do more: take bytes from other files (external storage, virtual datasets, external and
soft links), decode them by plug-ins (filters), and declare more values than the file has bytes.
A seal says nothing about that, because whoever makes a file can also seal it. So every link,
dataset and attribute is looked at before any value is read.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nodepint_mpi.io.leaves import storable_dtype

_h5: Any = h5py  # its low-level interface has no types
_MOST_ATTRIBUTE_BYTES = 64 * 2**10
_MOST_DEPTH = 64  # of groups in groups
_NUMBERS = {_h5.h5t.INTEGER, _h5.h5t.FLOAT, _h5.h5t.ENUM, _h5.h5t.COMPOUND, _h5.h5t.BITFIELD}


def check_contents(file: h5py.File, path: Path, *, chunked: bool = False) -> None:
    """Look at all links, datasets and attributes of an open file. Local.

    Args:
        file: Open for reading.
        path: Its name.
        chunked: Whether datasets may lie in chunks, and attributes hold text of any length (which
            is then never read).

    Raises:
        ValueError: with what is found that is not a plain array in this file.
    """
    n_bytes, declared, seen = os.stat(path).st_size, 0, set()
    groups = [(file["/"], "", 0)]
    while groups:
        group, prefix, depth = groups.pop()
        if not chunked:
            _check_attributes(group, prefix or "/")
        for key in group:
            name = f"{prefix}/{key}"
            if not all(character.isprintable() for character in key):
                raise ValueError(f"{name!r} is not a name: it has control characters")
            raw = key.encode("utf-8", "surrogateescape")
            if group.id.links.get_info(raw).type != _h5.h5l.TYPE_HARD:
                raise ValueError(f"{name} is a link to elsewhere, expected an array in the file")
            info = _h5.h5o.get_info(group.id, raw)
            if info.addr in seen:
                raise ValueError(f"{name} is a second name of another object")
            seen.add(info.addr)
            if info.type == _h5.h5o.TYPE_GROUP and depth < _MOST_DEPTH:
                groups.append((group[key], name, depth + 1))
            elif info.type == _h5.h5o.TYPE_DATASET:
                declared += _check_dataset(group[key], name, n_bytes, chunked)
            else:
                raise ValueError(f"{name} is neither a dataset nor a group at a usual depth")
    if declared > n_bytes:
        raise ValueError(f"its arrays declare {declared} bytes, the file has {n_bytes}")


def _check_dataset(dataset: h5py.Dataset, name: str, n_bytes: int, chunked: bool) -> int:
    """The bytes a dataset declares, once it is known that they are in this file."""
    made, kind = dataset.id.get_create_plist(), dataset.id.get_type()
    layout = made.get_layout()
    if layout == _h5.h5d.VIRTUAL:
        raise ValueError(f"{name} is a virtual dataset: its values are in other files")
    if made.get_external_count():
        raise ValueError(f"{name} has external storage: its values are in other files")
    if made.get_nfilters():
        raise ValueError(f"{name} has filters, expected plain values")
    if layout == _h5.h5d.CHUNKED and not chunked:
        raise ValueError(f"{name} is stored in chunks, expected one piece")
    _check_type(kind, name)
    if dataset.id.get_space().get_simple_extent_type() == _h5.h5s.NULL:
        raise ValueError(f"{name} is empty, expected values")
    size = kind.get_size() * math.prod(dataset.shape)
    if size > n_bytes:
        raise ValueError(f"{name} declares {size} bytes, the file has {n_bytes}")
    if layout == _h5.h5d.CHUNKED and kind.get_size() * math.prod(made.get_chunk()) > n_bytes:
        raise ValueError(f"{name} declares chunks larger than the file")
    if dataset.id.get_storage_size() < size:
        raise ValueError(f"{name} declares {size} bytes, but they were never written")
    if layout == _h5.h5d.CONTIGUOUS and size:
        start = dataset.id.get_offset()
        if start is None or start + size > n_bytes:
            raise ValueError(f"{name} lies beyond the end of the file")
    if not chunked:
        _check_attributes(dataset, name)
    return size


def _check_attributes(item: Any, name: str) -> None:
    """Attributes are single numbers or short text of fixed length."""
    for number in range(_h5.h5a.get_num_attrs(item.id)):
        attribute = _h5.h5a.open(item.id, index=number)
        kind, label = attribute.get_type(), f"attribute {attribute.name.decode('utf-8', 'replace')}"
        _check_type(kind, f"{label!r} of {name}")
        size = kind.get_size() * math.prod(attribute.shape)
        if attribute.shape != () or size > _MOST_ATTRIBUTE_BYTES:
            raise ValueError(f"{label!r} of {name} is not one short value")


def _check_type(kind: Any, name: str) -> None:
    """Numbers (also complex: two members), and text of fixed length; no references, no heaps."""
    if kind.get_class() == _h5.h5t.STRING and not kind.is_variable_str():
        return
    try:
        plain = kind.get_class() in _NUMBERS and kind.dtype.kind in "biufc"
    except (TypeError, ValueError):  # h5py has no such type
        plain = False
    if not plain:
        raise ValueError(f"{name} holds neither numbers nor text of fixed length")


def read_integer(item: Any, name: str, *, least: int = 0) -> int:
    """An attribute that is a whole number. Local. Raises ValueError, KeyError."""
    value = _attribute(item, name)
    if not isinstance(value, np.integer) or int(value) < least:
        raise ValueError(
            f"attribute {name!r} is {value!r}, expected an integer of at least {least}"
        )
    return int(value)


def read_attribute_text(item: Any, name: str) -> str:
    """An attribute that is text. Local. Raises ValueError, KeyError."""
    value = _attribute(item, name)
    if not isinstance(value, bytes):
        raise ValueError(f"attribute {name!r} is {value!r}, expected text")
    return bytes(value).decode("utf-8")


def read_text_dataset(file: Any, name: str) -> str:
    """A dataset that is one text. Local. Raises ValueError."""
    dataset = find_dataset(file, name)
    if dataset.dtype.kind != "S" or dataset.shape != ():
        raise ValueError(f"{name} is {dataset.dtype} of shape {dataset.shape}, expected one text")
    return bytes(dataset[()]).decode("utf-8")


def read_json_dataset(file: Any, name: str) -> dict[str, Any]:
    """A dataset that is a JSON object as text. Local. Raises ValueError."""
    try:
        value = json.loads(read_text_dataset(file, name))
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def find_dataset(file: Any, name: str) -> h5py.Dataset:
    """A dataset by its name. Local. Raises ValueError if there is none."""
    if name not in file:
        raise ValueError(f"{name} is missing")
    item = file[name]
    if not isinstance(item, h5py.Dataset):
        raise ValueError(f"{name} is a group, expected a dataset")
    return item


def find_group(file: Any, name: str) -> h5py.Group:
    """A group by its name. Local. Raises ValueError if there is none."""
    if name not in file:
        raise ValueError(f"{name} is missing")
    item = file[name]
    if not isinstance(item, h5py.Group):
        raise ValueError(f"{name} is a dataset, expected a group")
    return item


def declared_dtype(dataset: h5py.Dataset, name: str) -> np.dtype:
    """The type its attribute `dtype` names, which its stored type must fit. Local.

    Raises:
        ValueError: if it is not a type of numbers, or not the one that is stored.
    """
    text = read_attribute_text(dataset, "dtype")
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.name != text or dtype.names or dtype.kind in "OSUMm":
        raise ValueError(f"{name} is declared as {text!r}, expected a numeric type")
    if dataset.dtype.newbyteorder("=") != storable_dtype(dtype):
        raise ValueError(f"{name} is declared as {text}, but {dataset.dtype} is stored")
    return dtype


def _attribute(item: Any, name: str) -> Any:
    if name not in item.attrs:
        raise ValueError(f"attribute {name!r} of {item.name} is missing")
    return item.attrs[name]
