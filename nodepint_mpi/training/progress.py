"""What rank 0 shows while training: a bar on a terminal, plain lines in a batch log."""

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nodepint_mpi.profiling.timers import CompileClock
from nodepint_mpi.ranks.terminal import terminal_width
from nodepint_mpi.training.step import StepReport

_log = logging.getLogger(__name__)
_BAR = "{desc}{percentage:3.0f} % |{bar:16}| {n_fmt} of {total_fmt}{postfix}"
_NOTICED_S = 0.5
"""Compiling for less than this is not worth a line."""


class Progress:
    """Reports of a run; silent on ranks where it is not `shown`. Local.

    Args:
        start: Optimizer steps that are done.
        n_steps: Of the whole run.
        compiling: Its seconds count for no step: the time that is left is that of steps alone.
        shown: Whether this rank speaks.
    """

    def __init__(self, start: int, n_steps: int, compiling: CompileClock, *, shown: bool):
        self._first, self._n_steps = start, n_steps
        self._shown, self._compiling = shown, compiling
        self._began, self._compiled = time.monotonic(), compiling.seconds
        self._numbers = ""
        self._bar: tqdm | None = None
        self._redirect = logging_redirect_tqdm([logging.getLogger("nodepint_mpi")])
        width = terminal_width(sys.stderr) if shown else None
        if width is not None:
            self._bar = tqdm(
                total=n_steps, initial=start, file=sys.stderr, ncols=width - 1, bar_format=_BAR,
                desc="compiling ", leave=False,
            )  # fmt: skip

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._redirect.__enter__()
        elif self._shown and self._first < self._n_steps:
            _log.info("compiling the training step ...")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._redirect.__exit__(kind, error, trace)
            self._bar.close()

    def advance(self, step: int) -> None:
        """Take note that `step` steps are done."""
        if not self._shown:
            return
        if step == self._first + 1:
            compiled_s = self._compiling.seconds - self._compiled
            if compiled_s > _NOTICED_S:
                _log.info("compiled in %.1f s, which is not in the times of steps", compiled_s)
        if self._bar is not None:
            self._bar.set_description_str("", refresh=False)
            self._bar.set_postfix_str(f"{self._left_s(step):.0f} s left{self._numbers}", False)
            self._bar.update(step - self._bar.n)

    def report(
        self, step: int, report: StepReport, step_s: float, scores: Mapping[str, float]
    ) -> None:
        """Show the numbers of one step, `step` of them are done, and scores if it was validated."""
        if not self._shown:
            return
        numbers = (
            f"loss {report.loss:.6g}, sweeps {report.sweeps} + {report.adjoint_sweeps}, "
            f"jump {report.jump:.1e}, {step_s * 1e3:.1f} ms/step"
        )
        for name, value in scores.items():
            numbers += f", {name.replace('_', ' ')} {value:.6g}"
        if self._bar is not None:
            self._numbers = f", {numbers}"
        else:
            left_s = self._left_s(step)
            _log.info("step %d of %d: %s, %.0f s left", step, self._n_steps, numbers, left_s)

    def _left_s(self, step: int) -> float:
        """Seconds until the last step, if all take as long as those since the start."""
        compiled_s = self._compiling.seconds - self._compiled
        spent_s = max(time.monotonic() - self._began - compiled_s, 0.0)
        return spent_s / max(step - self._first, 1) * (self._n_steps - step)
