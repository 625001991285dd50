"""In what two configs differ, in words."""

import tomllib
from typing import Any

_MOST_NAMED = 6


def describe_difference(stored: str | None, current: str | None) -> str:
    """The first few keys whose values differ, as the end of a sentence. Local.

    Args:
        stored: Config (TOML text) of the other experiment, if known.
        current: Config of this one, if known.

    Returns:
        Empty if a text is unknown or cannot be read, or if they do not differ.
    """
    try:
        there, here = _flatten(tomllib.loads(stored or "")), _flatten(tomllib.loads(current or ""))
    except tomllib.TOMLDecodeError:
        return ""
    if not there or not here:
        return ""
    differ = [
        f"{key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} here"
        for key in sorted(there | here)
        if there.get(key) != here.get(key)
    ]
    more = f"; and {len(differ) - _MOST_NAMED} more" if len(differ) > _MOST_NAMED else ""
    return f": {'; '.join(differ[:_MOST_NAMED])}{more}" if differ else ""


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = repr(value)
    return flat
