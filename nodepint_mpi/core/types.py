"""Aliases for the shapes and trees that the numerics pass around."""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, Inexact, PyTree

Params = PyTree[Any]
"""Parameters of the vector field: what `f(t, u, args)` gets as `args`."""

State = Inexact[Array, "*state"]
"""One state, of any array shape; a batch of samples is one more leading axis."""

Block = Inexact[Array, "owned *state"]
"""One state for each slice a rank owns."""

Scalar = Float[Array, ""]

Field = Callable[..., Any]
"""A vector field `f(t, u, args) -> du/dt`."""

Norm = Literal["max", "rms", "mean"]
"""Of a difference of states: the largest number, the root mean square, the mean of all numbers."""
