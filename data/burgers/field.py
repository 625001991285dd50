"""A vector field of periodic functions that is smooth whatever its weights.

A network of one's own: `network.name = "data/burgers/field.py:make_field"`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class FourierField(eqx.Module):
    """du/dt = S g(A u): a perceptron g from Fourier coefficients of u_x to those of du/dt.

    The matrices A and S are fixed. On a basis they take it up, so that a reduced model of this
    field costs the same whatever the number of grid points.
    """

    mlp: eqx.nn.MLP
    analysis: Float[Array, "coefficients state"]
    synthesis: Float[Array, "state coefficients"]

    def __call__(self, t: Any, u: Float[Array, " state"], args: Any) -> Float[Array, " state"]:
        del t, args
        analysis, synthesis = jax.lax.stop_gradient((self.analysis, self.synthesis))
        return synthesis @ self.mlp(analysis @ u)

    def on_basis(self, basis: Float[Array, "rank state"]) -> "FourierField":
        """The field V^T f(V c) of coordinates c. Local."""
        return FourierField(self.mlp, self.analysis @ basis.T, basis @ self.synthesis)


def make_field(
    key: PRNGKeyArray,
    *,
    input_shape: tuple[int, ...],
    output_size: int,
    n_modes: int,
    width: int,
    depth: int,
) -> FourierField:
    """A field on `output_size` equally spaced points that sees and moves `n_modes` waves. Local."""
    del input_shape
    modes = jnp.arange(1, n_modes + 1)
    phase = 2 * jnp.pi * modes * jnp.arange(output_size)[:, None] / output_size
    synthesis = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1)
    mlp = eqx.nn.MLP(2 * n_modes, 2 * n_modes, width, depth, activation=jax.nn.gelu, key=key)
    analysis = 2 / output_size * jnp.tile(modes, 2)[:, None] * synthesis.T
    return FourierField(mlp, analysis, synthesis)
