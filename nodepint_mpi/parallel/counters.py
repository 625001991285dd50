"""Exact counts of what jitted code does on this rank: slices propagated, messages, bytes.

What a call does is known while it is traced, how often it is done only when it runs. So calls add
to the ledger that is open at trace time, as plain numbers; loops and branches have ledgers of their
own, which `while_loop` and `cond` carry and add up as arrays. Communication and propagation belong
into no other loop or branch.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nodepint_mpi.core.levels import BlockGroups, GroupCount
from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.scopes import channel, scope
from nodepint_mpi.core.sweeps import count_unsolved
from nodepint_mpi.parallel.operations import (
    FromFront,
    OfGroups,
    Work,
    is_recording,
    record,
    record_branch,
    record_loop,
    record_map,
)

Value = TypeVar("Value")


Count = int | Array

WORD_BYTES = 4
"""Messages are counted in these, so that a 32-bit count holds those of 8 GB."""


class Tally(NamedTuple):
    """What one rank did, in slices of its group of samples.

    `fine` counts slices propagated by F, `fine_pulled` those pulled back. `tangents` are directions
    pushed through a slice, `tangent_passes` what that takes: one each, and one for the state of
    every group of them. `coarse` and `reduced` count slices by a coarse propagator and by the
    reduced flow; their pull-backs include a pass forward. `messages` and `words` (of `WORD_BYTES`)
    are what the rank hands to MPI for others.
    """

    fine: Count = 0
    fine_pulled: Count = 0
    tangents: Count = 0
    tangent_passes: Count = 0
    coarse: Count = 0
    coarse_pulled: Count = 0
    reduced: Count = 0
    reduced_pulled: Count = 0
    messages: Count = 0
    words: Count = 0

    def plus(self, other: "Tally") -> "Tally":
        """The sum. Local."""
        return Tally(*(one + more for one, more in zip(self, other, strict=True)))

    def as_array(self) -> Array:
        """As one array of whole numbers, to be carried or returned. Local."""
        return jnp.stack([jnp.asarray(count, int) for count in self])


class Ledger:
    """The counts of one trace level so far."""

    def __init__(self) -> None:
        self.tally = Tally()


_LEDGER: ContextVar[Ledger | None] = ContextVar("ledger", default=None)
"""The innermost open one, as JAX keeps the innermost named scope."""


@contextlib.contextmanager
def counting() -> Iterator[Ledger]:
    """Count what is traced in the body of a `with` statement. Local.

    Read the ledger where the body was traced: not outside of the loop or branch it stands in.
    """
    ledger = Ledger()
    token = _LEDGER.set(ledger)
    try:
        yield ledger
    finally:
        _LEDGER.reset(token)


def count(tally: Tally) -> None:
    """Add to the open ledger, if there is one. Local."""
    ledger = _LEDGER.get()
    if ledger is not None:
        ledger.tally = ledger.tally.plus(tally)


@contextlib.contextmanager
def work(name: str, tally: Tally | None = None, **others: int | float) -> Iterator[None]:
    """Name the phase of what is traced in the body, and count it. Local.

    The `others` are not counted but recorded alone: see `operations.Work`.
    """
    note(name, tally, **others)
    with scope(name):
        yield


def unsolved(
    front: Array, owned: OwnedSlices, *, at_once: int | None = None, beyond: int = 0, more: int = 0
) -> Any:
    """Slices of a block at `front + beyond` or right of it, and `more` besides, as a count. Local.

    They are counted in groups of `at_once`; see `core.sweeps.count_unsolved`.
    """
    if is_recording():
        whole = owned.n_owned == owned.n_slices
        return FromFront(beyond, at_once, whole, more)
    number = count_unsolved(front + beyond if beyond else front, owned, at_once=at_once)
    return more + number if more else number


def of_groups(what: GroupCount, own: BlockGroups, front: Array | int = -1) -> Any:
    """A number that depends on where groups begin in a block, as a count. Local."""
    if is_recording():
        return OfGroups(what, own.grouping.coarsening)
    first, n_owned = own.owned.first, own.owned.n_owned
    if what == "passed" and isinstance(front, Array):
        last, firsts = own.grouping.n_groups - 1, own.groups * own.grouping.coarsening
        return jnp.sum(jnp.asarray(own.groups < last) & (jnp.asarray(firsts) > front))
    return int(own.grouping.number_of(what, first, n_owned))


def usually(value: Array, usual: int) -> Any:
    """A count that depends on numbers; while a step is recorded, what it usually is. Local."""
    return usual if is_recording() else value


def note(name: str, tally: Tally | None = None, **others: int | float) -> None:
    """Count work of a phase, or record it, wherever it is traced. Local."""
    if not is_recording():
        if tally is not None:
            count(tally)
        return
    amounts = Tally() if tally is None else tally
    known: Any = (None if isinstance(amount, jax.Array) else amount for amount in amounts)
    record(Work(name, Tally(*known), tuple(others.items())))


@contextlib.contextmanager
def group_message(
    name: str, among: str, array: Array, what: GroupCount, own: BlockGroups
) -> Iterator[None]:
    """As `message`, of a message that a rank hands over or not by where groups begin. Local.

    While a step is recorded, every rank has to call this, also one that sends nothing.
    """
    number: Any = of_groups(what, own)
    words = -(-array.nbytes // WORD_BYTES)
    sent = number._replace(each=words) if is_recording() else number * words
    note(name, Tally(messages=number, words=sent))
    with scope(name), channel(among):
        yield


@contextlib.contextmanager
def message(name: str, among: str, *sent: Array) -> Iterator[None]:
    """Name phase and channel of a message traced in the body; count what it hands over. Local."""
    for array in sent:
        note(name, Tally(messages=1, words=-(-array.nbytes // WORD_BYTES)))
    with scope(name), channel(among):
        yield


def while_loop(
    keep_going: Callable[[Value], Array], body: Callable[[Value], Value], first: Value
) -> Value:
    """`jax.lax.while_loop` that counts what its body does each time. As collective as that is."""

    def counted(carry):
        value, counts = carry
        with counting() as ledger:
            value = body(value)
        return value, counts + ledger.tally.as_array()

    if is_recording():
        return record_loop(body, first)
    start = first, Tally().as_array()
    last, counts = jax.lax.while_loop(lambda carry: keep_going(carry[0]), counted, start)
    count(Tally(*counts))
    return last


def map_rows(function: Callable[[PyTree[Array]], Value], rows: PyTree[Array]) -> Value:
    """`jax.lax.map` that counts what the function does each time. As collective as that is."""
    if is_recording():
        n_rows = len(jax.tree.leaves(rows)[0])
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
        return record_map(function, row, n_rows)

    def counted(row: PyTree[Array]) -> tuple[Value, Array]:
        with counting() as ledger:
            value = function(row)
        return value, ledger.tally.as_array()

    values, counts = jax.lax.map(counted, rows)
    count(Tally(*jnp.sum(counts, axis=0)))
    return values


def cond(
    condition: Array,
    taken: Callable[[], Value],
    other: Callable[[], Value],
    *,
    usual: bool | None,
) -> Value:
    """`jax.lax.cond` that counts what the branch taken does. As collective as its branches are.

    While a step is recorded, `condition` is as `usual`; None if it says whether sweeps go on.
    """
    if is_recording():
        return record_branch(taken, other, usual)

    def counted(branch):
        def run():
            with counting() as ledger:
                value = branch()
            return value, ledger.tally.as_array()

        return run

    value, counts = jax.lax.cond(condition, counted(taken), counted(other))
    count(Tally(*counts))
    return value
