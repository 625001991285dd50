"""What each rank is doing, and the rules by which it counts as stuck. Local; pure but for a clock.

The main thread notes the phase it is in, at the cost of an attribute; the watchdog's thread reads
it. A phase is either *collective* (the rank may wait there for the others, so being late is not
its fault) or *local* (the others may be waiting for it). A rank that computes in a collective phase
waits for nobody, however long it takes: only the time since it last computed counts.
"""

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple

UNNAMED = "code outside any named phase"
WARM_UP = 2  # occurrences of a phase that may compile: the first, and once more for new layouts
SUSPICION = 4.0  # from this part of a limit on it is watched whether a rank computes
MARGIN = 20.0  # a collective phase may take this many times the longest one seen
COMPILING_FILES = ("compiler.py", "partial_eval.py", "mlir.py")  # of jax/_src
LOWERING = "_resolve_and_lower"  # of jax/_src/pjit.py, which also calls what is compiled


class Report(NamedTuple):
    """What a rank tells the others about itself.

    `limit_s` is how long it may stay in this phase, `quiet_s` how long it may be silent.
    """

    phase: str
    collective: bool
    step: int | None
    seconds: float
    limit_s: float
    quiet_s: float

    def describe(self) -> str:
        """In words, for a message."""
        where = self.phase if self.phase.startswith(UNNAMED) else f"'{self.phase}'"
        return where if self.step is None else f"{where} (step {self.step})"


class Finding(NamedTuple):
    """A rank that is stuck, and how one knows."""

    rank: int
    reason: str


class Phase:
    """The body of a `with` statement: one phase of the main thread. May be nested.

    Entering and leaving only write attributes: this is done many times a second.
    """

    __slots__ = ("began", "clock", "collective", "limit_s", "name", "outer", "start", "step")

    def __init__(
        self,
        clock: "PhaseClock",
        name: str,
        collective: bool = False,
        step: int | None = None,
        limit_s: float | None = None,
    ) -> None:
        self.clock = clock
        self.name = name
        self.collective = collective
        self.step = step
        self.limit_s = limit_s

    def __enter__(self) -> None:
        clock = self.clock
        self.outer = clock.now
        self.began = self.start = time.monotonic()
        clock.now = self
        if self.limit_s is not None:
            clock.announce()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        clock = self.clock
        end = time.monotonic()
        clock.spent[self.name] = clock.spent.get(self.name, 0.0) + end - self.began
        if self.collective and kind is None:
            clock.note(self.name, end - self.start)
        clock.last = self
        self.outer.start = end  # what surrounds it has moved on
        clock.now = self.outer
        if self.limit_s is not None:
            clock.announce()


