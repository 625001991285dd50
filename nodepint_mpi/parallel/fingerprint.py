"""A digest of Python values: numbers, arrays, trees, objects, and functions by their code.

Two processes that hold equal values get equal digests, whatever their addresses and hash seeds.
Of a function it takes in the byte code, constants, defaults, what it closes over, and the globals
that its code names; of a class its methods. Functions of installed packages and of the standard
library count by name. An object without any of this counts by its class.
"""

import dataclasses
import enum
import functools
import os
import sys
import sysconfig
import types
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.core import Tracer

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), slice, range, np.dtype)
_OF_FILES = ("__module__", "__firstlineno__", "__doc__")
_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_FOLDERS = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_INSTALLED = tuple(os.path.realpath(folder) + os.sep for folder in [*_FOLDERS, _PACKAGE] if folder)


def fingerprint(value: Any) -> int:
    """Digest of a value, 64 bits. Local. A traced array counts by its shape and type."""
    return _Walk().digest(value)


class _Walk:
    """One walk through a value; what was met before counts by when it was met."""

    def __init__(self) -> None:
        self._met: dict[int, int] = {}
        self._alive: list[Any] = []  # ids stay unique as long as what they belong to lives

    def digest(self, value: Any) -> int:
        """Digest of a value within this walk. Local."""
        return xxhash.xxh3_64_intdigest("\0".join(self._parts(value)).encode())

    def _parts(self, value: Any) -> list[str]:
        """What makes up a value, as text; the first part is its kind."""
        kind = _name(type(value))
        if isinstance(value, enum.Enum):
            return [kind, value.name]
        if isinstance(value, _PLAIN):
            return [kind, repr(value)]
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            return _array_parts(value)
        if id(value) in self._met:
            return ["met", str(self._met[id(value)])]
        self._met[id(value)] = len(self._met)
        self._alive.append(value)
        if isinstance(value, (tuple, list)):
            return [kind, *map(self._of, value)]
        if isinstance(value, Mapping):
            keys = sorted(value, key=fingerprint)
            return [kind, *(self._of(part) for key in keys for part in (key, value[key]))]
        if isinstance(value, (set, frozenset)):
            return [kind, *map(str, sorted(map(fingerprint, value)))]
        return [kind, *self._object_parts(value)]

    def _of(self, value: Any) -> str:
        return f"{self.digest(value):016x}"

    def _object_parts(self, value: Any) -> list[str]:
        wrapped = getattr(value, "__wrapped__", None)
        if isinstance(value, types.ModuleType):
            return [value.__name__, str(getattr(value, "__version__", ""))]
        if isinstance(value, types.CodeType):
            return self._code_parts(value)
        if isinstance(value, types.MethodType):
            return [self._of(value.__func__), self._of(value.__self__)]
        if isinstance(value, functools.partial):
            return [self._of(part) for part in (value.func, value.args, value.keywords)]
        if isinstance(value, types.FunctionType):
            return self._function_parts(value)
        if isinstance(value, type):
            return self._class_parts(value)
        if isinstance(value, types.BuiltinFunctionType):
            return [f"{value.__module__}.{value.__qualname__}"]
        if isinstance(value, property):
            return [self._of(value.fget)]
        if isinstance(value, (staticmethod, classmethod)):
            return [self._of(value.__func__)]
        if callable(wrapped):  # such as a function under `jax.jit`
            return [self._of(wrapped)]
        state = _state(value)
        return [self._of(type(value)), *(self._of(state) for state in [state] if state is not None)]

    def _function_parts(self, function: types.FunctionType) -> list[str]:
        name = _name(function)
        code = function.__code__
        if is_installed(code.co_filename):
            return [name]
        held = [_cell(cell) for cell in function.__closure__ or ()]
        names = names_of_code(code)
        named = {
            name: of_module(function.__globals__[name], names)
            for name in sorted(names)
            if name in function.__globals__
        }
        more = (function.__defaults__, function.__kwdefaults__, held, named)
        return [name, self._of(code), *map(self._of, more)]

    def _code_parts(self, code: types.CodeType) -> list[str]:
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return [code.co_code.hex(), repr(names), repr(counts), *map(self._of, code.co_consts)]

    def _class_parts(self, cls: type) -> list[str]:
        parts = []
        for base in cls.__mro__:
            parts.append(_name(base))
            if not _is_installed_module(base.__module__):
                own = vars(base).items()
                own = {k: v for k, v in own if _is_code(v) or isinstance(v, _PLAIN)}
                parts.append(self._of({k: v for k, v in own.items() if k not in _OF_FILES}))
        return parts


def _name(of: type | types.FunctionType) -> str:
    """Full name; without the module where a user wrote it, for files are imported by any name."""
    module = str(of.__module__)
    return f"{module}.{of.__qualname__}" if _is_installed_module(module) else of.__qualname__


def _array_parts(value: Any) -> list[str]:
    kind = f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Tracer):
        return ["traced", kind]
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    values = np.ascontiguousarray(value)
    if values.dtype.hasobject:
        return ["array", kind, repr(values.tolist())]
    return ["array", kind, xxhash.xxh3_64_hexdigest(cast(Any, values.reshape(-1).view(np.uint8)))]


def _state(value: Any) -> Any:
    """What an object holds, or None if it does not show it."""
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    return getattr(value, "__dict__", None)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return "empty cell"


def names_of_code(code: types.CodeType) -> set[str]:
    """Names that code and the functions inside it look up, as globals or as attributes."""
    inner = (names_of_code(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def of_module(value: Any, names: set[str]) -> Any:
    """What of a user's module has one of the names; anything else as it is."""
    if not isinstance(value, types.ModuleType) or _is_installed_module(value.__name__):
        return value
    return {name: vars(value)[name] for name in sorted(names) if name in vars(value)}


def _is_code(value: Any) -> bool:
    """Whether this entry of a class is one of its methods; equinox wraps them."""
    known = (types.FunctionType, property, staticmethod, classmethod)
    return isinstance(value, known) or (
        hasattr(value, "__get__") and type(value).__module__ != "builtins"
    )


@functools.lru_cache(maxsize=4096)
def is_installed(filename: str) -> bool:
    return filename.startswith("<frozen") or os.path.realpath(filename).startswith(_INSTALLED)


@functools.lru_cache(maxsize=4096)
def _is_installed_module(name: str) -> bool:
    module = sys.modules.get(name)
    filename = getattr(module, "__file__", None)
    if filename is None:  # built in, or typed in
        return name != "__main__"
    return is_installed(filename)
