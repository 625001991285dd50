"""Compiled programs, kept while they are in use: a bounded number, found again by equal code.

A program belongs to the static part of its arguments. Functions made anew, such as a `lambda` in a
loop, are the same static part if they have the same code and see the same values: those they close
over, and the globals that their code names.
"""

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.fingerprint import fingerprint, is_installed, names_of_code, of_module

MOST_PROGRAMS = 32
"""Programs kept: of some megabytes each. The least recently used one goes first."""

_DEEPEST = 8
"""Functions in the closures of functions are compared down to this depth."""


class Programs:
    """The most recently used programs by key."""

    def __init__(self, most: int = MOST_PROGRAMS) -> None:
        self._kept: OrderedDict[Hashable, Callable] = OrderedDict()
        self._most = most

    def get(self, key: Hashable, make: Callable[[], Callable]) -> Callable:
        """The program of a key, made if there is none. Local."""
        program = self._kept.pop(key, None)
        if program is None:
            program = make()
        self._kept[key] = program
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return program

    def clear(self) -> None:
        """Let all go. Local."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


class SameCode:
    """A function that equals every other one of the same code, defaults, closure and globals.

    What a function closes over, and the globals that its code names, are compared by value where
    they are plain numbers or text, and by identity where they are objects. Objects that cannot be
    taken apart equal themselves alone; of those with a `__call__` in Python its globals count, too.
    Lists, dictionaries and NumPy arrays may have been changed in place, so their contents count; a
    change inside of any other object is not seen: replace it, or pass what changes as `args`.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function
        self._key = _code_key(function, _DEEPEST, set())

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameCode) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.function)


def static_key(leaf: Any) -> Hashable:
    """What a static leaf is compared by: with its type, as 1, 1.0 and True are equal. Local.

    Raises:
        ProblemError: if it cannot be hashed.
    """
    if isinstance(leaf, types.FunctionType):
        return SameCode(leaf)
    try:
        hash(leaf)
    except TypeError:
        raise ProblemError(
            f"An argument holds a {type(leaf).__name__}, which is not an array and cannot be "
            "hashed, so it is unknown whether a compiled solve fits it: pass numbers as "
            "arrays, and what else the field needs as hashable objects or in its closure."
        ) from None
    return type(leaf), leaf


def _code_key(value: Any, depth: int, seen: set[int]) -> Hashable:
    """What two values have in common only if code that uses them does the same.

    `seen` holds the functions whose globals are in the key already: they may name each other.
    """
    if isinstance(value, (bool, int, str, bytes, type(None))):
        return type(value), value
    if isinstance(value, float):
        return type(value), value.hex()
    if depth and type(value) is tuple:
        return tuple, tuple(_code_key(item, depth - 1, seen) for item in value)
    if depth and isinstance(value, functools.partial):
        parts = value.func, value.args, tuple(sorted(value.keywords.items()))
        return functools.partial, _code_key(parts, depth, seen)
    if depth and isinstance(value, types.FunctionType) and not vars(value):
        return _function_key(value, depth, seen)
    if depth and isinstance(value, (dict, list)):  # which may have been changed in place
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return _Identity(value), tuple(_code_key((k, v), depth - 1, seen) for k, v in items)
    if isinstance(value, np.ndarray):
        return _Identity(value), fingerprint(value)
    called = vars(type(value)).get("__call__")
    if depth and isinstance(called, types.FunctionType):
        return _Identity(value), _globals_key(called, depth, seen)
    return _Identity(value)


def _function_key(function: types.FunctionType, depth: int, seen: set[int]) -> Hashable:
    cells = tuple(_cell_key(cell, depth - 1, seen) for cell in function.__closure__ or ())
    keywords = tuple(sorted((function.__kwdefaults__ or {}).items()))
    defaults = _code_key((function.__defaults__, keywords), depth - 1, seen)
    named = _globals_key(function, depth, seen)
    home = _Identity(function.__globals__)
    return types.FunctionType, function.__code__, home, cells, defaults, named


def _globals_key(function: types.FunctionType, depth: int, seen: set[int]) -> Hashable:
    """The globals that a user's code names, with those that the functions among them name."""
    code = function.__code__
    if is_installed(code.co_filename) or id(code) in seen:
        return ()
    seen.add(id(code))
    names, found = names_of_code(code), []
    for name in sorted(names & function.__globals__.keys()):
        value = of_module(function.__globals__[name], names)
        if isinstance(value, dict) and value is not function.__globals__[name]:
            value = tuple(value.items())  # what is named of a module of the user's own
        found.append((name, _code_key(value, depth - 1, seen)))
    return tuple(found)


class _Identity:
    """Equals what holds the very same object, and keeps that alive: its address stays its own."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def _cell_key(cell: types.CellType, depth: int, seen: set[int]) -> Hashable:
    try:
        return _code_key(cell.cell_contents, depth, seen)
    except ValueError:  # not bound yet
        return "empty", _Identity(cell)
