"""The sections `[network]` and `[growth]`: the model, and how it grows while it is trained."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from nodepint_mpi.config.section import Section

NETWORKS = ("mlp", "conv")
"""Names of networks; one of the user's own is named `file.py:function`."""


class DenseNetwork(Section):
    """A multi-layer perceptron as vector field of the observed state.

    With `latent` it acts on that many coordinates in a learned linear basis of the observed state;
    for labeled samples, on that many affine functions of their entries.
    """

    name: Literal["mlp"]
    width: PositiveInt = 64
    depth: PositiveInt = 2
    activation: Literal["tanh", "softplus", "relu", "gelu", "silu"] = "tanh"
    time_dependent: bool = False
    positive: bool = False
    latent: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_encoder(self):
        if self.positive and self.latent is not None:
            raise ValueError("takes `positive` or `latent`, not both")
        return self


class ConvNetwork(Section):
    """Convolutional encoder, vector field and decoder for gray images.

    With `layers` the vector field has weights of its own in each unit of time, from 0 to `layers`:
    one Euler step in each, and it is a residual network.
    """

    name: Literal["conv"]
    channels: PositiveInt = 16
    layers: PositiveInt | None = None


class UserNetwork(Section):
    """The user's own: `module:function` or `file.py:function`, called with `options`."""

    name: str
    options: dict[str, Any] = {}


def _network_tag(value: Any) -> str:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return name if isinstance(name, str) and ":" not in name else "own"


Network = Annotated[
    Annotated[DenseNetwork, Tag("mlp")]
    | Annotated[ConvNetwork, Tag("conv")]
    | Annotated[UserNetwork, Tag("own")],
    Discriminator(_network_tag),
]


class GrowthSection(Section):
    """Training with a network that grows: when `steps` are done it has `sizes`.

    The size is `network.latent` of "mlp", `network.channels` of "conv".
    """

    steps: list[PositiveInt] = Field(min_length=1)
    sizes: list[PositiveInt] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self):
        if len(self.steps) != len(self.sizes):
            raise ValueError("needs as many `sizes` as `steps`")
        for name, numbers in (("steps", self.steps), ("sizes", self.sizes)):
            if any(b <= a for a, b in zip(numbers, numbers[1:], strict=False)):
                raise ValueError(f"`{name}` must be strictly increasing")
        return self
