"""The section `[data]`: where samples come from, and what their columns are."""

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from nodepint_mpi.config.section import Section

GIVEN = "object.data:data"
"""The source of data that a program gives as an object."""


class DataSection(Section):
    """Where samples come from. `source` is a prepared folder, `hub:NAME`, or an import path; a
    program that gives the data itself leaves it out.

    What the import path names is a function of the user's own, called with `options`, that makes
    the splits; see `nodepint_mpi.data.made`. All other keys but the splits are names of columns.

    Without `times` a sample is an `input` and a label; with `times`, the column of observation
    times, it is a trajectory of observations `target`, each at a time of its own if the rows
    differ. The encoder gets `initial`, a row of its own kind, or else the first observation of
    `input`. `mask` is true where an observation, or a component of one, is there, and
    `missing = "nan"` says that NaN stands for what is not; `weights` are those of samples or of
    observations in the loss. `static` are numbers of a sample that the field is given, and
    `inputs` a signal it is given over time, known at `input_times` (`times` unless given) and
    constant, linear or cubic between them (`interpolation`).

    The validation set is the split `valid_split`, or the share `valid_fraction` of the training
    rows, drawn by `run.seed` and not trained on.
    """

    source: str = GIVEN
    input: str | None = None
    target: str
    times: str | None = None
    initial: str | None = None
    mask: str | None = None
    missing: Literal["nan"] | None = None
    weights: str | None = None
    static: str | None = None
    inputs: str | None = None
    input_times: str | None = None
    interpolation: Literal["constant", "linear", "cubic"] = "linear"
    train_split: str = "train"
    test_split: str = "test"
    valid_split: str | None = None
    valid_fraction: float | None = Field(default=None, gt=0, lt=1)
    batch_size: PositiveInt | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _columns_that_belong_together(self):
        if (self.input is None) == (self.initial is None):
            raise ValueError(
                "needs one of `input`, whose first observation the encoder gets where there are "
                "`times`, and `initial`, which it gets as it is"
            )
        if self.inputs is None:
            if self.input_times is not None or self.interpolation != "linear":
                raise ValueError("`input_times` and `interpolation` are those of `inputs`")
        elif self.input_times is None and self.times is None:
            raise ValueError("`inputs` need `input_times`, the column of times they are known at")
        if self.times is None and (self.mask is not None or self.missing is not None):
            raise ValueError("`mask` and `missing` are for trajectories: they need `times`")
        return self

    @model_validator(mode="after")
    def _one_validation_set(self):
        if self.valid_split is not None and self.valid_fraction is not None:
            raise ValueError(
                "takes `valid_split` or `valid_fraction`, not both: remove one of them"
            )
        if self.valid_split == self.train_split:
            raise ValueError(
                f"`valid_split = {self.valid_split!r}` is the split that is trained on: hold out "
                "some of its rows by `valid_fraction`"
            )
        return self

    @property
    def is_validated(self) -> bool:
        """Whether there is a validation set."""
        return self.valid_split is not None or self.valid_fraction is not None

    @property
    def encoded(self) -> str:
        """The column that the encoder gets a row of, or the first observation of one."""
        name = self.input if self.initial is None else self.initial
        assert name is not None  # one of them is given
        return name

    @model_validator(mode="after")
    def _is_a_source(self):
        parts = self.source.removeprefix("hub:").split("/")
        printable = self.source.isprintable() and self.source.strip()
        if not printable or not any(part.strip(". ") for part in parts):
            raise ValueError(
                f"`source = {self.source!r}` is empty: give a dataset's name, the path of its "
                "folder, 'hub:OWNER/NAME' or 'file.py:function'"
            )
        return self

    @model_validator(mode="after")
    def _options_of_a_function(self):
        if self.options and not self.is_made:
            raise ValueError("`options` are for a `source` that is a function: 'file.py:function'")
        return self

    @property
    def is_made(self) -> bool:
        """Whether the source is a function of the user's own."""
        return ":" in self.source and not self.source.startswith("hub:")
