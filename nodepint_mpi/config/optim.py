"""The section `[optim]`: optimizers, their schedules, and groups of parameters."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from nodepint_mpi.config.section import NonNegativeFloat, NonNegativeInt, Section

SCHEDULES = ("constant", "cosine", "exponential")
"""Schedules with keys of their own in `[optim]`."""


class OptimRule(Section):
    """How parameters are updated: an optax optimizer, or your own, and its schedule.

    `name` is one of optax's that takes a learning rate, or an import path. `schedule` is
    "constant", "cosine", "exponential", the name of an optax schedule, or an import path; the last
    two take `schedule_options`.
    """

    name: str = "adam"
    learning_rate: PositiveFloat = 1e-3
    options: dict[str, Any] = {}
    schedule: str = "constant"
    schedule_options: dict[str, Any] = {}
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None
    end_factor: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _decay(self):
        if self.schedule in SCHEDULES and self.schedule_options:
            raise ValueError(
                f"`schedule = '{self.schedule}'` does not take `schedule_options`: they are for "
                "optax's own names and for import paths"
            )
        if self.schedule == "constant":
            if self.decay_steps is not None or self.end_factor != 0:
                raise ValueError(
                    "`schedule = 'constant'` does not take `decay_steps` or `end_factor`"
                )
        elif self.schedule in SCHEDULES:
            if self.decay_steps is None:
                raise ValueError(f"`schedule = '{self.schedule}'` needs `decay_steps`")
            if self.decay_steps <= self.warmup_steps:
                raise ValueError("`decay_steps` counts from the start: more than `warmup_steps`")
            if self.schedule == "exponential" and self.end_factor == 0:
                raise ValueError("`schedule = 'exponential'` needs an `end_factor` above zero")
        return self


class OptimGroup(Section):
    """Parameters with settings of their own: those whose path matches one of the patterns `match`.

    What is not given is that of `[optim]`; a `name` of its own begins with no `options`, and a
    `schedule` of its own with none of the schedule's keys. `frozen` parameters stay as they are.
    """

    match: list[str] = Field(min_length=1)
    frozen: bool = False
    name: str | None = None
    learning_rate: PositiveFloat | None = None
    options: dict[str, Any] | None = None
    schedule: str | None = None
    schedule_options: dict[str, Any] | None = None
    warmup_steps: NonNegativeInt | None = None
    decay_steps: PositiveInt | None = None
    end_factor: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _frozen(self):
        given = sorted(self.model_fields_set - {"match", "frozen"})
        if self.frozen and given:
            raise ValueError(f"is `frozen` and takes no {', '.join(f'`{key}`' for key in given)}")
        return self

    def rule(self, base: OptimRule) -> OptimRule:
        """The group's settings with those of `[optim]` where it has none. Local.

        Raises:
            ValueError: if they do not go together.
        """
        own = self.model_dump(exclude={"match", "frozen"}, exclude_none=True)
        keys = set(OptimRule.model_fields)
        if "name" in own:
            keys.discard("options")
        if "schedule" in own:
            keys -= {"schedule_options", "warmup_steps", "decay_steps", "end_factor"}
        return OptimRule.model_validate(base.model_dump(include=keys) | own)


class RandomBasisSection(Section):
    """The gradient is replaced by its projection on `dims` random directions of the parameters.

    They are shared among `run.basis_ranks`, and drawn anew in each step, or with `redraw = false`
    once and for all. `directions` are rows of a "hadamard" matrix with random signs of its columns,
    or vectors of random "signs" or of "normal" numbers, divided by their length. `by` says how a
    coefficient is found: "projection" of the gradient that the adjoint gives, or "tangents", as a
    derivative along the direction, forward in time and without an adjoint. With `scale =
    "unbiased"` the projection is multiplied by the number of parameters over `dims`: its mean over
    draws is then the gradient.
    """

    dims: PositiveInt
    by: Literal["projection", "tangents"] = "projection"
    redraw: bool = True
    scale: Literal["none", "unbiased"] = "none"
    directions: Literal["hadamard", "signs", "normal"] = "hadamard"


class OptimSection(OptimRule):
    """The optimizer of all parameters, or of those that are in no group.

    Gradients are averaged over `accumulate` steps before an update. With `average`, such as 0.999,
    what is evaluated is an exponential moving average of the parameters. `random_basis` projects
    the gradient of each step before anything else is done with it.
    """

    clip_norm: PositiveFloat | None = None
    groups: list[OptimGroup] = []
    accumulate: PositiveInt = 1
    average: float | None = Field(default=None, gt=0, lt=1)
    random_basis: RandomBasisSection | None = None

    @model_validator(mode="after")
    def _groups(self):
        for number, group in enumerate(self.groups):
            try:
                group.rule(self)
            except ValidationError as error:
                reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"in `groups[{number}]`: {reason}") from None
        return self
