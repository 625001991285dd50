"""The section `[loss]`: what is minimized, what is added to it, and what is reported beside it."""

from pydantic import PositiveFloat

from nodepint_mpi.config.section import Section

PATH_LOSSES = ("energy_score", "moment_error")
"""Names of losses that compare several paths of a sample with what was observed."""


class LossTerm(Section):
    """What is added to the loss, `weight` times: `name` is an import path."""

    name: str
    weight: PositiveFloat = 1.0


class LossSection(Section):
    """`mean_squared_error`, `mean_squared_log_error`, `cross_entropy`, or an import path.

    For several paths of each sample `energy_score` or `moment_error`. `metrics` are import paths of
    what is reported beside it on the test split. `terms` are added to it in training: functions of
    the model and of a batch, one number a sample or one for all.
    """

    name: str
    metrics: list[str] = []
    terms: list[LossTerm] = []
