"""The file of a sweep over hyper-parameters, such as `configs/sweep/quickstart.toml`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from nodepint_mpi.config.errors import explain_validation
from nodepint_mpi.config.experiment import parse_toml, read_text
from nodepint_mpi.config.section import NonNegativeInt, Section, require_dotted
from nodepint_mpi.errors import ConfigError


class Range(Section):
    """Values from `low` to `high`, spread evenly, or if `log` in the logarithm; or `whole` ones."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _is_a_range(self):
        if not self.low < self.high:
            raise ValueError("needs `low` below `high`")
        if self.log and self.low <= 0:
            raise ValueError("`log = true` needs `low` above zero")
        if self.whole and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("`whole = true` needs whole numbers as `low` and `high`")
        return self


class Sweep(Section):
    """Trainings of `config` with different values of the keys in `search`, each on `ranks` ranks.

    A key has a list of values or a range. Without `n_trials` all combinations of lists are trained;
    with it, that number of trials, drawn from a Sobol sequence that `seed` scrambles.
    `set` changes keys of all trials. They are compared by `metric`, a number in the `DONE` of a run
    such as "best_valid_loss", of which the least is the best, or with `mode = "max"` the largest.
    """

    config: str
    metric: str
    mode: Literal["min", "max"] = "min"
    n_trials: PositiveInt | None = None
    seed: NonNegativeInt = 0
    ranks: PositiveInt = 1
    cores: PositiveInt = 1
    set: dict[str, Any] = {}
    search: dict[str, list[Any] | Range] = Field(min_length=1)

    @field_validator("set", "search")
    @classmethod
    def _dotted(cls, keys):
        return require_dotted(keys)

    @model_validator(mode="after")
    def _consistent(self):
        for key, values in self.search.items():
            if key in self.set:
                raise ValueError(f"`{key}` can stand in one of `set` and `search`")
            if isinstance(values, Range):
                if self.n_trials is None:
                    raise ValueError(f'`search."{key}"` is a range: say how many with `n_trials`')
            elif not values or any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f'`search."{key}"` needs values that differ')
        return self


def read_sweep(path: str | Path) -> Sweep:
    """Read the file. Local.

    Raises:
        ConfigError: if it cannot be read, is not TOML, or is not valid.
    """
    try:
        return Sweep.model_validate(parse_toml(read_text(path), str(path)))
    except ValidationError as error:
        raise ConfigError(explain_validation(error, Sweep, str(path))) from None
