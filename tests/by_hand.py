"""A serial solve that is written out: what parallel ones are compared with."""

import jax
import jax.numpy as jnp


def classic_runge_kutta(field, state, t0, t1, n_steps, args=None):
    """States after each of `n_steps` equal steps of the classic fourth-order method.

    Reference:
        Hairer, Norsett, Wanner (1993), Solving Ordinary Differential Equations I, table II.1.2.
    """
    h = (t1 - t0) / n_steps

    def step(u, t):
        k1 = field(t, u, args)
        k2 = field(t + h / 2, u + h / 2 * k1, args)
        k3 = field(t + h / 2, u + h / 2 * k2, args)
        k4 = field(t + h, u + h * k3, args)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return u, u

    return jax.lax.scan(step, state, t0 + h * jnp.arange(float(n_steps)))[1]


def slice_ends(field, state, edges, n_steps, args=None):
    """States at all edges, with `n_steps` such steps in each slice."""
    states = [jnp.asarray(state)]
    for t0, t1 in zip(edges[:-1], edges[1:], strict=True):
        states.append(classic_runge_kutta(field, states[-1], t0, t1, n_steps, args)[-1])
    return jnp.stack(states)
