"""Compiled programs that send messages, apart from the process that compiled them.

mpi4jax writes the handle of a communicator into the program: with Open MPI the address of an
object, with MPICH a number. So are those of the reduction and of the types of the numbers. Another
process has other handles, and what lies at the old ones may be another communicator.

A program can be kept all the same, because XLA does not look into what it passes to MPI: it is
compiled with placeholders, numbered in the order in which handles first appear, and every process
puts its own handles in their places. What it then runs is what compiling its own program would have
given, whatever role a communicator has: a program is found by its text with placeholders, and that
text with the handles put back is the text that was asked for.
"""

import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.mlir import ir
from mpi4jax._src import xla_bridge

CONFIG = "mhlo.backend_config"
"""The attribute of a call that holds what is passed to it (jax/_src/ffi.py)."""
HANDLES = frozenset({"comm", "op", "dtype", "sendtype", "recvtype"})
"""Arguments of mpi4jax's calls that only the process itself understands."""
NUMBERS = frozenset(
    {"nitems", "sendcount", "recvcount", "source", "dest", "root", "tag", "sendtag", "recvtag"}
)
"""Those that are the same in all processes."""

_FIRST = 9_100_000_000_000_000_000
_LIMIT = 9_200_000_000_000_000_000
_DIGITS = len(str(_FIRST))
_PLACEHOLDER = re.compile(rb"(?<!\d)91\d{17}(?!\d)")
_WRITTEN = re.compile(rb"\b(comm|op|dtype|sendtype|recvtype) = (-?\d+) : i64")


class UnknownCallError(Exception):
    """A program calls MPI in a way that this module does not know: it must not be kept."""


def sends_messages(module: ir.Module) -> bool:
    """Whether a lowered program calls MPI. Local."""
    return any(True for _ in _calls(module.operation))


def without_handles(module: ir.Module) -> tuple[ir.Module, dict[int, int]]:
    """A copy of a lowered program with placeholders, and the handles that belong there. Local.

    Raises:
        UnknownCallError: if an argument of a call may be bound to this process in another way.
    """
    written = io.BytesIO()
    module.operation.write_bytecode(file=written)  # with the names that profiles show
    with module.context:
        copy = ir.Module.parse(written.getvalue())
        places: dict[tuple[str, int], int] = {}
        for call in _calls(copy.operation):
            call.attributes[CONFIG] = _replaced(call, places)
    return copy, {place: handle for (_, handle), place in places.items()}


def with_handles(program: bytes, handles: Mapping[int, int]) -> bytes:
    """A serialized program with handles in the places of placeholders. Local.

    Of the same length, for what is serialized counts its bytes: numbers are filled up with zeros.

    Raises:
        UnknownCallError: if the program does not hold exactly these placeholders, each as an
            argument of a call.
    """
    found = {int(text) for text in _PLACEHOLDER.findall(program)}
    arguments = [int(text) for _, text in _WRITTEN.findall(program)]
    if found != set(handles) or set(arguments) != set(handles):
        raise UnknownCallError("its placeholders are not those of the program")
    if len(arguments) != len(_PLACEHOLDER.findall(program)):
        raise UnknownCallError("a placeholder is not where a handle belongs")
    filled = _PLACEHOLDER.sub(lambda match: _as_text(handles[int(match[0])]), program)
    if len(filled) != len(program):
        raise UnknownCallError("a handle is too long")
    return filled


def _replaced(call: ir.Operation, places: dict[tuple[str, int], int]) -> ir.Attribute:
    """The arguments of a call with placeholders; `places` gets those that are new."""
    if CONFIG not in call.attributes:
        raise UnknownCallError("a call of MPI without its arguments")
    arguments: dict[str, Any] = {}
    for named in ir.DictAttr(call.attributes[CONFIG]):
        name, value = named.name, ir.IntegerAttr(named.attr).value
        if name in HANDLES:
            kind = name if name in ("comm", "op") else "dtype"
            if (kind, value) not in places:
                places[kind, value] = _FIRST + len(places)
            arguments[name] = ir.IntegerAttr.get(named.attr.type, places[kind, value])
        elif name in NUMBERS or (name == "status" and value == xla_bridge.MPI_STATUS_IGNORE_ADDR):
            if _FIRST <= value < _LIMIT:
                raise UnknownCallError("a number that looks like a placeholder")
            arguments[name] = named.attr
        else:
            raise UnknownCallError(f"argument '{name}'")
    return ir.DictAttr.get(arguments)


def _calls(operation: ir.Operation) -> Iterator[ir.Operation]:
    """All calls of MPI in an operation, in the order of the program."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                target = inner.operation.attributes
                if inner.operation.name == "stablehlo.custom_call" and _is_mpi(
                    ir.StringAttr(target["call_target_name"]).value
                ):
                    yield inner.operation
                yield from _calls(inner.operation)


def _is_mpi(target: str) -> bool:
    return target.startswith("mpi_") and target.endswith("_ffi")


def _as_text(handle: int) -> bytes:
    return f"{handle:0{_DIGITS}d}".encode()
