"""Controls c(t, u) as Equinox modules: what an optimizer changes beside, or instead of, a field.

A control is any module called as `control(t, u)` that returns a vector, for one state of one
sample. Those here are values at nodes, networks, and either of them within bounds.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from nodepint_mpi.core.exogenous import Jumping
from nodepint_mpi.errors import ProblemError

Control = Callable[[Array, Array], Array]
"""`control(t, u)`, (n_controls,); open loop if it does not look at `u`."""


def _check_nodes(times: Any, values: Any) -> tuple[tuple[float, ...], Array]:
    """Times and values of nodes, checked. Local."""
    try:
        nodes = np.asarray(times, dtype=float)
    except (TypeError, ValueError) as error:
        raise ProblemError(f"`times` of a control is not a list of times: {error}.") from error
    values = jnp.asarray(values)
    if nodes.ndim != 1 or not len(nodes) or not np.all(np.isfinite(nodes)):
        raise ProblemError(f"`times` of a control has shape {nodes.shape}; list finite times.")
    if not np.all(np.diff(nodes) > 0):
        raise ProblemError("`times` of a control must be strictly increasing.")
    if values.ndim != 2 or len(values) != len(nodes):
        raise ProblemError(
            f"`values` of a control has shape {values.shape}; expected one row for each of the "
            f"{len(nodes)} times and one column for each control."
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.zeros(()).dtype)
    return tuple(nodes.tolist()), values


def _knots(times: tuple[float, ...], like: Array) -> Array:
    return jnp.asarray(np.asarray(times), dtype=jnp.result_type(like))


class PiecewiseConstant(Jumping):
    """A control that keeps the value of a node from its time to the next.

    Fixed steps end at the nodes, the nearest of them moved there, so that solvers keep their order:
    take the nodes from the step ends, or fewer.
    """

    times: tuple[float, ...] = eqx.field(static=True)
    values: Float[Array, "nodes controls"]
    origin: Real[Array, ""] | None

    def __init__(self, times: Any, values: Any):
        """Values at nodes.

        Args:
            times: Nodes, increasing, (nodes,), in the unit of time.
            values: Of the control from there on, (nodes, n_controls).

        Raises:
            ProblemError: if times do not increase, or the shapes do not fit together.
        """
        self.times, self.values = _check_nodes(times, values)
        self.origin = None

    def __call__(self, t: Real[Array, ""], u: Any) -> Float[Array, " controls"]:
        del u
        if len(self.values) == 1:  # the same at all times, as in a step without jumps inside
            return self.values[0]
        index = jnp.searchsorted(_knots(self.times, t), t, side="right") - 1
        return self.values[jnp.maximum(index, 0)]

    def placed(self, t0):
        return eqx.tree_at(lambda c: c.origin, self, t0, is_leaf=lambda x: x is None)

    @property
    def jumps(self):
        assert self.origin is not None  # a propagator has placed it
        return _knots(self.times, self.origin)[1:] - self.origin

    def held_at(self, since):
        assert self.origin is not None
        return eqx.tree_at(lambda c: c.values, self, self(self.origin + since, None)[None])


class PiecewiseLinear(eqx.Module):
    """A control that is linear between its nodes; before the first and after the last constant."""

    times: tuple[float, ...] = eqx.field(static=True)
    values: Float[Array, "nodes controls"]

    def __init__(self, times: Any, values: Any):
        """Values at nodes.

        Args:
            times: Nodes, increasing, (nodes,), in the unit of time.
            values: Of the control there, (nodes, n_controls).

        Raises:
            ProblemError: if times do not increase, or the shapes do not fit together.
        """
        self.times, self.values = _check_nodes(times, values)

    def __call__(self, t: Real[Array, ""], u: Any) -> Float[Array, " controls"]:
        del u
        if len(self.times) == 1:
            return self.values[0]
        knots = _knots(self.times, t)
        index = jnp.clip(jnp.searchsorted(knots, t, side="right") - 1, 0, len(self.times) - 2)
        left, right = knots[index], knots[index + 1]
        share = jnp.clip((t - left) / (right - left), 0.0, 1.0).astype(self.values.dtype)
        return (1 - share) * self.values[index] + share * self.values[index + 1]


class NetworkControl(eqx.Module):
    """A network of the time, or with `feedback` of time and state.

    The time is scaled, so that `span` is [-1, 1]. The state is flattened.
    """

    mlp: eqx.nn.MLP
    span: tuple[float, float] = eqx.field(static=True)
    feedback: bool = eqx.field(static=True)

    def __init__(
        self,
        span: Any,
        n_controls: int,
        *,
        n_states: int | None = None,
        width: int = 32,
        depth: int = 2,
        activation: Callable = jnp.tanh,
        pace: float = 1.0,
        key: PRNGKeyArray,
    ):
        """A network at random.

        Args:
            span: Beginning and end of the horizon.
            n_controls: Size of what it returns.
            n_states: Numbers of a state, for feedback; open loop unless given.
            width: Of the hidden layers.
            depth: Number of hidden layers.
            activation: Of the hidden layers.
            pace: Factor of the first layer's initial weights and biases: above one, the network
                varies faster to begin with, and finds controls of short pushes.
            key: Of JAX, for the initial weights.
        """
        self.span, self.feedback = (float(span[0]), float(span[1])), n_states is not None
        size = 1 + (n_states or 0)
        mlp = eqx.nn.MLP(size, n_controls, width, depth, activation, key=key)
        first = mlp.layers[0]
        faster = jax.tree.map(lambda x: pace * x if eqx.is_inexact_array(x) else x, first)
        self.mlp = eqx.tree_at(lambda m: m.layers[0], mlp, faster)

    def __call__(self, t: Real[Array, ""], u: Any) -> Float[Array, " controls"]:
        begin, end = self.span
        dtype = self.mlp.layers[0].weight.dtype
        seen = [((t - begin) * (2 / (end - begin)) - 1).astype(dtype)[None]]
        if self.feedback:
            seen += [jnp.ravel(part).astype(dtype) for part in jax.tree.leaves(u)]
        return self.mlp(jnp.concatenate(seen))


class Bounded(eqx.Module):
    """A control within bounds: low + (high - low) sigmoid(inner).

    The bounds themselves are reached only in the limit; the inner control is unbounded, so any
    optimizer will do.
    """

    inner: Control
    low: tuple[float, ...] = eqx.field(static=True)
    high: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, inner: Control, low: Any, high: Any):
        """Bounds, one number or one for each control.

        Raises:
            ProblemError: if a lower bound is not below the upper one.
        """
        lows, highs = np.atleast_1d(np.asarray(low, float)), np.atleast_1d(np.asarray(high, float))
        if (
            lows.ndim != 1
            or highs.ndim != 1
            or not (np.isfinite(lows).all() & np.isfinite(highs).all())
        ):
            raise ProblemError(
                "Bounds of a control are finite numbers, one or one for each control."
            )
        if lows.shape != highs.shape or not np.all(lows < highs):
            raise ProblemError(f"Bounds of a control need low < high; got {low} and {high}.")
        self.inner, self.low, self.high = inner, tuple(lows.tolist()), tuple(highs.tolist())

    def __call__(self, t: Real[Array, ""], u: Any) -> Float[Array, " controls"]:
        inner = self.inner(t, u)
        low, high = (
            jnp.broadcast_to(jnp.asarray(side, dtype=inner.dtype), inner.shape)
            for side in (np.squeeze(self.low), np.squeeze(self.high))
        )
        return low + (high - low) * jax.nn.sigmoid(inner)


def roughened(control: Control, scale: float, key: PRNGKeyArray) -> Control:
    """The control with noise on all its numbers: another start for an optimizer. Local.

    Where short strong pushes are cheaper than long ones, as of a force that is a power of the
    control, there are many local minima, and that next to a smooth start is not the best.

    Args:
        control: A module.
        scale: Standard deviation of the noise, in the control's unit for values at nodes.
        key: Of JAX, for the noise.

    Raises:
        ProblemError: if `scale` is not a number above zero.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not scale > 0:
        raise ProblemError(f"`scale` of the noise is {scale!r}; expected a number above zero.")
    numbers, rest = eqx.partition(control, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(numbers)
    keys = jax.random.split(key, max(len(leaves), 1))
    noisy = [
        leaf + scale * jax.random.normal(one, leaf.shape, leaf.dtype)
        for leaf, one in zip(leaves, keys, strict=False)
    ]
    return eqx.combine(jax.tree.unflatten(structure, noisy), rest)
