"""The cells of the table: what is to be trained, and what of it is there already.

A cell is a run directory, OUT/NAME/METHOD, and a note beside it, METHOD.json. Importing this module
loads neither MPI nor JAX.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from nodepint_mpi.bench.studies.series.kept import KeptRun, State, check_run, make_digest
from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.config.plain import plain_config
from nodepint_mpi.config.table import TableList, TableProblem
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.names import hint

TRAIN_SCORES = "train_scores.json"
"""In the run directory: what `nodepint evaluate --split train --json` writes."""


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

    @property
    def kept(self) -> KeptRun:
        """Its run. Local."""
        assert self.config is not None  # a cell that is left out has none
        return KeptRun(self.folder, make_digest(self.config, self.n_ranks, self.n_cores))

    def state(self) -> State | Literal["left out"]:
        """What is there of it. Local.

        Raises:
            OutputError: if something else is in its place.
        """
        if self.left_out:
            return "left out"
        return self.kept.state(whole=self.has_scores())

    def has_scores(self) -> bool:
        """Whether it lacks no score. Local."""
        return not self.problem.scored or (self.folder / TRAIN_SCORES).is_file()


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
            raise ConfigError(f"`--only {name}`: unknown problem{hint(name, names)}")
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
        check_run(config, most, problem.config)
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
