"""Inputs over time: signals that are given, not solved for, and reach the field as an argument.

A signal is known at its knots and constant, linear or cubic between them, by diffrax's own
interpolations; behind its last knot it stays what it was there. A slice is given the knots around
it and no others, so a rank holds its own part of the signal, and at a slice's end the field sees
what comes before it.

A piecewise constant signal jumps. A Runge-Kutta step across a jump is of first order whatever its
order is else, so steps end where the signal jumps: the nearest step end is moved there
(`step_ends`), and in a step the signal is what it is in the middle of it (`hold`).

Reference:
    Kidger, Morrill, Foster, Lyons (2020), NeurIPS, "Neural controlled differential equations for
    irregular time series"; the cubic with backward differences: Morrill, Kidger, Yang, Lyons
    (2021), arXiv:2106.11028, section 3.
"""

import abc
from typing import Any, Literal, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Real

from nodepint_mpi.errors import DataError, ProblemError

Interpolation = Literal["constant", "linear", "cubic"]
"""What lies between the knots of a signal."""


class Jumping(eqx.Module):
    """What jumps in time among the arguments of a field: steps end where it does.

    Times are those since the beginning of a slice, at which a propagator has placed it.
    """

    def placed(self, t0: Array) -> "Jumping":
        """The same for a slice that begins at `t0`. Local."""
        del t0
        return self

    @property
    @abc.abstractmethod
    def jumps(self) -> Real[Array, " jumps"]:
        """Where it may jump."""

    @abc.abstractmethod
    def held_at(self, since: Array) -> Any:
        """The same, constant at what it is there: for a step without jumps inside. Local."""


class Held(diffrax.AbstractPath, Jumping):
    """A piecewise constant path: from each knot on the value there."""

    ts: Real[Array, " knots"]
    values: Inexact[Array, "knots *channels"]

    @property
    def t0(self):
        """The first knot."""
        return self.ts[0]

    @property
    def t1(self):
        """The last knot."""
        return self.ts[-1]

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return self.evaluate(t1) - self.evaluate(t0)
        index = jnp.searchsorted(self.ts, t0, side="right") - 1
        return self.values[jnp.maximum(index, 0)]

    def derivative(self, t, left=True):
        raise ProblemError(
            "A piecewise constant input has no derivative: set `data.interpolation` to 'linear' "
            "or 'cubic'."
        )

    @property
    def jumps(self):
        return self.ts

    def held_at(self, since: Array) -> "Held":
        return Held(self.ts[:1], self.evaluate(since)[None])


class Inputs(eqx.Module):
    """A sample's inputs as the field gets them: `inputs.evaluate(t)` is (channels,).

    `until` is the time of the last knot, counted from `t0` as the path counts its time.
    """

    path: diffrax.AbstractPath
    t0: Real[Array, ""]
    until: Real[Array, ""]

    def evaluate(self, t: Real[Array, ""]) -> Inexact[Array, " channels"]:
        """The inputs at time `t`. Local."""
        return self.path.evaluate(jnp.minimum(t - self.t0, self.until))

    def derivative(self, t: Real[Array, ""]) -> Inexact[Array, " channels"]:
        """Their derivative, zero behind the last knot. Local.

        Raises:
            ProblemError: for piecewise constant inputs.
        """
        since = t - self.t0
        slope = self.path.derivative(jnp.minimum(since, self.until))
        return jnp.where(since > self.until, jnp.zeros_like(slope), slope)


class Signal(NamedTuple):
    """The inputs of a group's samples around the owned slices, in the time since each begins.

    `knots` (owned, samples, knots) increase; those behind the last real one only fill up. `values`
    are (owned, samples, knots, channels), `until` (owned, samples) the last real knots.
    """

    knots: Any
    values: Any
    until: Any


def path_of(
    kind: Interpolation, knots: Real[Array, " knots"], values: Inexact[Array, "knots channels"]
) -> diffrax.AbstractPath:
    """The path through the knots of one slice. Local."""
    if kind == "constant":
        return Held(knots, values)
    if kind == "linear":
        return diffrax.LinearInterpolation(knots, values)
    return diffrax.CubicInterpolation(knots, diffrax.backward_hermite_coefficients(knots, values))


def _is_jumping(part: Any) -> bool:
    return isinstance(part, Jumping)


def place_jumps(args: Any, t0: Array) -> Any:
    """The arguments of a field in a slice that begins at `t0`. Local."""
    return jax.tree.map(
        lambda part: part.placed(t0) if _is_jumping(part) else part, args, is_leaf=_is_jumping
    )


def jumps_in(args: Any) -> bool:
    """Whether something among the arguments of a field jumps. Local."""
    return any(map(_is_jumping, jax.tree.leaves(args, is_leaf=_is_jumping)))


def hold(args: Any, left: Array, right: Array) -> Any:
    """The arguments of a field for a step from `left` to `right`: jumps lie at its ends. Local."""
    middle = left + (right - left) / 2
    return jax.tree.map(
        lambda part: part.held_at(middle) if _is_jumping(part) else part, args, is_leaf=_is_jumping
    )


