"""Names of the phases of a step, which XLA keeps with every operation that it makes of them.

Whoever reads a profile finds by them what an operation was for: see `profiling`.
"""

import contextlib
import re

import jax

FINE_FORWARD = "fine_forward"
FINE_ADJOINT = "fine_adjoint"
TANGENTS = "tangents"
COARSE = "coarse"
SEND = "send"
RECEIVE = "receive"
REDUCE = "reduce"
ENCODER = "encoder"
LOSS = "loss"
SNAPSHOTS = "snapshots"
FACTOR = "factor"
UPDATE = "update"
SWEEP = "sweep"

SCOPES = (
    FINE_FORWARD, FINE_ADJOINT, TANGENTS, COARSE, SEND, RECEIVE, REDUCE, ENCODER, LOSS, SNAPSHOTS,
    FACTOR, UPDATE, SWEEP,
)  # fmt: skip
"""A send may receive at the same time; a reduction is any message of more than two ranks. The loss
is with the decoder. A shared basis is found from snapshots, which each rank has of its own slices,
and by small factorizations, which all ranks do alike. The update is the optimizer's. The rest of a
sweep are jumps, corrections, guards and copies of the slices: what no other phase claims."""
MESSAGES = (SEND, RECEIVE, REDUCE)

RIGHTWARDS, LEFTWARDS, LINE, GRID = "rightwards", "leftwards", "line", "grid"
CELL = "cell"
CHANNELS = (RIGHTWARDS, LEFTWARDS, LINE, GRID, CELL)
"""Who takes part in a message: a rank and its neighbor, those of a line, those of all lines, those
that share the tangents of the same slices.

Besides, `every(n)`: of a line, a rank and those n, 2 n, ... further on.
"""
_EVERY = "every_"

_SCOPE = re.compile(rf"phase\.({'|'.join(SCOPES)})\b")
_CHANNEL = re.compile(rf"channel\.({'|'.join(CHANNELS)}|{_EVERY}\d+)\b")


def every(distance: int) -> str:
    """The channel of ranks so far apart. Local."""
    return f"{_EVERY}{distance}"


def distance_of(channel: str) -> int | None:
    """How far apart the ranks of a channel made by `every` are; None for the others. Local."""
    return int(channel.removeprefix(_EVERY)) if channel.startswith(_EVERY) else None


def scope(name: str) -> contextlib.AbstractContextManager[object]:
    """Operations traced in the body of a `with` statement belong to this phase. Local."""
    return jax.named_scope(f"phase.{name}")


def channel(name: str) -> contextlib.AbstractContextManager[object]:
    """The message traced in the body of a `with` statement is one of this channel. Local."""
    return jax.named_scope(f"channel.{name}")


def scope_of(op_name: str) -> str | None:
    """The phase of an operation by its name in XLA's metadata; None if it has none. Local.

    The outermost counts: a pull-back holds the names of what it transposes. But a message is one
    whatever it is part of, and a sweep has only what is of no phase in it.
    """
    found = _SCOPE.findall(op_name)
    inside = [name for name in found if name != SWEEP]
    return next((name for name in found if name in MESSAGES), next(iter(inside or found), None))


def channel_of(op_name: str) -> str | None:
    """The channel of a message by its name in XLA's metadata; None if it is none. Local."""
    found = _CHANNEL.search(op_name)
    return None if found is None else found[1]
