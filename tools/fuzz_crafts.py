"""Changes to an HDF5 file as somebody could make them who means harm. See `tools/fuzz_files.py`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

FOREIGN = 1234.5  # what the other file holds
PLANTED = 7.25  # what a craft may rightly put into an array of the file itself
Rng = np.random.Generator

_h5: Any = h5py
_TYPES = ["f2", ">f8", "f4", "g", "i8", "u1", "c16", "S7", "V5", "?", "O", "ref", "2f8", "pair"]
_VALUES = [
    None, True, -1, 0, 2**31, 10**30, 1e308, float("nan"), "", "x" * 3000, "evil_marker:make", [],
    [1e9, 1e9, 1e9], [10**9] * 4, {}, {"a": [[]]}, [None], "\n\x1b[31m",
]  # fmt: skip
_TEXTS = [
    b"", b"[]", b"{", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"9" * 5000, b"0",
]  # fmt: skip
_CONFIG_EDITS = [
    ("n_slices = ", "n_slices = 1000000000 #"),
    ("width = ", "width = 100000000 #"),
    ("depth = ", "depth = 1000000000 #"),
    ('name = "mlp"', 'name = "evil_marker:make"\noptions = {} #'),
    ('name = "mlp"', 'name = "evil_marker.py:make" #'),
    ('solver = "rk4"', 'solver = "evil_marker:make" #'),
    ('solver = "rk4"', 'solver = "chebyshev"\nn_stages = 1000000000 #'),
    ('name = "mean_squared_error"', 'name = "evil_marker:make" #'),
    ("n_steps = ", "n_steps = 1000000000 #"),
    ("[time]", "[time"),
    ('precision = "float64"', 'precision = "float16" #'),
    ("horizon = ", "horizon = [0.0, 1e300] #"),
]


def craft(path: Path, foreign: Path, rng: Rng) -> str:
    """Change a file by one craft of those below; returns what was done."""
    with h5py.File(path, "r+", locking=False) as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if _is_array(item) else None)
        name = names[rng.integers(len(names))]
        change = CRAFTS[rng.integers(len(CRAFTS))]
        detail = change(file, name, foreign, rng)
    return f"{change.__name__.strip('_')} {name} {detail or ''}".strip()


def _is_array(item: Any) -> bool:
    return isinstance(item, h5py.Dataset)


def _replace(file: Any, name: str, make: Callable[[], Any]) -> None:
    """Another object under the name of a dataset, with its attributes."""
    kept = {key: file[name].attrs[key] for key in file[name].attrs}
    del file[name]
    made = make()
    for key, value in kept.items():
        made.attrs[key] = value


def _external(file, name, foreign, rng):
    old = file[name]
    size = max(1, old.dtype.itemsize * int(np.prod(old.shape)))
    shape, dtype = old.shape, old.dtype
    external = [(str(foreign), int(rng.integers(0, 8)) * 8, size)]
    if shape == () or old.dtype.hasobject:
        shape, dtype = (4,), np.dtype("f8")
        external = [(str(foreign), 0, 32)]
    _replace(file, name, lambda: file.create_dataset(name, shape, dtype, external=external))


def _virtual(file, name, foreign, rng):
    shape = file[name].shape or (4,)
    layout = h5py.VirtualLayout(shape, "f8")
    source = h5py.VirtualSource(str(foreign.with_suffix(".h5")), "x", shape=(10_000,))
    if len(shape) == 1 and shape[0] <= 10_000:
        layout[:] = source[: shape[0]]
    _replace(file, name, lambda: file.create_virtual_dataset(name, layout, fillvalue=FOREIGN))


def _link(file, name, foreign, rng):
    others = [h5py.ExternalLink(str(foreign.with_suffix(".h5")), "x"), h5py.SoftLink("/" + name),
              h5py.SoftLink("/nowhere"), h5py.SoftLink("/"), file["/"], file[name]]  # fmt: skip
    which = int(rng.integers(len(others)))
    where = name if rng.random() < 0.6 and which < 4 else name + "-too"
    if where in file:
        del file[where]
    file[where] = others[which]
    return ["external", "soft to itself", "dangling", "soft to root", "cycle", "second name"][which]


def _huge(file, name, foreign, rng):
    shape = [(10**12,), (10**6, 10**6), (2**40,), (0, 10**12), (10**8,)][rng.integers(5)]
    dtype = ["f8", "S4000", "u1", "f4"][rng.integers(4)]
    options = [{}, {"chunks": tuple(min(n, 64) or 1 for n in shape)}][rng.integers(2)]
    _replace(file, name, lambda: file.create_dataset(name, shape, dtype, **options))
    return f"{shape} of {dtype} {options}"


def _filter(file, name, foreign, rng):
    shape = file[name].shape
    if not shape or 0 in shape:
        shape = (5,)
    options = [dict(compression="gzip"), dict(fletcher32=True), dict(shuffle=True),
               dict(scaleoffset=2), dict(chunks=True)][rng.integers(5)]  # fmt: skip
    _replace(file, name, lambda: file.create_dataset(name, data=np.ones(shape), **options))
    return str(options)


def _bomb(file, name, foreign, rng):
    shape = (5_000_000,)
    data = np.zeros(shape)
    _replace(file, name, lambda: file.create_dataset(name, data=data, compression="gzip"))


def _type(file, name, foreign, rng):
    kind, shape = _TYPES[rng.integers(len(_TYPES))], file[name].shape
    if kind == "O":
        made = lambda: file.create_dataset(name, shape, dtype=h5py.string_dtype())  # noqa: E731
    elif kind == "ref":
        made = lambda: file.create_dataset(name, shape, dtype=h5py.ref_dtype)  # noqa: E731
    elif kind == "pair":
        pair = np.dtype([("a", "f8"), ("b", "i4")])
        made = lambda: file.create_dataset(name, data=np.zeros(shape, pair))  # noqa: E731
    else:
        made = lambda: file.create_dataset(name, data=np.zeros(shape, kind))  # noqa: E731
    _replace(file, name, made)
    return kind


def _shape(file, name, foreign, rng):
    old = file[name].shape
    shapes = [(), (0,), old[::-1], (*old, 1), (1, *old), (2,), tuple(n + 1 for n in old), (1,) * 32]
    shape = shapes[rng.integers(len(shapes))]
    _replace(file, name, lambda: file.create_dataset(name, data=np.full(shape, PLANTED)))
    return str(shape)


def _values(file, name, foreign, rng):
    if file[name].dtype.kind != "f":
        return None
    value = [np.nan, np.inf, -np.inf, PLANTED][rng.integers(4)]
    if file[name].shape == () or rng.random() < 0.5:
        file[name][...] = np.full(file[name].shape, value)
    elif file[name].size:
        file[name][(0,) * file[name].ndim] = value
    return str(value)


def _remove(file, name, foreign, rng):
    where = name if rng.random() < 0.6 else name.split("/")[0]
    del file[where]
    if rng.random() < 0.4:
        file.create_group(where)
    return where


def _attribute(file, name, foreign, rng):
    item = file if rng.random() < 0.5 else file[name]
    keys = list(item.attrs) or ["new"]
    key = keys[rng.integers(len(keys))]
    values = [np.array([], "f8"), np.int64(-1), np.uint64(2**64 - 1), np.float64("nan"), "text",
              np.bytes_(b"float64"), np.bytes_(b"object"), np.bytes_(b"O,O"), np.bytes_(b"\xff"),
              np.bytes_(b"datetime64[s]"), np.zeros((3, 3)), h5py.Empty("f8"), 10**9,
              np.bytes_(b""),
              np.bytes_(b"bfloat16"), np.bytes_(b"c" * 9000), file.ref]  # fmt: skip
    if rng.random() < 0.2:
        if key in item.attrs:
            del item.attrs[key]
        return f"without {key}"
    value = values[rng.integers(len(values))]
    item.attrs[key] = value
    return f"{key} = {str(value)[:30]!r}"


def _text(file, name, foreign, rng):
    """Metadata: no JSON, other fields, another config."""
    if "meta" not in file or not _is_array(file["meta"]):
        return None
    where, how = "meta", rng.random()
    if how < 0.25:
        where = ["meta", "config"][rng.integers(2)] if "config" in file else "meta"
        text, detail = _TEXTS[rng.integers(len(_TEXTS))], "no JSON or TOML"
    elif how < 0.6:
        meta = json.loads(file["meta"][()])
        key = list(meta)[rng.integers(len(meta))]
        meta[key] = _VALUES[rng.integers(len(_VALUES))]
        text, detail = json.dumps(meta).encode(), f"{key} = {str(meta[key])[:30]!r}"
    else:
        old, new = _CONFIG_EDITS[rng.integers(len(_CONFIG_EDITS))]
        detail = new
        if "config" in file:
            where, text = "config", bytes(file["config"][()]).decode().replace(old, new).encode()
        else:
            meta = json.loads(file["meta"][()])
            meta["config"] = str(meta["config"]).replace(old, new)
            text = json.dumps(meta).encode()
    del file[where]
    as_heap = rng.random() < 0.15
    file[where] = text if as_heap else np.array(text) if text else h5py.Empty("S1")
    return f"{where}: {detail[:40]}"


def _name(file, name, foreign, rng):
    names = ["a\nb", "\x1b[31m", "n" * 3000, "..", "é", "a b", "/".join("d" * 100), "%2F", "\u202e"]
    new = names[rng.integers(len(names))]
    where = f"{name.rpartition('/')[0]}/{new}"
    if rng.random() < 0.5:
        file.move(name, where)
    else:
        file.copy(name, where)
    return repr(new[:20])


def _swap(file, name, foreign, rng):
    """Arrays under each other's names."""
    names: list[str] = []
    file.visititems(lambda key, item: names.append(key) if _is_array(item) else None)
    other = names[rng.integers(len(names))]
    if other == name:
        return None
    file.move(name, "swapped")
    file.move(other, name)
    file.move("swapped", other)
    return other


def _space(file, name, foreign, rng):
    _replace(file, name, lambda: file.create_dataset(name, data=h5py.Empty("f8")))


def _committed(file, name, foreign, rng):
    file["kind"] = np.dtype("f8")
    if rng.random() < 0.5:
        shape = file[name].shape
        _replace(file, name, lambda: file.create_dataset(name, shape, dtype=file["kind"]))


CRAFTS = [
    _external, _virtual, _link, _huge, _filter, _bomb, _type, _shape, _values, _remove,
    _attribute, _attribute, _text, _text, _text, _name, _swap, _space, _committed,
]  # fmt: skip
