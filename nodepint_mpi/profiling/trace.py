"""From one rank's profile of a step to the seconds of its phases. Local; pure but for one file.

XLA keeps the names of `core.scopes` with the operations of a program, and JAX's profiler tells when
each of them ran. At every moment one phase counts: what is computed; else a message under way; else
what the innermost loop or branch belongs to, which is then between two operations.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from nodepint_mpi.core.scopes import MESSAGES, channel_of, scope_of

OTHER = "other"
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
_CONTAINER = re.compile(r" (?:while|conditional|call)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Op(NamedTuple):
    """What an instruction is for. A container is a loop, a branch or a call: others run in it."""

    phase: str | None
    channel: str | None
    container: bool


Program = Mapping[str, Op]
"""The instructions of a compiled program by name."""


class Span(NamedTuple):
    """An instruction that ran, in seconds."""

    start: float
    end: float
    op: Op


class Call(NamedTuple):
    """A message: how long it took, and how much of that while nothing was computed."""

    phase: str
    channel: str
    seconds: float
    exposed_s: float


class Profile(NamedTuple):
    """Seconds by phase that add up to those in which the program ran, and messages in order."""

    phases: dict[str, float]
    calls: list[Call]


def read_program(text: str) -> Program:
    """The instructions of a program, from XLA's text of it."""
    ops = {}
    for line in text.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction:
            named = _OP_NAME.search(line)
            path, what = named[1] if named else "", line.partition("metadata=")[0]
            # XLA gives the name of a message to a copy of what has arrived, too.
            channel = channel_of(path) if " custom-call(" in what else None
            ops[instruction[1]] = Op(scope_of(path), channel, _CONTAINER.search(what) is not None)
    return ops


def read_spans(file: Path, programs: Mapping[str, Iterable[Program]]) -> list[Span]:
    """What ran of these programs, from a profile that JAX wrote.

    Args:
        file: The profile, `*.xplane.pb`.
        programs: By the name of the module; several where it was compiled several times, of which
            the one that fits is taken.
    """
    ran: dict[tuple[str, int], list[tuple[str, float, float]]] = {}  # by module and program
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name.startswith("end: "):
                    continue
                about = dict(event.stats)
                if "hlo_op" in about:
                    program = str(about.get("hlo_module")), int(about.get("program_id", 0))
                    times = event.start_ns * 1e-9, event.end_ns * 1e-9
                    ran.setdefault(program, []).append((str(about["hlo_op"]), *times))
    spans = []
    for (module, _), events in ran.items():
        names = {name for name, *_ in events}
        fits = max(programs.get(module, ()), key=lambda ops: _fit(ops, names), default=None)
        if fits is not None:
            spans += [Span(start, end, fits[name]) for name, start, end in events if name in fits]
    return spans


def _fit(ops: Program, names: set[str]) -> tuple[int, int]:
    """How well instructions that ran fit to a program: names it has, fewest that did not run."""
    return len(names & ops.keys()), -len(ops)


def attribute(spans: Iterable[Span]) -> Profile:
    """Divide the time in which anything ran among the phases."""
    spans = sorted(spans, key=lambda span: (span.start, -span.end))
    exposed: dict[int, float] = {}
    phases: dict[str, float] = {}
    lasting = [(i, span) for i, span in enumerate(spans) if span.end > span.start]
    turns = sorted(
        [(span.start, 1, i) for i, span in lasting] + [(span.end, 0, i) for i, span in lasting]
    )
    running: dict[int, Span] = {}  # in the order they began
    before = 0.0
    for now, begins, i in turns:
        if running and now > before:
            phase, j = _what_counts(running)
            phases[phase] = phases.get(phase, 0.0) + now - before
            exposed[j] = exposed.get(j, 0.0) + now - before
        if begins:
            running[i] = spans[i]
        else:
            running.pop(i, None)
        before = now
    calls = [
        Call(span.op.phase, span.op.channel, span.end - span.start, exposed.get(i, 0.0))
        for i, span in enumerate(spans)
        if span.op.phase in MESSAGES and span.op.channel is not None and not span.op.container
    ]
    return Profile(phases, calls)


def _what_counts(running: Mapping[int, Span]) -> tuple[str, int]:
    """The phase of a moment, and which span it is of."""
    best, where, around = -1, -1, None
    for i, (_, _, op) in running.items():
        if op.container:
            around = op.phase or around
            rank = 0
        else:
            rank = 1 if op.phase in MESSAGES else 2
        if rank >= best:
            best, where = rank, i
    op = running[where].op
    return op.phase or around or OTHER, where
