"""The operations of a traced step in their order: what a rank does, and what ranks exchange.

Nothing is kept unless `recording` is on. Who traces a step on every rank of a line, or on ranks
that are only imagined, gets what each of them would do: `bench.planning` replays it on clocks.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from nodepint_mpi.core.levels import GroupCount

Value = TypeVar("Value")

RECV_LEFT, SEND_RIGHT = "recv_left", "send_right"
RECV_RIGHT, SEND_LEFT = "recv_right", "send_left"
SHIFT_RIGHT, SHIFT_LEFT = "shift_right", "shift_left"
REDUCE_ALL, FROM_ONE = "reduce_all", "from_one"
TO_FIRST, FROM_FIRST, TO_ALL = "to_first", "from_first", "to_all"
REDUCE_SCATTER, GATHER_SHARDS = "reduce_scatter", "gather_shards"
ON_FIRST, TO_GRID = "on_first", "to_grid"
TO_CELL, FROM_CELL = "to_cell", "from_cell"
BEGIN_WITHIN, SEND_WITHIN_RIGHT, SEND_WITHIN_LEFT = "begin_within", "within_right", "within_left"
BEGIN_RELAY, RELAY_RIGHT, RELAY_LEFT = "begin_relay", "relay_right", "relay_left"


class FromFront(NamedTuple):
    """A number of slices that is known once the front is: see `counters.unsolved`.

    Of the slices of the rank, or of all slices if `whole`.
    """

    beyond: int
    at_once: int | None
    whole: bool
    more: int = 0


class OfGroups(NamedTuple):
    """A number that depends on where groups of `coarsening` slices begin on a rank.

    `each` times a `core.levels.GroupCount`.
    """

    what: GroupCount
    coarsening: int
    each: int = 1


class Work(NamedTuple):
    """What one rank does by itself in a phase, or hands over in a message.

    `tally` is a `counters.Tally` of whole numbers, of `FromFront` and `OfGroups`, and of None where
    a number is not known before the step runs. `others` are what is not counted but recorded alone,
    by name: `walked` and `composed`, affine maps of the coarse problem in coordinates that a state
    is walked through, and that are made of two; `swept`, slices of a sweep; `snapshots`, slices
    whose states show new directions, and `factored`, how often these are found; `encoded`, batches,
    or a share of one; `observed`, observation times; `updated`, parameters that the optimizer
    changes.
    """

    phase: str
    tally: Any
    others: tuple[tuple[str, int | float], ...] = ()


class Call(NamedTuple):
    """A function of `exchange` or `shards` that all ranks call; `n_bytes` is what this one has to
    send.

    Of receiving, what it gets; of a gather or scatter, the part of one rank; of `REDUCE_SCATTER`,
    all that is summed. `coarsening` is that of groups of slices, of walks within them and of relays
    from one to the next.
    """

    kind: str
    n_bytes: int
    distance: int = 1
    coarsening: int = 0


class Loop(NamedTuple):
    """What is done as often as there are sweeps."""

    body: "tuple[Operation, ...]"


class Branch(NamedTuple):
    """What is done while the sweeps go on, and what is done in the end."""

    going: "tuple[Operation, ...]"
    ending: "tuple[Operation, ...]"


Operation = Work | Call | Loop | Branch

_RECORD: ContextVar[list[Operation] | None] = ContextVar("record", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Operation]]:
    """Keep the operations that are traced in the body of a `with` statement. Local.

    Within it loops are traced once, and branches that are unusual not at all.
    """
    operations: list[Operation] = []
    token = _RECORD.set(operations)
    try:
        yield operations
    finally:
        _RECORD.reset(token)


def is_recording() -> bool:
    """Whether operations are kept. Local."""
    return _RECORD.get() is not None


def record(operation: Operation) -> None:
    """Add an operation, if they are kept. Local."""
    operations = _RECORD.get()
    if operations is not None:
        operations.append(operation)


def record_loop(body: Callable[[Value], Value], first: Value) -> Value:
    """Add what the body of a loop does, which is traced once. Local."""
    with recording() as done:
        jax.eval_shape(lambda value: body(value), first)  # new each time: JAX remembers others
    record(Loop(tuple(done)))
    return first


def record_map(function: Callable[[Any], Value], row: Any, n_rows: int) -> Value:
    """Add what a function of a row does, as often as there are rows. Local."""
    with recording() as done:
        like = jax.eval_shape(lambda row: function(row), row)
    for _ in range(n_rows):
        for operation in done:
            record(operation)
    return jax.tree.map(lambda x: jnp.zeros((n_rows, *x.shape), x.dtype), like)


def record_branch(
    taken: Callable[[], Value], other: Callable[[], Value], usual: bool | None
) -> Value:
    """Add the branch that is usual, or both where sweeps go on or end: None. Local."""
    if usual is not None:
        return taken() if usual else other()
    with recording() as going:
        value = taken()
    with recording() as ending:
        other()
    record(Branch(tuple(going), tuple(ending)))
    return value
