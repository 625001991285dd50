"""What a rank does with its time in the training loop, which takes its steps through here."""

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import jax

from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.profiling.sampling import Result, Sampler
from nodepint_mpi.ranks.machine import started_at

COMPILING = "/jax/core/compile/"


class Seconds(NamedTuple):
    """How long every optimizer step and every checkpoint took on this rank."""

    steps: list[float]
    saving: list[float]

    def share(self) -> float:
        """Time for saving in times for training. Local."""
        return sum(self.saving) / max(sum(self.steps), 1e-9)


class CompileClock:
    """Seconds in which JAX traced, lowered or compiled, while the `with` statement lasts. Local."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        """So far."""
        return math.fsum(end - start for start, end in self._spans)

    def hear(self, event: str, duration_secs: float, **about: str | int) -> None:
        """Take note of an event of JAX's that has just ended; what lies within it counts once."""
        del about
        if event.startswith(COMPILING):
            end = time.perf_counter()
            while self._spans and self._spans[-1][0] >= end - duration_secs:
                self._spans.pop()
            self._spans.append((end - duration_secs, end))

    def __enter__(self) -> "CompileClock":
        jax.monitoring.register_event_duration_secs_listener(self.hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self.hear)


class Timers:
    """Seconds, counts and profiles of the steps of a start.

    `seconds` has all steps, `warm_s` those that compiled nothing and were not profiled;
    `first_step_s` is how long after the start of this process the first step was done.
    """

    def __init__(self, comms: Comms, compiling: CompileClock):
        self.compiling = compiling
        self.seconds = Seconds([], [])
        self.warm_s: list[float] = []
        self.first_step_s: float | None = None
        self.tally = Tally()
        self.sampler = Sampler(comms.control)

    def take(self, work: Callable[[], Result], step: int) -> Result:
        """Take optimizer step `step`, which is `work`, and its time. Collective over the grid."""
        due = self.sampler.is_due(len(self.seconds.steps), sum(self.seconds.steps, 0.0))
        began, compiled = time.perf_counter(), self.compiling.seconds
        taken = self.sampler.profiled(work, step) if due else work()
        self.seconds.steps.append(time.perf_counter() - began)
        if self.first_step_s is None:
            self.first_step_s = time.time() - started_at()
        if self.compiling.seconds > compiled:
            self.sampler.forget(step)
        elif not due:
            self.warm_s.append(self.seconds.steps[-1])
        self.tally = self.tally.plus(taken.tally)
        return taken
