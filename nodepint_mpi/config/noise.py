"""The section `[noise]`: the Brownian motion of a stochastic equation that is trained."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from nodepint_mpi.config.section import Section


class NoiseSection(Section):
    """du = f dt + g dW, where f is the vector field and g its method `diffusion(t, u, args)`.

    `kind` and `calculus` are those of `nodepint_mpi.Noise`. With `paths = "common"` the path of a
    sample is the same in all steps, with "fresh" it is another one in each, which goes without
    `[time.tracking]`. With `n_paths` each sample has several paths, the first axis of its state and
    of its prediction. `seed` is `run.seed` unless given.
    """

    kind: Literal["diagonal", "scalar", "general"] = "diagonal"
    n_dims: PositiveInt | None = None
    calculus: Literal["ito", "stratonovich"] = "ito"
    additive: bool = False
    paths: Literal["common", "fresh"] = "common"
    n_paths: int | None = Field(default=None, ge=2)
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _dims_of_the_kind(self):
        if (self.kind == "general") != (self.n_dims is not None):
            raise ValueError("takes `n_dims` with `kind = 'general'`, which needs it")
        return self
