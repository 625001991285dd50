"""What rank 0 shows while training: a bar on a terminal, plain lines in a batch log."""

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nodepint_mpi.training.step import StepReport

_log = logging.getLogger(__name__)


class Progress:
    """Reports of a run; silent on ranks where it is not `shown`. Local."""

    def __init__(self, start: int, n_steps: int, *, shown: bool):
        self._n_steps = n_steps
        self._shown = shown
        self._begin = (time.monotonic(), start)
        self._bar: tqdm | None = None
        self._redirect = logging_redirect_tqdm()
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=n_steps, initial=start, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._redirect.__enter__()
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
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(numbers)
        else:
            began, first = self._begin
            left_s = (time.monotonic() - began) / (step - first) * (self._n_steps - step)
            _log.info("step %d of %d: %s, %.0f s left", step, self._n_steps, numbers, left_s)
