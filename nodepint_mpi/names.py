"""Names: what one of a run, a dataset or a study may be, and what to say of an unknown one."""

import difflib
import re
from collections.abc import Iterable

NAME_RULE = "1 to 200 letters, digits, '.', '_' or '-', not dots alone"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


def is_name(text: str) -> bool:
    """Whether a text names one file or folder in a folder: no separators, no dots alone. Local."""
    return _NAME.fullmatch(text) is not None and text.strip(".") != ""


def hint(name: str, known: Iterable[str]) -> str:
    """What follows an unknown name in a message: known names that resemble it, or all. Local."""
    names = [str(one) for one in known]
    close = [repr(one) for one in difflib.get_close_matches(name, names, n=3)]
    if close:
        return f"; did you mean {' or '.join([*filter(None, [', '.join(close[:-1])]), close[-1]])}?"
    return f"; known names are {', '.join(map(repr, names))}." if names else "; there are none."
