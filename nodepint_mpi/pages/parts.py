"""What a section of a page is made of."""

import math
from typing import NamedTuple

from matplotlib.figure import Figure


class Table(NamedTuple):
    """Rows of text under a head. `wide` text in the cells may be broken into lines."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    caption: str = ""


class Picture(NamedTuple):
    """A figure, the name of its PNG file without suffix, and what is to be seen in it.

    A plot is lines on white, which is shown inverted where the reader prefers a dark page.
    """

    name: str
    figure: Figure
    caption: str
    is_plot: bool = True


class Lines(NamedTuple):
    """Text as it is, line by line."""

    lines: list[str]


class Section(NamedTuple):
    """A heading with tables, pictures and paragraphs (plain text) below it."""

    title: str
    parts: list[Table | Picture | Lines | str]


def number(value: object) -> str:
    """A number for people: six digits; text as it is, and nothing for None. Local."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float() if math.isfinite(value):
            return f"{value:.6g}"
    return str(value)