def step_ends(grid: Real[Array, " ends"], args: Any) -> Real[Array, " ends"]:
    """Equally spaced step ends, the nearest moved to where something in `args` jumps. Local."""
    n_steps = grid.shape[0] - 1
    for part in jax.tree.leaves(args, is_leaf=_is_jumping):
        if _is_jumping(part) and n_steps > 1:
            length, jumps = grid[-1] - grid[0], part.jumps
            inside = (jumps > grid[0]) & (jumps < grid[-1])
            nearest = jnp.clip(jnp.round((jumps - grid[0]) / length * n_steps), 1, n_steps - 1)
            places = jnp.where(inside, nearest.astype(int), n_steps + 1)  # beyond: dropped
            grid = grid.at[places].set(jumps.astype(grid.dtype), mode="drop")
    return grid


def count_knots(
    times: np.ndarray, lengths: np.ndarray, edges: np.ndarray, kind: Interpolation
) -> int:
    """How many knots a slice needs at most. Local.

    Args:
        times: Of the knots, (rows, longest), each row's increasing as far as it is long.
        lengths: Of the rows.
        edges: Of all slices.
        kind: What lies between the knots.
    """
    most = 1
    for row, length in zip(times, lengths, strict=True):
        first, last = _windows(row[:length], edges, kind)
        most = max(most, int(np.max(last - first)) + 1)
    return most + 1  # one to fill up with: no path begins and ends at one knot


def cut_signal(
    times: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
    edges: np.ndarray,
    kind: Interpolation,
    n_knots: int,
    dtype: Any,
) -> Signal:
    """The part of samples' inputs around a block's slices. Local.

    Args:
        times: Of the knots, (samples, longest).
        values: At the knots, (samples, longest, channels).
        lengths: How many knots each sample has.
        edges: Of the owned slices.
        kind: What lies between the knots.
        n_knots: See `count_knots`.
        dtype: Of the run.
    """
    n_owned, n_samples = len(edges) - 1, len(times)
    knots = np.empty((n_owned, n_samples, n_knots))
    cut = np.empty((n_owned, n_samples, n_knots, *values.shape[2:]))
    until = np.empty((n_owned, n_samples))
    filling = np.arange(n_knots)
    for b in range(n_samples):
        own = times[b, : lengths[b]]
        first, last = _windows(own, edges, kind)
        places = np.minimum(first[:, None] + filling, last[:, None])
        beyond = np.maximum(filling - (last - first)[:, None], 0)
        lefts, spans = edges[:-1, None], np.diff(edges)[:, None]
        knots[:, b] = own[places] - lefts + beyond * spans
        cut[:, b] = values[b][places]
        until[:, b] = own[-1] - edges[:-1]
    return Signal(knots.astype(dtype), cut.astype(dtype), until.astype(dtype))


def check_jumps(
    name: str,
    times: np.ndarray,
    lengths: np.ndarray,
    edges: np.ndarray,
    n_steps: int | None,
) -> None:
    """Refuse jumps that steps cannot end at. Local.

    Args:
        name: The column of the inputs.
        times: Of the jumps, (rows, longest).
        lengths: How many each row has.
        edges: Of all slices.
        n_steps: Fine steps of a slice; None where error control chooses them.

    Raises:
        DataError: with row, time and remedy.
    """
    for row, (own, length) in enumerate(zip(times, lengths, strict=True)):
        own = own[:length]
        home = np.clip(np.searchsorted(edges, own, side="right") - 1, 0, len(edges) - 2)
        inside = (own > edges[0]) & (own < edges[-1]) & (own != edges[home])
        own, home = own[inside], home[inside]
        if not len(own):
            continue
        if n_steps is None:
            raise DataError(
                f"Row {row} of the piecewise constant inputs {name!r} jumps at t = {own[0]:g}, "
                "inside a slice; steps chosen by error control cannot end there. Give `time.fine` "
                "a number `n_steps`, put `time.edges` where inputs jump, or take `interpolation = "
                "'linear'`."
            )
        widths = (edges[home + 1] - edges[home]) / n_steps
        place = np.rint((own - edges[home]) / widths)
        place = home * (n_steps + 1) + np.clip(place, 1, n_steps - 1)
        same = np.flatnonzero(np.diff(place) == 0)
        if n_steps == 1 or len(same):
            t = own[0] if n_steps == 1 else own[same[0] + 1]
            raise DataError(
                f"Row {row} of the piecewise constant inputs {name!r} jumps at t = {t:g}, where "
                f"no fine step can end: a slice of {n_steps} steps has {n_steps - 1} ends inside, "
                "and each can be moved to one jump that is near. Raise `time.fine.n_steps` or "
                "`time.n_slices`, or take `interpolation = 'linear'`."
            )


def _windows(
    times: np.ndarray, edges: np.ndarray, kind: Interpolation
) -> tuple[np.ndarray, np.ndarray]:
    """First and last knot that matter in each slice."""
    end = len(times) - 1
    first = np.clip(np.searchsorted(times, edges[:-1], side="right") - 1, 0, end)
    last = np.clip(np.searchsorted(times, edges[1:], side="left"), 0, end)
    if kind == "constant":  # what begins at the right edge is not seen here
        last = np.maximum(last - (times[last] >= edges[1:]), first)
    elif kind == "cubic":  # whose slope at a knot is that of the piece before it
        first = np.maximum(first - 1, 0)
    return first, last
