"""The file that lists what is in the benchmark table: `configs/table/problems.toml`."""

from pathlib import Path

from pydantic import Field, PositiveInt, ValidationError, model_validator

from nodepint_mpi.config.errors import explain_validation
from nodepint_mpi.config.experiment import parse_toml, read_text
from nodepint_mpi.config.section import Section
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.names import hint, is_name


class TableQuestion(Section):
    """A part of the table: its heading, and why its problems end as they do."""

    name: str
    title: str
    why: str = ""


class TableProblem(Section):
    """A dataset, trained as `config` says on each number of `ranks`, a core for each rank.

    With `serial` also by plain diffrax and optax, on as many cores as the most of them. A problem
    that is not `scored` shows no accuracies; `note` goes under the table, and `question` names the
    part of the table where it is.
    """

    config: str
    dataset: str
    ranks: list[PositiveInt] = Field(default=[1, 2], min_length=1)
    serial: bool = True
    scored: bool = True
    note: str | None = None
    question: str | None = None

    @model_validator(mode="after")
    def _has_a_name(self):
        if not is_name(self.name):
            raise ValueError(f"`config = {self.config!r}` has no name that a folder could have")
        return self

    @property
    def name(self) -> str:
        """What it is called on the command line and in folders: its config without `.toml`."""
        return Path(self.config).stem


class TableList(Section):
    """The rows of the table, in order, and the parts that it is divided into."""

    problem: list[TableProblem] = Field(min_length=1)
    question: list[TableQuestion] = []

    @model_validator(mode="after")
    def _names_differ(self):
        names = [problem.name for problem in self.problem]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`problem` names {twice[0]!r} twice: a config has one place")
        questions = [question.name for question in self.question]
        for problem in self.problem:
            asked = problem.question
            if asked is not None and asked not in questions:
                raise ValueError(f"{problem.name}: unknown question{hint(asked, questions)}")
        return self

    def question_of(self, problem: TableProblem) -> TableQuestion:
        """The part of the table that a problem is in; one without a title if it names none."""
        named = [question for question in self.question if question.name == problem.question]
        return named[0] if named else TableQuestion(name="", title="")


def read_table_list(path: str | Path) -> TableList:
    """Read the list. Local.

    Raises:
        ConfigError: if it cannot be read, is no TOML, or makes no sense.
    """
    try:
        return TableList.model_validate(parse_toml(read_text(path), str(path)))
    except ValidationError as error:
        raise ConfigError(explain_validation(error, TableList, str(path))) from None
