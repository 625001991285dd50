"""The file of scaling studies, such as `configs/scaling/lotka_volterra.toml`."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from nodepint_mpi.config.errors import explain_validation
from nodepint_mpi.config.experiment import parse_toml, read_text
from nodepint_mpi.config.section import Name, Section, require_dotted
from nodepint_mpi.errors import ConfigError


class GridPoint(NamedTuple):
    """All ranks; the groups of them that share samples; those that share a slice's tangents."""

    ranks: int
    data: int
    basis: int

    @property
    def along_time(self) -> int:
        """Ranks of a line."""
        return self.ranks // (self.data * self.basis)


class StudySection(Section):
    """A config on more and more ranks.

    "strong": always the same problem. "weak": one that grows. The values of the keys in `grows` are
    those of the first number of ranks; on k times as many ranks along time whole numbers are k
    times as large and `time.horizon` k times as long, and keys of `[data]` follow the data ranks.

    `data_ranks` and `basis_ranks` are one number each, or one for each number of `ranks`. `set`
    changes keys of the config, `over` does all of the study for each of the values of a key, for
    all combinations of several. With `serial` plain diffrax and optax take the same steps on one
    rank.
    """

    name: Name
    kind: Literal["strong", "weak"] = "strong"
    ranks: list[PositiveInt] = Field(min_length=1)
    data_ranks: list[PositiveInt] = Field(default=[1], min_length=1)
    basis_ranks: list[PositiveInt] = Field(default=[1], min_length=1)
    grows: list[str] = []
    set: dict[str, Any] = {}
    over: dict[str, list[Any]] = {}
    serial: bool = False

    @field_validator("grows", "set", "over")
    @classmethod
    def _dotted(cls, keys):
        return require_dotted(keys)

    @model_validator(mode="after")
    def _consistent(self):
        if any(b <= a for a, b in zip(self.ranks, self.ranks[1:], strict=False)):
            raise ValueError("`ranks` must be strictly increasing")
        for name in ("data_ranks", "basis_ranks"):
            if len(getattr(self, name)) not in (1, len(self.ranks)):
                raise ValueError(f"`{name}` has one number, or one for each number of `ranks`")
        for point in self.grid():
            n_lines = point.data * point.basis
            if point.ranks % n_lines:
                raise ValueError(f"{point.ranks} ranks cannot form {n_lines} lines of equal length")
        if self.kind == "weak" and not self.grows:
            raise ValueError('`kind = "weak"` needs `grows`, such as ["time.n_slices"]')
        if self.kind == "strong" and self.grows:
            raise ValueError('`grows` is for `kind = "weak"`')
        for key, values in self.over.items():
            if key in self.set or key in self.grows:
                raise ValueError(f"`{key}` can stand in one of `set`, `over` and `grows`")
            if not values or any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f'`over."{key}"` needs values that differ')
        for name in ("n_steps", "data_ranks", "basis_ranks"):
            if f"run.{name}" in self.set | self.over:
                raise ValueError(f"`run.{name}` is set by `{name}` of this file")
        return self

    def grid(self) -> list[GridPoint]:
        """The ranks of every point."""

        def of_each(numbers: list[int]) -> list[int]:
            return numbers * (len(self.ranks) if len(numbers) == 1 else 1)

        dealt = of_each(self.data_ranks), of_each(self.basis_ranks)
        return [GridPoint(*point) for point in zip(self.ranks, *dealt, strict=True)]


class Scaling(Section):
    """Studies of `config`: `n_steps` optimizer steps for each point, on `cores` for each rank.

    Of the steps the first ones compile, and the eleventh is profiled.
    """

    config: str
    n_steps: int = Field(default=30, ge=12)
    cores: PositiveInt = 1
    study: list[StudySection] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self):
        names = [study.name for study in self.study]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`study` names {twice[0]!r} twice")
        return self


def read_scaling(path: str | Path) -> Scaling:
    """Read the file. Local.

    Raises:
        ConfigError: if it cannot be read, is no TOML, or makes no sense.
    """
    try:
        return Scaling.model_validate(parse_toml(read_text(path), str(path)))
    except ValidationError as error:
        raise ConfigError(explain_validation(error, Scaling, str(path))) from None
