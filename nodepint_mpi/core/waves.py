"""A vector field between two fixed linear maps, such as to and from coefficients of waves."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float


class WaveField(eqx.Module):
    """du/dt = S g(A u) with a trained g between matrices A and S, which are not.

    On a basis the matrices take it up, so that a reduced model of this field costs the same
    whatever the size of the state.
    """

    inner: Callable[[Array], Array]
    analysis: Float[Array, "coefficients state"]
    synthesis: Float[Array, "state coefficients"]

    def __call__(self, t: Any, u: Float[Array, " state"], args: Any) -> Float[Array, " state"]:
        del t, args
        analysis, synthesis = jax.lax.stop_gradient((self.analysis, self.synthesis))
        return synthesis @ self.inner(analysis @ u)

    def on_basis(self, basis: Float[Array, "rank state"]) -> "WaveField":
        """The field V^T f(V c) of coordinates c. Local."""
        return WaveField(self.inner, self.analysis @ basis.T, basis @ self.synthesis)