class PhaseClock:
    """Keeps the phase of this rank and how long it may last."""

    def __init__(
        self,
        limit_s: float,
        first_limit_s: float,
        *,
        quiet_s: float,
        announce: Callable[[], None] = lambda: None,
        sees_work: bool = True,
    ) -> None:
        """Local; follows the thread that calls it.

        Args:
            limit_s: Limit of a local phase, and the least one of a collective phase.
            first_limit_s: Limit while JAX may be compiling.
            quiet_s: How long the rank may be silent.
            announce: Called at both ends of a phase that has its own limit.
            sees_work: Whether `note_work` is called while a rank computes. If not, a collective
                phase has `first_limit_s`: nobody knows whether it computes.
        """
        self.announce = announce
        self.spent: dict[str, float] = {}  # seconds by name; of a phase with those within it
        self.now = Phase(self, UNNAMED)
        self.last: Phase | None = None  # the one that ended last
        self.now.start = time.monotonic()
        self._limit_s = limit_s
        self._first_limit_s = first_limit_s
        self._quiet_s = quiet_s
        self._thread = threading.get_ident()
        self._compiling = self._working = 0.0
        self._sees_work = sees_work
        self._seen: dict[str, tuple[int, float]] = {}

    def note(self, name: str, seconds: float) -> None:
        """Remember how long a collective phase took, but for those that may have compiled."""
        count, longest = self._seen.get(name, (0, 0.0))
        if count < WARM_UP or seconds > longest:
            self._seen[name] = (count + 1, seconds if count >= WARM_UP else 0.0)

    def note_work(self) -> None:
        """Remember that this rank computes now: it does not wait. From any thread."""
        self._working = time.monotonic()

    def may_wait(self) -> bool:
        """Whether this rank has been in a collective phase so long that it may be stuck.

        From any thread. Long before its limit: `note_work` is then called where it computes.
        """
        now = self.now
        return now.collective and time.monotonic() - now.start > self._limit_s / SUSPICION

    def report(self) -> Report:
        """What this rank is doing now. From any thread.

        The seconds of a collective phase are those since this rank was last seen computing.
        """
        now, time_now = self.now, time.monotonic()
        start = max(now.start, self._compiling)
        limit_s = self._limit_s if now.limit_s is None else now.limit_s
        if now.collective:
            count, longest = self._seen.get(now.name, (0, 0.0))
            warm = (count >= WARM_UP or now.limit_s is not None) and self._sees_work
            start = max(start, self._working)
            least = self._limit_s if warm else self._first_limit_s
            limit_s = max(limit_s, least, MARGIN * longest)
        if self._is_compiling():
            self._compiling = time_now  # what runs once it is compiled starts from nought
            start, limit_s = now.start, max(limit_s, self._first_limit_s)
        quiet_s = max(self._quiet_s, now.limit_s or 0.0)
        last, name = self.last, now.name
        if name == UNNAMED and last is not None:
            name += f" after '{last.name}'" + ("" if last.step is None else f" (step {last.step})")
        return Report(name, now.collective, now.step, time_now - start, limit_s, quiet_s)

    def _is_compiling(self) -> bool:
        frame: FrameType | None = sys._current_frames().get(self._thread)
        # The thread moves on meanwhile: CPython 3.11.7 was seen to give a code object as `f_back`
        # of a frame that was being left. An error here would end the watchdog.
        while isinstance(frame, FrameType):
            file = frame.f_code.co_filename
            if "jax" in file and (
                file.endswith(COMPILING_FILES) or frame.f_code.co_name == LOWERING
            ):
                return True
            frame = frame.f_back
        return False


def find_stuck(reports: dict[int, Report], patience_s: float) -> Finding | None:
    """Which rank the others wait for in vain, if any. Local; a pure function.

    Args:
        reports: Of every rank that takes part.
        patience_s: How long all ranks may stay in local phases that nobody waits for.
    """
    local = {rank: report for rank, report in reports.items() if not report.collective}
    waiting = {rank: report for rank, report in reports.items() if report.collective}
    waited_s = max((report.seconds for report in waiting.values()), default=0.0)
    for rank, report in sorted(local.items(), key=lambda item: -item[1].seconds):
        if min(report.seconds, waited_s) > report.limit_s:
            waiter = max(waiting.values(), key=lambda other: other.seconds).describe()
            return Finding(
                rank,
                f"has been in {report.describe()} for {report.seconds:.0f} s while "
                f"{len(waiting)} rank(s) wait for it in {waiter}",
            )
    if reports and not local and all(r.seconds > r.limit_s for r in waiting.values()):
        rank, report = max(waiting.items(), key=lambda item: item[1].limit_s)
        where = " or ".join(sorted({other.describe() for other in waiting.values()}))
        return Finding(rank, f"no rank returned from {where} within {report.limit_s:.0f} s")
    if local and not waiting:
        rank, report = min(local.items(), key=lambda item: item[1].seconds - item[1].limit_s)
        if all(r.seconds > max(r.limit_s, patience_s) for r in local.values()):
            return Finding(rank, f"has been in {report.describe()} for {report.seconds:.0f} s")
    return None
