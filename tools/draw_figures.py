#!/usr/bin/env python3
"""Draw the figures of README and docs/ as SVG: what is cut, one training step, and the model.

    tools/draw_figures.py          writes docs/figures/*.svg

They need no library, are the same wherever they are drawn, and follow the reader's color scheme.
`tests/test_figures.py` compares them with the files that are committed.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"

STYLE = """
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-size:14px;fill:var(--ink)}
.small{font-size:12.5px;fill:var(--soft)} .bold{font-weight:600} .math{font-style:italic}
.card{fill:var(--card);stroke:var(--edge)} .box{fill:var(--box);stroke:var(--line)}
.line{fill:none;stroke:var(--line);stroke-width:1.6} .thin{fill:none;stroke:var(--edge)}
.dash{fill:none;stroke:var(--soft);stroke-width:1.4;stroke-dasharray:5 4}
.head{fill:var(--line)} .jump{stroke:var(--jump);stroke-width:3} .jumps{fill:var(--jump)}
.r0{--rank:var(--one)} .r1{--rank:var(--two)} .r2{--rank:var(--three)} .r3{--rank:var(--four)}
.band{fill:var(--rank);fill-opacity:.13} .bar{fill:var(--rank);fill-opacity:.75}
.cheap{fill:var(--rank)} .curve{fill:none;stroke:var(--rank);stroke-width:2.6}
.dot{fill:var(--card);stroke:var(--rank);stroke-width:2.2} .named{fill:var(--rank);font-weight:600}
.plain{fill:var(--soft);fill-opacity:.55}
svg{--card:#fff;--box:#f6f8fa;--ink:#1f2328;--soft:#59636e;--line:#6e7781;--edge:#d1d9e0;
--jump:#cf222e;--one:#0969da;--two:#1a7f37;--three:#9a6700;--four:#8250df}
@media(prefers-color-scheme:dark){svg{--card:#0d1117;--box:#161b22;--ink:#e6edf3;--soft:#9da7b1;
--line:#8b949e;--edge:#3d444d;--jump:#ff7b72;--one:#58a6ff;--two:#3fb950;--three:#d29922;
--four:#bc8cff}}
"""


class Picture:
    """Shapes on a card of a width and a height in pixels; `svg` is the file."""

    def __init__(self, width: int, height: int, title: str):
        self._shapes = [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto-start-reverse"><path class="head" d="M0 0L10 5L0 10z"/>'
            "</marker></defs>",
        ]
        self.rect("card", 0.5, 0.5, width - 1, height - 1, round_by=10)

    def rect(
        self, look: str, x: float, y: float, width: float, height: float, *, round_by: float = 0
    ) -> None:
        """A rectangle by its upper left corner."""
        self._shapes.append(
            f'<rect class="{look}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'rx="{round_by:g}"/>'
        )

    def text(self, x: float, y: float, words: str, *, look: str = "", anchor: str = "middle"):
        """A line of text on the base line y."""
        self._shapes.append(
            f'<text class="{look}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">'
            f"{html.escape(words)}</text>"
        )

    def path(
        self, look: str, points: Sequence[tuple[float, float]], *, arrow: bool = False
    ) -> None:
        """A line through points, with a head at its end if it is an arrow."""
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        head = ' marker-end="url(#head)"' if arrow else ""
        self._shapes.append(f'<path class="{look}" d="M{way}"{head}/>')

    def dot(self, look: str, x: float, y: float) -> None:
        """A small circle."""
        self._shapes.append(f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>')

    def box(
        self, x: float, y: float, width: float, lines: list[str], *, look: str = "box"
    ) -> float:
        """A box around lines of text, the first of them bold; its height."""
        height = 16 + 19 * len(lines)
        self.rect(look, x, y, width, height, round_by=6)
        for row, line in enumerate(lines):
            self.text(x + width / 2, y + 22 + 19 * row, line, look="small" if row else "bold")
        return height

    def svg(self) -> str:
        """The text of the file."""
        return "\n".join([*self._shapes, "</svg>\n"])


def draw_slices() -> str:
    """The horizon in slices on four ranks, and one training step on the clock."""
    picture = Picture(920, 560, "The time horizon in slices, shared by ranks, and a step on clocks")
    left, width, top, height = 92, 790, 62, 190
    slice_width, n_slices = width / 8, 8
    picture.text(24, 34, "The horizon is cut into slices; each rank owns some", look="bold",
                 anchor="start")  # fmt: skip
    for rank in range(4):
        x = left + 2 * rank * slice_width
        picture.rect(f"band r{rank}", x, top, 2 * slice_width, height)
        picture.text(x + slice_width, top + 20, f"rank {rank}", look=f"named r{rank}")
    for edge in range(n_slices + 1):
        x = left + edge * slice_width
        picture.path("thin", [(x, top), (x, top + height)])
        picture.text(x, top + height + 18, f"t{edge}", look="small math")

    def place(time: float, state: float) -> tuple[float, float]:
        return left + time / n_slices * width, top + 118 - 62 * state

    serial = _swing(1.0, 0.0, 0.0, 8.0)
    picture.path("dash", [place(*point) for point in serial])
    starts = _coarse_starts()
    ends = []
    for n, (state, speed) in enumerate(starts):
        curve = _swing(state, speed, float(n), n + 1.0)
        picture.path(f"curve r{n // 2}", [place(*point) for point in curve])
        ends.append(curve[-1][1])
    for n in range(1, n_slices):
        (x, y), (_, below) = place(n, starts[n][0]), place(n, ends[n - 1])
        picture.path("jump", [(x, y), (x, below)])
    for n, (state, _) in enumerate(starts):
        picture.dot(f"dot r{n // 2}", *place(n, state))
    picture.text(left - 12, top + 60, "state", look="small", anchor="end")
    below = top + height + 44
    picture.path("jump", [(left + 4, below - 5), (left + 28, below - 5)])
    picture.text(left + 36, below, "jumps, which the correction closes", look="small",
                 anchor="start")  # fmt: skip
    picture.path("dash", [(left + 300, below - 5), (left + 340, below - 5)])
    picture.text(left + 348, below, "serial solution, which all sweeps together approach",
                 look="small", anchor="start")  # fmt: skip
    _draw_clocks(picture, 330)
    return picture.svg()


def _draw_clocks(picture: Picture, top: float) -> None:
    """A training step of one serial solver and of four ranks with one sweep, to scale."""
    left, unit, row_height, cheap = 92, 49.0, 24, 0.1
    picture.text(24, top, "One training step on the clock: eight slices, one sweep each way",
                 look="bold", anchor="start")  # fmt: skip
    top += 16
    picture.text(left - 10, top + 17, "serial", look="small", anchor="end")
    for n in range(16):
        picture.rect("plain", left + n * unit, top, unit - 1.5, row_height - 4)
    picture.text(left + 4 * unit, top + 15, "forward, slice after slice", look="")
    picture.text(left + 12 * unit, top + 15, "backward", look="")
    top += 38
    sums = 2 + 8 * cheap
    for rank in range(4):
        y = top + rank * row_height
        picture.text(left - 10, y + 15, f"rank {rank}", look=f"named r{rank}", anchor="end")
        for start, order in ((0.0, rank), (sums, 3 - rank)):
            for n in range(2):
                picture.rect(f"bar r{rank}", left + (start + n) * unit, y, unit - 1.5,
                             row_height - 4)  # fmt: skip
            x = left + (start + 2 + 2 * order * cheap) * unit
            picture.rect(f"cheap r{rank}", x, y, 2 * cheap * unit - 1.5, row_height - 4)
        picture.rect("plain", left + 2 * sums * unit, y, 0.3 * unit, row_height - 4)
    bottom = top + 4 * row_height + 14
    x_first, x_second = left + unit, left + (sums + 1) * unit
    words = [
        (x_first, ["fine steps,", "all at once"]),
        (left + 2.4 * unit, ["coarse", "problem"]),
        (x_second + 0.06 * unit, ["pull-backs,", "all at once"]),
        (left + (sums + 2.4) * unit, ["coarse", "problem"]),
        (left + (2 * sums + 0.75) * unit, ["sum,", "update"]),
    ]
    for x, lines in words:
        for row, line in enumerate(lines):
            picture.text(x, bottom + 16 * row, line, look="small")
    picture.text(left + 7.4 * unit, top + 34, "A fine step of all slices is divided by the ranks.",
                 look="small", anchor="start")  # fmt: skip
    picture.text(left + 7.4 * unit, top + 54, "The coarse problem runs in order, so it must be",
                 look="small", anchor="start")  # fmt: skip
    picture.text(left + 7.4 * unit, top + 74, "cheap (drawn: a tenth of the fine one).",
                 look="small", anchor="start")  # fmt: skip
    picture.text(24, bottom + 46, "Drawn to scale for these assumptions, not measured: numbers are "
                 "in docs/benchmarks.md.", look="small", anchor="start")  # fmt: skip


def _swing(state: float, speed: float, begin: float, end: float) -> list[tuple[float, float]]:
    """Times and states of a damped pendulum, in small steps of the midpoint rule."""
    n_steps = max(1, round((end - begin) * 24))
    step, points = (end - begin) / n_steps, [(begin, state)]
    for n in range(n_steps):
        state, speed = _midpoint(state, speed, step)
        points.append((begin + (n + 1) * step, state))
    return points


def _coarse_starts() -> list[tuple[float, float]]:
    """The state and speed at the start of each slice, by one step of the coarse propagator."""
    starts = [(1.0, 0.0)]
    for _ in range(7):
        starts.append(_midpoint(*starts[-1], 1.0))
    return starts


def _midpoint(state: float, speed: float, step: float) -> tuple[float, float]:
    pull = -1.15 * math.sin(state) - 0.12 * speed
    middle, faster = state + step / 2 * speed, speed + step / 2 * pull
    pull = -1.15 * math.sin(middle) - 0.12 * faster
    return state + step * faster, speed + step * pull


def draw_training_step() -> str:
    """What happens in one step of training, in order."""
    picture = Picture(920, 316, "One training step: forward sweep, loss, adjoint sweep, update")
    picture.text(20, 34, "One training step", look="bold", anchor="start")
    width, gap, tall, top, low = 196, 32, 92, 56, 200
    rows = {
        top: (
            "box: Batch / samples of this step; / warm start: states and / defects of the last",
            "band r0: Forward / fine propagator on all / slices of all ranks / at once",
            "band r2: Correction / coarse problem: states / at slice boundaries, / left to right",
            "box: Loss / each rank reads the / observations that fall / into its slices",
        ),
        low: (
            "box: Sum and update / gradients summed over / ranks, optax; at times / a checkpoint",
            "box: Accurate enough? / gradient error, from / jumps and residuals, / against a bound",
            "band r2: Correction / coarse problem, / transposed: cotangents, / right to left",
            "band r0: Adjoint / pull-back of all / slices of all ranks / at once",
        ),
    }
    for y, boxes in rows.items():
        for column, described in enumerate(boxes):
            look, _, words = described.partition(": ")
            picture.box(20 + column * (width + gap), y, width, words.split(" / "), look=look)
    for column in range(3):
        left = 20 + width + column * (width + gap)
        picture.path("line", [(left, top + tall / 2), (left + gap, top + tall / 2)], arrow=True)
        picture.path("line", [(left + gap, low + tall / 2), (left, low + tall / 2)], arrow=True)
    for column, words in ((0, "next step"), (1, "no: sweep again"), (3, "")):
        x = 20 + width / 2 + column * (width + gap)
        ends = [(x, low), (x, top + tall)]
        picture.path("line", ends[::-1] if column == 3 else ends, arrow=True)
        picture.text(x + 8, (top + tall + low) / 2 + 5, words, look="small", anchor="start")
    picture.text(20 + width + gap / 2, low + tall / 2 - 8, "yes", look="small")
    return picture.svg()


def draw_model() -> str:
    """Encode, process, decode: what a model is made of, and where each part runs."""
    picture = Picture(920, 300, "Encode, process, decode: the parts of a model and where they run")
    picture.text(24, 34, "Encode, process, decode", look="bold", anchor="start")
    top, tall = 92, 92
    picture.text(52, top + 42, "x", look="math bold")
    picture.text(52, top + 62, "input", look="small")
    picture.box(100, top + 10, 158, ["Encoder", "u(0) = E(x)", "a network, or identity"])
    left, width = 300, 340
    picture.rect("box", left, top - 18, width, tall + 46, round_by=6)
    picture.text(left + width / 2, top + 4, "Processor:  du/dt = f(t, u; θ)", look="bold")
    for rank in range(4):
        x = left + 14 + 78 * rank
        picture.rect(f"band r{rank}", x, top + 20, 76, 46)
        picture.path("thin", [(x + 38, top + 20), (x + 38, top + 66)])
        picture.text(x + 38, top + 84, f"rank {rank}", look=f"named r{rank}")
        if rank:
            picture.path("line", [(x - 14, top + 43), (x + 12, top + 43)], arrow=True)
    picture.text(left + width / 2, top + 108, "time: slices on ranks, solved at once", look="small")
    picture.box(682, top + 10, 158, ["Decoder", "y = D(u(t))", "at observation times"])
    picture.text(872, top + 42, "y", look="math bold")
    picture.text(872, top + 62, "output", look="small")
    middle = top + 46
    for begin, end in ((68, 100), (258, 300), (640, 682), (840, 862)):
        picture.path("line", [(begin, middle), (end, middle)], arrow=True)
    picture.text(279, middle - 9, "u(0)", look="small math")
    picture.text(661, middle - 9, "u(t)", look="small math")
    low = top + tall + 62
    picture.path("dash", [(872, top + 74), (872, low), (179, low), (179, top + 86)], arrow=True)
    picture.text(470, low + 22, "gradients of the loss: the same way back, by the adjoint sweep",
                 look="small")  # fmt: skip
    return picture.svg()


FIGURES = {
    "slices.svg": draw_slices,
    "training-step.svg": draw_training_step,
    "encode-process-decode.svg": draw_model,
}
"""Names of files and what draws them."""


def main() -> None:
    """Write all figures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
