"""Batches given as to `jax.vmap`: which axes of the state and of the arguments count samples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.core.each_sample import Axes, is_none
from nodepint_mpi.core.stochastic import NoisyArgs
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.problem import StateLayout, lay_out


class Samples(NamedTuple):
    """A batch: how many samples, and which axis of each leaf of `args` counts them."""

    n: int
    axes: Axes

    def layout(self, whole: StateLayout) -> StateLayout:
        """The layout of one sample's state, from that of all. Local."""
        return StateLayout(
            whole.structure, whole.paths, tuple(shape[1:] for shape in whole.shapes), whole.dtype
        )

    def args_of_one(self, args: PyTree) -> PyTree:
        """The arguments of one sample, by shapes where they are mapped. Local."""
        leaves, structure = jax.tree.flatten(args, is_leaf=is_none)
        alone = [
            leaf if axis is None else _shape_without(leaf, axis)
            for leaf, axis in zip(leaves, self.axes, strict=True)
        ]
        return jax.tree.unflatten(structure, alone)


class LaidOut(NamedTuple):
    """Initial states as one array (*samples, *state), the layout of one state, or of them all where
    the field maps over the batch itself, and how many axes count samples."""

    initial: Array
    layout: StateLayout
    samples: Samples | None
    n_batch_axes: int


def lay_out_samples(u0: PyTree, args: PyTree, in_axes: Any, n_batch_axes: int) -> LaidOut:
    """The initial state, or those of a batch, as one array. Local.

    Args:
        u0: As the caller of `solve` gives it.
        args: What the field gets; arrays where numbers with a decimal point were.
        in_axes: Axes of `(u0, args)` that count samples, or None.
        n_batch_axes: Leading axes of `u0` that count samples, without `in_axes`.

    Raises:
        ProblemError: if axes and states do not fit together.
        NonFiniteError: if a state holds NaN or infinity.
    """
    if in_axes is None:
        initial, layout = lay_out(u0)
        _check_batch_axes(n_batch_axes, layout.is_tree, initial.ndim)
        return LaidOut(initial, layout, None, n_batch_axes)
    if n_batch_axes:
        raise ProblemError("`in_axes` says what counts samples: leave `n_batch_axes` out.")
    u0, samples = take_samples(in_axes, u0, args)
    layout = samples.layout(lay_out(u0)[1])
    return LaidOut(jax.vmap(layout.join)(u0), layout, samples, 1)


def take_samples(in_axes: Any, u0: PyTree, args: PyTree) -> tuple[PyTree, Samples]:
    """The initial states with the samples in front, and the batch they make. Local.

    Args:
        in_axes: As `jax.vmap` takes it for a function of `(u0, args)`.
        u0: Initial states; without an axis of samples, that of them all.
        args: What the field gets; arrays where numbers with a decimal point were.

    Raises:
        ProblemError: with the leaf that has no such axis, or another number of samples.
    """
    if isinstance(in_axes, (int, np.integer)) and not isinstance(in_axes, bool):
        in_axes = (in_axes, in_axes)
    if not isinstance(in_axes, (tuple, list)) or len(in_axes) != 2:
        raise ProblemError(
            f"`in_axes` is {in_axes!r}; expected axes of `(u0, args)` as `jax.vmap` takes them, "
            "such as (0, None) where all samples share `args`."
        )
    if isinstance(u0, (list, tuple)) and u0 and all(np.isscalar(entry) for entry in u0):
        u0 = np.asarray(u0)
    of_u0, of_args = _spread(in_axes[0], u0, "u0"), _spread(in_axes[1], args, "args")
    sizes = {**_sizes("u0", u0, of_u0), **_sizes("args", args, of_args)}
    if not sizes:
        raise ProblemError("`in_axes` names no axis: leave it out for a single sample.")
    (name, n), *others = sizes.items()
    for other, size in others:
        if size != n:
            raise ProblemError(
                f"{name} has {n} samples and {other} has {size}: all axes that `in_axes` names "
                "must be equally long."
            )
    if n == 0:
        raise ProblemError(f"{name} has no samples; a batch needs at least one.")

    def in_front(leaf: Any, axis: int | None) -> Array:
        leaf = jnp.asarray(leaf)
        if axis is None:
            return jnp.broadcast_to(leaf, (n, *leaf.shape))
        return jnp.moveaxis(leaf, axis, 0)

    leaves, structure = jax.tree.flatten(u0)
    front = [in_front(leaf, axis) for leaf, axis in zip(leaves, of_u0, strict=True)]
    return jax.tree.unflatten(structure, front), Samples(n, of_args)


def _check_batch_axes(n_batch_axes: int, is_tree: bool, n_axes: int) -> None:
    """Refuse more batch axes than the state has."""
    if n_batch_axes and is_tree:
        raise ProblemError("`n_batch_axes` is for a state that is one array, not for a tree.")
    if n_batch_axes > n_axes:
        raise ProblemError(f"`n_batch_axes` is {n_batch_axes}, but the state has {n_axes} axes.")


def _spread(prefix: Any, tree: PyTree, name: str) -> Axes:
    """An axis for every leaf, None counted as one."""
    like = jax.tree.map(lambda _: 0, tree, is_leaf=is_none)
    try:
        axes = jax.tree.leaves(jax.tree.broadcast(prefix, like, is_leaf=is_none), is_leaf=is_none)
    except ValueError as error:
        raise ProblemError(
            f"`in_axes` does not fit `{name}`: {str(error).splitlines()[0]} Give an axis, None, or "
            f"a tree of them that begins like `{name}`."
        ) from error
    for axis in axes:
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, (int, np.integer))):
            raise ProblemError(f"`in_axes` holds {axis!r} for `{name}`; expected axes or None.")
    return tuple(axis if axis is None else int(axis) for axis in axes)


def _sizes(name: str, tree: PyTree, axes: Axes) -> dict[str, int]:
    """Samples of each leaf that has an axis of them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    found = {}
    for (path, leaf), axis in zip(leaves, axes, strict=True):
        if axis is None or leaf is None:
            continue
        place, shape = f"`{name}{jax.tree_util.keystr(path)}`", np.shape(leaf)
        if isinstance(tree, NoisyArgs):  # as the caller knows them
            place = place.replace("`args.key`", "`noise.paths`").replace("`args.args", "`args")
        if not -len(shape) <= axis < len(shape):
            raise ProblemError(
                f"{place} has shape {shape} and so no axis {axis} of samples: write None for it in "
                "`in_axes` if all samples share it."
            )
        found[place] = shape[axis]
    return found


def _shape_without(leaf: Any, axis: int) -> Any:
    if leaf is None:
        return None
    shape = list(np.shape(leaf))
    del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
