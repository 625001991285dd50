"""A few profiled steps of a run, after those that compile. No failure here ends the run."""

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
from mpi4py import MPI

from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.profiling.trace import Profile, Program, attribute, read_program, read_spans

FIRST = 10
"""Steps of a start before the first that is profiled; from then on their number doubles."""
MOST = 0.01
"""Share of the time for training that profiles may take after the first."""

_log = logging.getLogger(__name__)


@runtime_checkable
class Counted(Protocol):
    """The result of a step, with what this rank did in it."""

    @property
    def tally(self) -> Tally:
        """Counts of this rank."""
        ...


Result = TypeVar("Result", bound=Counted)


class Sample(NamedTuple):
    """A profiled step: its number, how long it took meanwhile, what the profile holds and what the
    rank did."""

    step: int
    seconds: float
    profile: Profile
    tally: Tally


class Sampler:
    """Decides which steps are profiled, and keeps what was found."""

    def __init__(self, control: MPI.Intracomm):
        self.samples: list[Sample] = []
        self.cost_s = 0.0
        self.why = "too few steps"
        """Why there is no sample, if there is none."""
        self._control = control
        self._last_s = 0.0

    def is_due(self, n_taken: int, spent_s: float) -> bool:
        """Whether the next step is to be profiled, after so many that took so long.

        Collective over `control` at a few steps, and equal on all ranks.
        """
        n_doubled, rest = divmod(n_taken, FIRST)
        if rest or n_doubled & (n_doubled - 1) or not n_doubled:
            return False
        affordable = self.cost_s + self._last_s <= MOST * spent_s
        return n_doubled == 1 or self._control.bcast(affordable)

    def profiled(self, work: Callable[[], Result], step: int) -> Result:
        """Do the work of a step under JAX's profiler. As collective as the work is."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tracing = self._attempt(lambda: _start(folder))
            started = time.perf_counter()
            taken = work()
            seconds = time.perf_counter() - started
            if tracing:
                self._attempt(lambda: self._keep(Path(folder), step, seconds, taken.tally))
        self._last_s = time.perf_counter() - began - seconds
        self.cost_s += self._last_s
        return taken

    def forget(self, step: int) -> None:
        """Leave out what was found of a step that turns out to be unlike others. Local."""
        self.samples = [sample for sample in self.samples if sample.step != step]

    def _keep(self, folder: Path, step: int, seconds: float, tally: Tally) -> None:
        jax.profiler.stop_trace()
        (file,) = folder.rglob("*.xplane.pb")
        profile = attribute(read_spans(file, _live_programs()))
        if not profile.phases:
            raise ValueError("the profile holds no operation of the step")
        self.samples.append(Sample(step, seconds, profile, tally))

    def _attempt(self, action: Callable[[], Any]) -> bool:
        """Whether it was done; a failure is told once, and costs a run no more than its profile."""
        try:
            action()
        except Exception as error:  # of a tool's many kinds: none is worth a run
            self.why = f"{type(error).__name__}: {error}"
            _log.warning("no profile of this step: %s", self.why)
            return False
        return True


def _start(folder: str) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    options.enable_hlo_proto = False
    jax.profiler.start_trace(folder, profiler_options=options)


def _live_programs() -> dict[str, list[Program]]:
    """The steps' programs by the name of their module."""
    programs: dict[str, list[Program]] = {}
    for executable in jax.devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            if module.name.endswith("_step"):  # as `training.step` calls what it compiles
                programs.setdefault(module.name, []).append(read_program(module.to_string()))
    return programs
