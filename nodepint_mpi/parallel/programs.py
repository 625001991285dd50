"""Compiled programs, kept while they are in use: a bounded number, found again by equal code.

A program belongs to the static part of its arguments. Functions made anew, such as a `lambda` in a
loop, are the same static part if they have the same code and close over the same values.
"""

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from nodepint_mpi.errors import ProblemError

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
    """A function that equals every other one of the same code, defaults and closure.

    What a function closes over is compared by value where it is a plain number or text, and by
    identity where it is an object. Objects that cannot be taken apart equal themselves alone.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function
        self._key = _code_key(function, _DEEPEST)

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


def _code_key(value: Any, depth: int) -> Hashable:
    """What two values have in common only if code that uses them does the same."""
    if isinstance(value, (bool, int, str, bytes, type(None))):
        return type(value), value
    if isinstance(value, float):
        return type(value), value.hex()
    if depth and type(value) is tuple:
        return tuple, tuple(_code_key(item, depth - 1) for item in value)
    if depth and isinstance(value, functools.partial):
        parts = value.func, value.args, tuple(sorted(value.keywords.items()))
        return functools.partial, _code_key(parts, depth)
    if depth and isinstance(value, types.FunctionType) and not vars(value):
        cells = tuple(_cell_key(cell, depth - 1) for cell in value.__closure__ or ())
        keywords = tuple(sorted((value.__kwdefaults__ or {}).items()))
        defaults = _code_key((value.__defaults__, keywords), depth - 1)
        return types.FunctionType, value.__code__, _Identity(value.__globals__), cells, defaults
    return _Identity(value)


class _Identity:
    """Equals what holds the very same object, and keeps that alive: its address stays its own."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def _cell_key(cell: types.CellType, depth: int) -> Hashable:
    try:
        return _code_key(cell.cell_contents, depth)
    except ValueError:  # not bound yet
        return "empty", _Identity(cell)
