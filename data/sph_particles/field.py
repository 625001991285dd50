"""Particles of a fluid on the periodic unit square that act on each other in pairs, as is learned.

A network of one's own: `network.name = "data/sph_particles/field.py:make_field"`.
"""

from math import comb
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

REACH = 3.0
"""Of the forces, in spacings of as many particles on a lattice."""


class PairField(eqx.Module):
    """x' and v' of all particles; the sum of all v does not change, whatever is learned.

    With q the distance over the reach R, at most 1, and e the way from j to i over R:
    x_i' = v_i + sum_j drift(q) e,   v_i' = sum_j (p_i + p_j) push(q) e / R + drag(q) (v_j - v_i),
    p = d + g(d),   d_i = 100 (sum_j crowd(q) - 1).
    g is a perceptron, the other four (1 - q)^2 times polynomials in Bernstein's basis.
    """

    mlp: eqx.nn.MLP
    polynomials: Float[Array, "4 coefficients"]

    def __call__(self, t: Any, u: Float[Array, " state"], args: Any) -> Float[Array, " state"]:
        del t, args
        x, v = u.reshape(2, -1, 2).swapaxes(1, 2)
        reach = REACH * x.shape[1] ** -0.5
        gap = x[:, :, None] - x[:, None, :]
        e = (gap - jnp.round(gap)) / reach
        q = jnp.minimum(jnp.sqrt(e[0] ** 2 + e[1] ** 2 + 1e-12), 1.0)
        n = self.polynomials.shape[1] - 1
        parts = jnp.stack([comb(n, k) * q**k * (1 - q) ** (n - k + 2) for k in range(n + 1)])
        crowd, push, drag, drift = jnp.tensordot(self.polynomials, parts, axes=1)
        d = 100 * (jnp.sum(crowd, axis=1) - 1)
        p = d + jax.vmap(self.mlp)(d[:, None])[:, 0]
        force = (p[:, None] + p[None]) * push / reach
        pulled = jnp.sum(force[None] * e, axis=2) + v @ drag - v * jnp.sum(drag, axis=1)[None]
        moved = v + jnp.sum(drift[None] * e, axis=2)
        return jnp.stack([moved, pulled]).swapaxes(1, 2).ravel()


def make_field(
    key: PRNGKeyArray,
    *,
    input_shape: tuple[int, ...],
    output_size: int,
    degree: int,
    width: int,
    depth: int,
) -> PairField:
    """A field that begins as a gas: what is crowded pushes, neighbours drag a little. Local."""
    del input_shape, output_size
    mlp = eqx.nn.MLP(1, 1, width, depth, jnp.tanh, key=key)
    lattice = 6 / (jnp.pi * REACH**2)  # a crowd of evenly spread particles is 1
    start = jnp.array([lattice, 2.0, 1.0, 0.1])
    return PairField(mlp, jnp.tile(start[:, None], degree + 1))
