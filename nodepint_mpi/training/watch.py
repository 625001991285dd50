"""What the scores on the validation set decide: which checkpoint is the best, and when to stop."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.names import hint

PREFIX = "valid_"
"""Begins the names of scores on the validation set."""
LOSS = f"{PREFIX}loss"


class Watch(NamedTuple):
    """One score over the validations so far. Local; equal on all ranks.

    `best` is the best score, of step `best_step`. Patience goes by `reference`, the last score that
    was better than the one before by at least `run.min_delta`; `n_since` were not since then.
    `scores` are all those of the last validation.
    """

    metric: str
    mode: str
    best: float | None = None
    best_step: int | None = None
    reference: float | None = None
    n_since: int = 0
    scores: Mapping[str, float] = {}

    def note(self, step: int, scores: Mapping[str, float], min_delta: float) -> "Watch":
        """After the validation of one more step. NaN is never an improvement."""
        score = scores[self.metric]
        best, best_step = self.best, self.best_step
        if self._gain(score, best) > 0:
            best, best_step = score, step
        gain = self._gain(score, self.reference)
        improved = gain > 0 and gain >= min_delta
        return self._replace(
            best=best,
            best_step=best_step,
            reference=score if improved else self.reference,
            n_since=0 if improved else self.n_since + 1,
            scores=dict(scores),
        )

    def is_over(self, patience: int | None) -> bool:
        """Whether there have been enough validations without an improvement."""
        return patience is not None and self.n_since >= patience

    def describe(self) -> str:
        """Why a run stops that has come to the end of its patience."""
        best = (
            "no score was finite"
            if self.best is None
            else (f"the best is {self.best:.6g}, of step {self.best_step}")
        )
        return f"no improvement of {self.metric} in {self.n_since} validations; {best}"

    def as_meta(self) -> dict[str, Any]:
        """For the meta data of a checkpoint."""
        return self._asdict() | {"scores": dict(self.scores)}

    def _gain(self, score: float, before: float | None) -> float:
        """By how much a score is better than one before it; not a number if it is none."""
        if not math.isfinite(score) or before is None:
            return math.inf if math.isfinite(score) else math.nan
        return score - before if self.mode == "max" else before - score


def new_watch(config: Config) -> Watch | None:
    """Before the first validation; None if there is no validation set. Local."""
    if config.data is None or not config.data.is_validated:
        return None
    output = config.output
    metric = LOSS if output.best is None else output.best
    usual = "max" if metric == f"{PREFIX}accuracy" else "min"
    return Watch(metric, output.best_mode or usual)


def resumed_watch(config: Config, meta: Mapping[str, Any]) -> Watch | None:
    """As a checkpoint has it; a new one if the config now goes by another score. Local."""
    fresh, found = new_watch(config), meta.get("validation")
    if fresh is None or found is None:
        return fresh
    saved = Watch(**found)
    return saved if (saved.metric, saved.mode) == (fresh.metric, fresh.mode) else fresh


def require_watched(config: Config, metrics: Iterable[str]) -> None:
    """Check that the score that `output.best` names is computed. Local.

    Raises:
        ConfigError: with the names there are.
    """
    best, known = config.output.best, [LOSS, *(f"{PREFIX}{name}" for name in metrics)]
    if best is not None and best not in known:
        raise ConfigError(f"unknown score {best!r} in `output.best`{hint(best, known)}")
