"""A batch whose samples are solved one by one, each with arguments of its own.

As `jax.vmap` of a serial solve: each sample has its own root finding and, where error control
chooses the steps, its own steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.stochastic import through

Axes = tuple[int | None, ...]
"""For every leaf of the arguments, None counted as one: the axis that counts samples, or None."""


@dataclass(frozen=True)
class SampleField:
    """A field of one sample, `alone(t, u, args)`, as a field of a batch (samples, *state)."""

    alone: Callable
    axes: Axes

    def __call__(self, t: Any, u: Any, args: PyTree) -> Any:
        return GivenField(self.alone, self.axes, None)(t, u, args)


class GivenField:
    """A `SampleField` that has been given some of its arguments, shaped like all of them."""

    def __init__(self, alone: Callable, axes: Axes, others: PyTree):
        self.alone, self.axes, self.others = alone, axes, others

    def __call__(self, t: Any, u: Any, params: PyTree) -> Any:
        args = params if self.others is None else eqx.combine(params, self.others)
        own = _take_apart(args, self.axes)
        return jax.vmap(
            lambda u, mapped: self.alone(t, u, own.join(mapped)), in_axes=(0, own.in_axes)
        )(u, own.mapped)


class EachSample(Propagator):
    """The propagator of such a field: every sample is stepped through a slice by itself."""

    n_sample_axes = 1

    def for_tangents(self):
        return EachSample(self.field, self.integrator.for_tangents())

    def __call__(self, params, start, t0, length, ts, index=None):
        field: Any = self.field  # one of the above
        integrator = self.integrator.for_single_samples()
        own = _take_apart(params, field.axes)
        other = _take_apart(getattr(field, "others", None), field.axes)

        def one(start, of_params, of_others):
            others = other.join(of_others)

            def given(function):
                def alone(t, u, params):
                    whole = params if others is None else eqx.combine(params, others)
                    return function(t, u, whole)

                return alone

            alone = through(field.alone, given)
            params = own.join(of_params)
            return Propagator(alone, integrator)(params, start, t0, length, ts, index)

        axes: Any = SliceResult(1, 0)  # type: ignore[arg-type]
        mapped = jax.vmap(one, in_axes=(0, own.in_axes, other.in_axes), out_axes=axes)
        return mapped(start, own.mapped, other.mapped)


class _Parts(NamedTuple):
    """Arguments taken apart: leaves that `jax.vmap` splits by sample, with the axes of these, and
    how to put all together again."""

    mapped: list[Array]
    in_axes: list[int]
    join: Callable[[list[Array]], PyTree]


def _take_apart(args: PyTree, axes: Axes) -> _Parts:
    leaves, structure = jax.tree.flatten(args, is_leaf=is_none)
    if args is None:
        axes = (None,)
    which = [
        i
        for i, (leaf, axis) in enumerate(zip(leaves, axes, strict=True))
        if axis is not None and leaf is not None
    ]

    def join(mapped: list[Array]) -> PyTree:
        given = dict(zip(which, mapped, strict=True))
        together = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, together)

    in_axes = [axis for axis in (axes[i] for i in which) if axis is not None]
    return _Parts([leaves[i] for i in which], in_axes, join)


def is_none(leaf: Any) -> bool:
    """For trees whose None counts as a leaf. Local."""
    return leaf is None
