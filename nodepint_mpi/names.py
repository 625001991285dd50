"""What a name of a run, a dataset or a study may be: one component of a path."""

import re

NAME_RULE = "1 to 200 letters, digits, '.', '_' or '-', not dots alone"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


def is_name(text: str) -> bool:
    """Whether a text names one file or folder in a folder: no separators, no dots alone. Local."""
    return _NAME.fullmatch(text) is not None and text.strip(".") != ""
