"""Names of the phases of a step, which XLA keeps with every operation that it makes of them.

Whoever reads a profile finds by them what an operation was for: see `run.timing`.
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

SCOPES = (FINE_FORWARD, FINE_ADJOINT, TANGENTS, COARSE, SEND, RECEIVE, REDUCE)
"""A send may receive at the same time; a reduction is any message of more than two ranks."""

_SCOPE = re.compile(rf"phase\.({'|'.join(SCOPES)})\b")


def scope(name: str) -> contextlib.AbstractContextManager[object]:
    """Operations traced in the body of a `with` statement belong to this phase. Local."""
    return jax.named_scope(f"phase.{name}")


def scope_of(op_name: str) -> str | None:
    """The phase of an operation by its name in XLA's metadata; None if it has none. Local.

    The outermost counts: a pull-back holds the names of what it transposes.
    """
    found = _SCOPE.search(op_name)
    return None if found is None else found[1]
