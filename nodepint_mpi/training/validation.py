"""Validation while training: scores, the best checkpoint, and the end of a run's patience."""

import logging
from pathlib import Path
from typing import Any

from nodepint_mpi.io.checkpoint_folder import checkpoint_path, keep_steps
from nodepint_mpi.io.directory import BEST
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.training.error_control import Stepper
from nodepint_mpi.training.evaluate import Scorer, TrainedRun, load_trained, make_scorer
from nodepint_mpi.training.saving import save_run
from nodepint_mpi.training.setup import Experiment, evaluated_params
from nodepint_mpi.training.train_state import TrainState
from nodepint_mpi.training.watch import PREFIX, Watch

_log = logging.getLogger(__name__)


class Validation:
    """The validations of a run. Made and used by all ranks together.

    `watch` is what they have come to, None if there is no validation set. The best checkpoint that
    the newest of the others knows of stays until a newer one is saved: a run that is resumed from
    there finds it.
    """

    def __init__(self, folder: Path, watch: Watch | None):
        self.watch, self._folder = watch, folder / BEST
        self._known = None if watch is None else watch.best_step
        self._scorer: tuple[Experiment, Scorer] | None = None

    def begin(self, experiment: Experiment, step: int) -> None:
        """Remove best checkpoints of later steps, which a resumed run takes again. Collective."""
        watch = self.watch
        if watch is None or experiment.config.output.best is None:
            return
        with together(experiment.comms.control):
            if experiment.comms.control.rank > 0:
                return
            best = watch.best_step
            keep_steps(self._folder, [] if best is None else [best])
            if best is not None and not checkpoint_path(self._folder, best).is_file():
                _log.warning(
                    "%s, the best checkpoint before step %d, is gone",
                    checkpoint_path(self._folder, best), step,
                )  # fmt: skip

    def is_due(self, experiment: Experiment, step: int) -> bool:
        """Whether to validate after so many steps. Local."""
        run, output = experiment.config.run, experiment.config.output
        every = run.validate_every or output.log_every
        return self.watch is not None and (step % every == 0 or step == experiment.n_steps)

    def is_over(self, experiment: Experiment) -> bool:
        """Whether the run has come to the end of its patience. Local; equal on all ranks."""
        return self.watch is not None and self.watch.is_over(experiment.config.run.patience)

    def score(self, experiment: Experiment, state: TrainState, step: int) -> dict[str, float]:
        """Scores by their names in the records, taken note of. Collective over the grid."""
        assert self.watch is not None  # else no validation is due
        if self._scorer is None or self._scorer[0] is not experiment:  # the network has grown
            self._scorer = experiment, make_scorer(experiment.comms, experiment, "valid")
        scores = self._scorer[1](evaluated_params(experiment, state))
        # What is decided by them must be decided alike.
        scores = experiment.comms.control.bcast(scores)
        scores = {f"{PREFIX}{name}": value for name, value in scores.items()}
        self.watch = self.watch.note(step, scores, experiment.config.run.min_delta)
        return scores

    def describe(self) -> str:
        """Why a run is over. Local."""
        return "" if self.watch is None else self.watch.describe()

    def numbers(self, experiment: Experiment) -> dict[str, Any]:
        """Last scores, and the best one where it is kept, for the result of a run. Local."""
        watch = self.watch
        if watch is None:
            return {}
        best = {f"best_{watch.metric}": watch.best, "best_step": watch.best_step}
        return dict(watch.scores) | ({} if experiment.config.output.best is None else best)

    def is_best(self, experiment: Experiment, step: int) -> bool:
        """Whether the parameters of this step are the best so far, and to be kept. Local."""
        best = None if self.watch is None else self.watch.best_step
        return experiment.config.output.best is not None and best == step

    def save_best(
        self, experiment: Experiment, state: TrainState, stepper: Stepper, step: int
    ) -> None:
        """Keep what is the best so far. Collective over the grid. Raises OutputError."""
        save_run(experiment, self._folder.parent, state, stepper, step, watch=self.watch, best=True)
        self._keep(experiment, step, self._known)

    def note_saved(self, experiment: Experiment) -> None:
        """A checkpoint that knows of the best one has been saved. Local; rank 0 removes others."""
        if self.watch is not None and experiment.config.output.best is not None:
            self._known = self.watch.best_step
            self._keep(experiment, self._known)

    def load_best(self, experiment: Experiment) -> TrainedRun | None:
        """The best parameters there are; None if none are kept. Collective over the grid."""
        control = experiment.comms.control
        best = None if self.watch is None else self.watch.best_step
        if best is None or experiment.config.output.best is None:
            return None
        path = checkpoint_path(self._folder, best)
        if not control.bcast(path.is_file() if control.rank == 0 else None):
            return None
        return load_trained(experiment, path)

    def _keep(self, experiment: Experiment, *steps: int | None) -> None:
        if experiment.comms.control.rank == 0:
            keep_steps(self._folder, [step for step in steps if step is not None])
