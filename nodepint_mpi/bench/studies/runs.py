"""The runs of a study: what is to be run, and what of it is there already.

Importing this module loads neither MPI nor JAX.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nodepint_mpi.bench.studies.kept import KeptRun, State, make_digest
from nodepint_mpi.config.experiment import Config

Row = dict[str, Any]

TRAIN_SCORES = "train_scores.json"
"""In the run directory: what `nodepint evaluate --split train --json` writes."""
NOTHING_TO_DO = "finished", "left out"
"""States of runs that lack nothing."""


class Run(NamedTuple):
    """One training: a run directory, and a note beside it.

    `facts` begin its row. `n_cores` are those of each rank. One that is `left_out`, and says why,
    has no config. What is trained is `config_file`, or where there is none `config`, which is
    written beside the run. One that is `scored` is finished when its scores are there as well.
    """

    label: str
    folder: Path
    config: Config | None
    n_ranks: int
    n_cores: int
    facts: Row
    is_plain: bool = False
    chosen: bool = True
    left_out: str = ""
    config_file: str | None = None
    scored: bool = False

    @property
    def kept(self) -> KeptRun:
        """Its run directory and the note. Local."""
        assert self.config is not None  # one that is left out has none
        return KeptRun(self.folder, make_digest(self.config, self.n_ranks, self.n_cores))

    def state(self) -> State | Literal["left out"]:
        """What is there of it. Local.

        Raises:
            OutputError: if something else is in its place.
        """
        if self.left_out:
            return "left out"
        has_scores = not self.scored or (self.folder / TRAIN_SCORES).is_file()
        return self.kept.state(whole=has_scores)


class Series(NamedTuple):
    """What the runs of one study have in common.

    `results` is the file of their rows. `lock` keeps others from the same work: with a place for
    the number of ranks only from runs on as many; then rows are written by turns, by `rows_lock`.
    A run that was interrupted goes on from its last checkpoint if the study `resumes`, and is begun
    anew if not. `begins` and `changed` are what is said of a run that begins and of a stale one.
    The row of a finished run has what `numbers` reads, and from its note what is `noted`.
    """

    results: str
    lock: str
    rows_lock: str | None
    resumes: bool
    begins: str
    changed: str
    numbers: Callable[[Run], Row]
    noted: tuple[str, ...]
