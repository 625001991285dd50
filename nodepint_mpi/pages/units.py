"""Quantities as people read them: names without underscores, numbers with units. Local."""

from typing import Any

from nodepint_mpi.pages.parts import number

_LABELS = {
    "peak_bytes": "peak memory, each rank",
    "step_s": "time of a step, median",
    "training_s": "time in steps",
    "saving_s": "time for checkpoints",
    "n_parameters": "parameters",
}
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def show_quantity(name: str, value: Any) -> tuple[str, str]:
    """The label and the text of a quantity whose name ends in its unit, as our files have them."""
    label = _LABELS.get(name)
    if name.endswith("_bytes"):
        values = value if isinstance(value, list) else [value]
        return label or _spaced(name[:-6]), ", ".join(map(show_bytes, values))
    if name.endswith("_s") and isinstance(value, int | float):
        return label or _spaced(name[:-2]), show_seconds(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return label or _spaced(name), f"{value:,}"
    return label or _spaced(name), number(value)


def show_bytes(n_bytes: int | float) -> str:
    """Three digits and a decimal unit, such as "751 MB"."""
    for size, unit in _SIZES:
        if n_bytes >= size:
            return f"{_three(n_bytes / size)} {unit}"
    return f"{n_bytes:g} bytes"


def show_seconds(seconds: int | float) -> str:
    """Such as "43.1 ms", "51.8 s", "12 min 5 s" or "3 h 20 min"."""
    if 0 < seconds < 1:
        return f"{_three(1e3 * seconds)} ms"
    if not seconds >= 60:
        return f"{_three(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _three(value: int | float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _spaced(name: str) -> str:
    return name.replace("_", " ")
