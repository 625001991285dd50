"""The sections `[run]` and `[output]`: what to run, for how long, and where results go."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from nodepint_mpi.config.section import Name, NonNegativeFloat, NonNegativeInt, Section

N_STEPS = 1000
"""Optimizer steps where the config gives neither `run.n_steps` nor `run.n_epochs`."""


class RunSection(Section):
    """What to run, for how long, and on what.

    A run takes `n_steps` optimizer steps (1000 unless given), or goes `n_epochs` times through the
    training rows. Where there is a validation set it is scored every `validate_every` steps
    (`output.log_every` unless given) and after the last one, and `patience` scores in a row that do
    not improve on the best one before them, by at least `min_delta`, end the run; see
    `output.best`.

    Parameters are compared across ranks every `compare_every` steps and before each checkpoint (0:
    only there). `data_ranks` lines of ranks share the samples of a step, and the ranks of each line
    the time slices. With `time.method = "tangent"`, `basis_ranks` ranks have the same slices and
    samples and share the tangents, or with `optim.random_basis` and any method the random
    directions of the parameters. `share_gpus` lets ranks share a GPU where there are fewer than
    ranks; `cuda_mpi` sends messages from GPU to GPU where MPI can.
    With `sharded_update` every rank updates a part of the parameters and keeps that part of the
    optimizer's moments; without, rank 0 does; unless given it is sharded where the optimizer
    permits and the network is large enough.
    With `dealt_encoder` the ranks of a line share the encoder by samples; without, the first rank
    encodes all; unless given they share it where that should take less time.
    Compiled programs are kept in the folder `compile_cache` for the next run ("auto": in the user's
    cache folder; "off": nowhere).
    """

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["float32", "float64"] = "float32"
    n_steps: PositiveInt | None = None
    n_epochs: PositiveInt | None = None
    validate_every: PositiveInt | None = None
    patience: PositiveInt | None = None
    min_delta: NonNegativeFloat = 0.0
    hang_timeout_s: PositiveFloat = 15.0
    compare_every: NonNegativeInt = 100
    data_ranks: PositiveInt = 1
    basis_ranks: PositiveInt = 1
    share_gpus: bool = False
    cuda_mpi: bool = False
    sharded_update: bool | None = None
    dealt_encoder: bool | None = None
    compile_cache: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and not {"n_steps", "n_epochs"} & set(given):
            return {**given, "n_steps": N_STEPS}
        return given

    @model_validator(mode="after")
    def _one_length(self):
        if self.n_steps is not None and self.n_epochs is not None:
            raise ValueError("takes `n_steps` or `n_epochs`, not both: remove one of them")
        if self.patience is None and self.min_delta != 0:
            raise ValueError(
                "`min_delta` is what `patience` counts as an improvement: give `patience` too"
            )
        return self


class OutputSection(Section):
    """Where results go and how often.

    Without `checkpoint_every` a checkpoint is saved every 500 steps, but put off as long as saving
    would take more than 3 % of the time; with it, at that interval of steps whatever it costs.
    `tensorboard` also writes the metrics for TensorBoard. `callbacks` are told of them: "wandb",
    "mlflow", or import paths of what makes a `nodepint_mpi.Callback`. `best` names a score on the
    validation set, "valid_loss" or "valid_" and a metric: the checkpoint of the best one is kept
    apart, whatever `keep` says. `best_mode` says whether the smallest or the largest score is the
    best: "min" unless given, "max" for "valid_accuracy".
    """

    dir: str = "runs"
    log_every: PositiveInt = 50
    checkpoint_every: PositiveInt | None = None
    keep: PositiveInt = 3
    best: str | None = None
    best_mode: Literal["min", "max"] | None = None
    tensorboard: bool = False
    callbacks: list[str] = []

    @model_validator(mode="after")
    def _mode_of_best(self):
        if self.best is None and self.best_mode is not None:
            raise ValueError("`best_mode` is the direction of a score: name it by `best`")
        return self
