"""Draw a block of lines that name files and what flows between them, as an SVG picture.

A line with `|` is a row of files, each with its role in parentheses; `.` leaves a place empty:

    config/experiment.py (config) | . | data/samples.py (samples)

All other lines are arrows, from row to row or along one: `a -> b: what flows`, or, for a call with
what it returns, `a <-> b: passed / returned`.
"""

import html
import re
from typing import NamedTuple

BOX_WIDTH, BOX_HEIGHT = 232, 48
GAP_X, GAP_Y = 104, 66
MARGIN = 6

_BOX = re.compile(r"(?P<file>[\w./]+) \((?P<role>[^)]*)\)")
_ARROW = re.compile(r"(?P<start>\S+) (?P<kind>->|<->) (?P<end>[^\s:]+): (?P<label>.+)")


class Box(NamedTuple):
    """A file, its role, and where it stands."""

    file: str
    role: str
    row: int
    column: int

    @property
    def left(self) -> float:
        """Its left edge in the picture."""
        return MARGIN + self.column * (BOX_WIDTH + GAP_X)

    @property
    def top(self) -> float:
        """Its upper edge in the picture."""
        return MARGIN + self.row * (BOX_HEIGHT + GAP_Y)


class Arrow(NamedTuple):
    """What flows from one file to another; with `both_ways`, something comes back."""

    start: str
    end: str
    label: str
    both_ways: bool


class Flow(NamedTuple):
    """Boxes by file, and the arrows between them."""

    boxes: dict[str, Box]
    arrows: list[Arrow]


def parse(text: str) -> Flow:
    """The flow that a block of lines describes.

    Raises:
        ValueError: for a line that is neither a row nor an arrow, and an arrow to an unknown file.
    """
    boxes: dict[str, Box] = {}
    arrows = []
    n_rows = 0
    for line in filter(None, map(str.strip, text.splitlines())):
        if "|" in line:
            for column, cell in enumerate(map(str.strip, line.split("|"))):
                if cell != ".":
                    box = _BOX.fullmatch(cell)
                    if box is None:
                        raise ValueError(f"expected `file.py (role)` or `.`, got {cell!r}")
                    boxes[box["file"]] = Box(box["file"], box["role"], n_rows, column)
            n_rows += 1
            continue
        arrow = _ARROW.fullmatch(line)
        if arrow is None:
            raise ValueError(f"expected a row or an arrow, got {line!r}")
        arrows.append(Arrow(arrow["start"], arrow["end"], arrow["label"], arrow["kind"] == "<->"))
    for arrow in arrows:
        for file in (arrow.start, arrow.end):
            if file not in boxes:
                raise ValueError(f"the arrow to {arrow.end} names {file}, which is in no row")
    return Flow(boxes, arrows)


def draw(flow: Flow) -> str:
    """The picture, in the colors of the page it stands on."""
    columns = 1 + max(box.column for box in flow.boxes.values())
    rows = 1 + max(box.row for box in flow.boxes.values())
    width = 2 * MARGIN + columns * BOX_WIDTH + (columns - 1) * GAP_X
    height = 2 * MARGIN + rows * BOX_HEIGHT + (rows - 1) * GAP_Y
    parts = [
        f'<svg class="flow" role="img" viewBox="0 0 {width} {height}" '
        'xmlns="http://www.w3.org/2000/svg">',
        '<defs><marker id="flow-head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L10 5L0 10z"/></marker></defs>',
    ]
    for box in flow.boxes.values():
        middle = box.left + BOX_WIDTH / 2
        parts += [
            f'<rect x="{box.left}" y="{box.top}" rx="4" '
            f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}"/>',
            f'<text class="file" x="{middle}" y="{box.top + 20}">{html.escape(box.file)}</text>',
            f'<text x="{middle}" y="{box.top + 38}">{html.escape(box.role)}</text>',
        ]
    for arrow in flow.arrows:
        parts += _draw_arrow(arrow, flow.boxes[arrow.start], flow.boxes[arrow.end])
    return "\n".join([*parts, "</svg>"])


def _draw_arrow(arrow: Arrow, start: Box, end: Box) -> list[str]:
    """A straight line between the edges that face each other, with its label."""
    if start.row == end.row:
        right = start.column < end.column
        x1 = start.left + (BOX_WIDTH if right else 0)
        x2 = end.left + (0 if right else BOX_WIDTH)
        y1 = y2 = start.top + BOX_HEIGHT / 2
    else:
        down = start.row < end.row
        lean = (end.column > start.column) - (end.column < start.column)
        x1 = start.left + BOX_WIDTH * (0.5 + 0.3 * lean)
        x2 = end.left + BOX_WIDTH * (0.5 - 0.3 * lean)
        y1 = start.top + (BOX_HEIGHT if down else 0)
        y2 = end.top + (0 if down else BOX_HEIGHT)
    tail = ' marker-start="url(#flow-head)"' if arrow.both_ways else ""
    words = arrow.label.split(" / ")
    lines = [
        f'<tspan x="{(x1 + x2) / 2}" dy="{15 if place else 0}">{html.escape(word)}</tspan>'
        for place, word in enumerate(words)
    ]
    y = (y1 + y2) / 2 + (-6 if start.row == end.row else 4) - 7.5 * (len(words) - 1)
    return [
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" marker-end="url(#flow-head)"{tail}/>',
        f'<text class="label" y="{y}">{"".join(lines)}</text>',
    ]
