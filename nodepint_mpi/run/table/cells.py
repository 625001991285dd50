"""The cells of the table: what is to be trained, and what of it is there already.

A cell is a run directory, OUT/NAME/METHOD, and a note beside it, METHOD.json, with what the run
itself does not know. Importing this module loads neither MPI nor JAX.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nodepint_mpi.config import Config, read_config
from nodepint_mpi.config_table import TableList, TableProblem
from nodepint_mpi.core.partition import check_layout
from nodepint_mpi.errors import ConfigError, LayoutError, OutputError
from nodepint_mpi.io.sources import find_folder
from nodepint_mpi.run.directory import CHECKPOINTS, DONE, write_text
from nodepint_mpi.run.plain_config import plain_config

TRAIN_SCORES = "train_scores.json"
"""In the run directory: what `nodepint evaluate --split train --json` writes."""

State = Literal["finished", "failed", "begun", "stale", "missing", "left out"]
"""What is there of a cell. One that failed, was begun or is missing is still to be done."""


class Cell(NamedTuple):
    """One training: of a problem, by one method.

    `n_cores` are those of each rank. One that is `left_out`, and says why, has no config. `differs`
    says what plain training cannot do as the config asks.
    """

    problem: TableProblem
    method: str
    n_ranks: int
    n_cores: int
    config: Config | None
    folder: Path
    chosen: bool
    left_out: str = ""
    differs: str = ""

    @property
    def label(self) -> str:
        """What it is called on the command line."""
        return f"{self.problem.name}, {self.method}"

    @property
    def is_plain(self) -> bool:
        """Whether it is trained by plain diffrax and optax."""
        return self.method == "serial"

    def digest(self) -> str:
        """Names all that its numbers depend on, but for the code and the machine. Local."""
        config = self.config
        assert config is not None  # a cell that is left out has no numbers
        run, metrics = config.run, None if config.loss is None else config.loss.metrics
        parts = [config.fingerprint(), run.n_steps, run.data_ranks, metrics]
        where = [self.n_ranks, self.n_cores]
        return hashlib.sha256(json.dumps([*parts, *where]).encode()).hexdigest()[:16]

    def note(self) -> dict[str, Any] | None:
        """What was noted when it was last begun; None if there is no note that can be read."""
        try:
            found = json.loads(self._note_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_note(self, note: dict[str, Any]) -> None:
        """Replace its note. Local.

        Raises:
            OutputError: if it cannot be written.
        """
        try:
            self._note_file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot write {self._note_file}: {error.strerror}.") from error
        write_text(self._note_file, json.dumps(note, indent=1) + "\n")

    @property
    def _note_file(self) -> Path:
        return self.folder.with_name(f"{self.method}.json")

    def is_trained(self) -> bool:
        """Whether the training is done. Local."""
        return (self.folder / DONE).is_file()

    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from. Local."""
        return any((self.folder / CHECKPOINTS).glob("step-*.h5"))

    def state(self) -> State:
        """What is there of it. Local.

        Raises:
            OutputError: if something else is in its place.
        """
        if self.left_out:
            return "left out"
        note = self.note()
        if note is None:
            if self.folder.exists():
                raise OutputError(
                    f"{self.folder} is in the way: it has no note of this table beside it. Remove "
                    "it, or choose another folder with `--out`."
                )
            return "missing"
        if note.get("digest") != self.digest():
            return "stale"
        scored = not self.problem.scored or (self.folder / TRAIN_SCORES).is_file()
        if self.is_trained() and scored:
            return "finished"
        return "failed" if note.get("reason") else "begun"


def plan_cells(
    table: TableList, out: Path, *, only: Sequence[str] = (), ranks: Sequence[int] = ()
) -> list[Cell]:
    """All cells in the order of rows; those to be done are `chosen`. Local; writes nothing.

    Args:
        table: The list.
        out: Where the cells are.
        only: Names of the problems to do; all if there are none.
        ranks: Numbers of ranks for these instead of those of the list.

    Raises:
        NodepintError: for names that nobody knows, configs and numbers of ranks that cannot be,
            and data that are not prepared.
    """
    names = [problem.name for problem in table.problem]
    for name in only:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}."
            raise ConfigError(f"`--only {name}`: there is no such problem in the list; {hint}")
    cells = []
    for problem in table.problem:
        chosen = not only or problem.name in only
        if chosen and ranks:
            problem = problem.model_copy(update={"ranks": list(ranks)})
        cells += _cells_of(problem, out, chosen)
    return cells


def _cells_of(problem: TableProblem, out: Path, chosen: bool) -> list[Cell]:
    config, most = read_config(problem.config), max(problem.ranks)
    if chosen:
        _check(config, problem, most)
    cells = []
    if problem.serial:
        place = out / problem.name / "serial"
        differs = "" if config.time.relaxation is None else "without relaxation"
        try:
            plain, why = plain_config(config), ""
        except ConfigError as error:
            plain, why, differs = None, str(error), ""
        cells.append(Cell(problem, "serial", 1, most, plain, place, chosen, why, differs))
    for n in problem.ranks:
        method = f"ranks-{n}"
        place = out / problem.name / method
        cells.append(Cell(problem, method, n, 1, config, place, chosen))
    return cells


def _check(config: Config, problem: TableProblem, n_ranks: int) -> None:
    """Refuse, before hours are spent, what would fail at once."""
    if config.data is None:
        raise ConfigError(f"{problem.config} has no section `[data]`: there is nothing to train.")
    try:
        check_layout(config.time.n_slices, n_ranks // config.run.data_ranks)
    except LayoutError as error:
        raise LayoutError(f"{problem.config}: {error}") from error
    if not config.data.is_made and not config.data.source.startswith("hub:"):
        find_folder(config.data.source)
