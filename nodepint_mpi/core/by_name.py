"""Functions of the user's that are given what they ask for, by the names of their parameters."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nodepint_mpi.errors import ProblemError
from nodepint_mpi.names import hint


def asked_for(function: Callable, n_positional: int, offered: tuple[str, ...]) -> tuple[str, ...]:
    """Which of the names offered a function takes besides its first arguments. Local.

    Args:
        function: Any callable; one without a signature asks for nothing.
        n_positional: How many arguments it is given in order.
        offered: What can be given by name.

    Raises:
        ProblemError: if it needs anything else.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled functions
        return ()
    kinds = inspect.Parameter
    in_order = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    taken = [p for p in parameters if p.kind in in_order][:n_positional]
    rest = [p for p in parameters if p not in taken]
    for parameter in rest:
        needed = parameter.default is kinds.empty and parameter.kind in (
            kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY,
        )  # fmt: skip
        if needed and parameter.name not in offered:
            name = getattr(function, "__name__", type(function).__name__)
            raise ProblemError(
                f"{name} takes `{parameter.name}`, which nobody gives it"
                f"{hint(parameter.name, offered)}"
            )
    return tuple(p.name for p in rest if p.name in offered and p.kind is not kinds.POSITIONAL_ONLY)


def call(function: Callable, *arguments: Any, offered: Mapping[str, Any]) -> Any:
    """Call a function with arguments in order and with what it asks for. As local as it is."""
    names = asked_for(function, len(arguments), tuple(offered))
    return function(*arguments, **{name: offered[name] for name in names})
