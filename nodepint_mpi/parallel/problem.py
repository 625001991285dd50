"""The initial-value problem a user states, checked and brought to the form the solver works on.

The state becomes one array; trees are joined leaf by leaf. Whatever does not fit together is
refused here, before anything runs, by its place in the tree.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from nodepint_mpi.core.terms import as_function
from nodepint_mpi.errors import NonFiniteError, ProblemError
from nodepint_mpi.parallel.programs import SameCode
from nodepint_mpi.parallel.same_arguments import value_of

_LEAF = jax.tree.structure(0)


@dataclass(frozen=True)
class StateLayout:
    """How a state of the user is one array: as it is, or the leaves of a tree one after another.

    All leaves have one floating-point type.
    """

    structure: Any
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: Any

    @property
    def is_tree(self) -> bool:
        """Whether there is anything to join. Local."""
        return self.structure != _LEAF

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array. Local."""
        return (sum(map(math.prod, self.shapes)),) if self.is_tree else self.shapes[0]

    def join(self, tree: PyTree, dtype: Any = None) -> Array:
        """One state as one array, of its own type or another. Local."""
        dtype = self.dtype if dtype is None else dtype
        leaves = [jnp.asarray(leaf, dtype) for leaf in jax.tree.leaves(tree)]
        if not self.is_tree:
            return leaves[0]
        return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])

    def split(self, state: Array) -> PyTree:
        """The user's state from the array. Local."""
        if not self.is_tree:
            return state
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1].tolist()
        parts = jnp.split(state, ends)
        leaves = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)


@dataclass(frozen=True)
class ArrayField:
    """A field of the user's states as a field of arrays of one type."""

    field: SameCode
    layout: StateLayout

    def __call__(self, t: Array, u: Array, args: PyTree) -> Array:
        # In the type of u, which is not the state's where tangents are taken in another.
        return self.layout.join(self.field(t, self.layout.split(u), args), u.dtype)


def lay_out(u0: PyTree) -> tuple[Array, StateLayout]:
    """The initial state as one array, and the layout of it. Local.

    Whole numbers become floating-point numbers of the type of the other leaves, or of JAX's
    default where there is none. Python's numbers have no type of their own.

    Raises:
        ProblemError: if it is empty, or holds anything but real numbers of one type.
        NonFiniteError: if it holds NaN or infinity; in a trace that cannot be seen.
    """
    if isinstance(u0, (list, tuple)) and u0 and all(np.isscalar(entry) for entry in u0):
        u0 = np.asarray(u0)
    flat, structure = jax.tree_util.tree_flatten_with_path(u0)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in flat)
    names = [f"`u0{path}`" for path in paths]
    leaves = [_as_numbers(leaf, name) for name, (_, leaf) in zip(names, flat, strict=True)]
    if sum(math.prod(leaf.shape) for leaf in leaves) == 0:
        raise ProblemError("`u0` is empty; the state needs at least one number.")
    layout = StateLayout(
        structure, paths, tuple(leaf.shape for leaf in leaves), _one_type(names, leaves)
    )
    for name, leaf in zip(names, leaves, strict=True):
        _require_finite(leaf.value, name, "")
    return layout.join(u0), layout


def lay_out_guess(
    guess: PyTree, layout: StateLayout, n_edges: int, n_samples: int | None = None
) -> Array:
    """A guess of the interface as one array, (edges, *state). Local.

    With `n_samples` it is (edges, samples, *state), for the layout of one sample.

    Raises:
        ProblemError: if it is not one state for each slice boundary.
        NonFiniteError: if it holds NaN or infinity; in a trace that cannot be seen.
    """
    if not layout.is_tree and not isinstance(guess, jax.Array):
        try:
            guess = jnp.asarray(guess)
        except (TypeError, ValueError) as error:
            raise ProblemError(f"`guess` is not an array of numbers: {error}") from error
    if jax.tree.structure(guess) != layout.structure:
        raise ProblemError(
            f"`guess` has the structure {jax.tree.structure(guess)}; it needs that of the state, "
            f"{layout.structure}, with one more leading axis: one state per slice boundary."
        )
    leaves = jax.tree.leaves(guess)
    lead = (n_edges,) if n_samples is None else (n_edges, n_samples)
    each = "one state" if n_samples is None else "one state of each sample"
    for path, leaf, shape in zip(layout.paths, leaves, layout.shapes, strict=True):
        name = f"`guess{path}`"
        given = _as_numbers(leaf, name).shape
        if given != (*lead, *shape):
            raise ProblemError(
                f"{name} has shape {given}; it needs {each} per slice boundary, {(*lead, *shape)}."
            )
        _require_finite(leaf, name, " Leave it out or repair it.")
    leaves = [jnp.asarray(leaf, layout.dtype) for leaf in leaves]
    if not layout.is_tree:
        return leaves[0]
    return jnp.concatenate([leaf.reshape(*lead, -1) for leaf in leaves], axis=-1)


def as_field(field: Any, layout: StateLayout, name: str = "field") -> ArrayField:
    """A user's function, or what a term of diffrax says du/dt is, as a field of arrays. Local.

    Raises:
        ProblemError: if it is neither, or a term of more than one time.
    """
    field = as_function(field)
    if not callable(field):
        raise ProblemError(
            f"`{name}` is a {type(field).__name__}; expected a function `f(t, u, args)` or a "
            "`diffrax.ODETerm` of one."
        )
    return ArrayField(SameCode(field), layout)


def check_field(field: ArrayField, t0: float, args: PyTree, name: str = "field") -> None:
    """Call a field once on shapes: it must return what the state is made of. Local.

    Raises:
        ProblemError: with the first leaf of another structure, shape or type; or where the code of
            the field depends on the value of a number.
    """
    layout = field.layout
    who = "The field" if name == "field" else f"The field of `{name}`"

    def slopes(t, state, args):
        return field.field(t, layout.split(state), args)

    try:
        slope = eqx.filter_eval_shape(
            slopes,
            jnp.asarray(t0, layout.dtype),
            jax.ShapeDtypeStruct(layout.shape, layout.dtype),
            args,
        )
    except jax.errors.ConcretizationTypeError as error:
        raise ProblemError(
            f"{who} needs the value of an array while it is compiled: "
            f"{str(error).splitlines()[0]} Numbers with a decimal point in `args` are arrays "
            "there. Use `jnp.where` or `jax.lax.cond`, or pass what the code depends on as a "
            "whole number, a boolean or a text."
        ) from error
    given = jax.tree.structure(slope)
    if given != layout.structure:
        if layout.is_tree or given == _LEAF:
            what = f"the structure {given} for a state of structure {layout.structure}"
        else:
            what = f"a {type(slope).__name__} for a state of shape {layout.shapes[0]}"
        raise ProblemError(f"{who} returned {what}; du/dt must have the structure of u.")
    for path, leaf, wanted in zip(layout.paths, jax.tree.leaves(slope), layout.shapes, strict=True):
        _check_slope(f"{who} returned", layout, path, leaf, wanted)


def floats_as_arrays(args: PyTree) -> PyTree:
    """`args` with arrays for NumPy arrays and floating-point numbers. Local.

    Whole numbers, booleans and texts stay as they are: code may depend on them.

    Raises:
        ProblemError: for an array of anything but numbers.
    """

    def convert(path, leaf):
        if isinstance(leaf, np.ndarray) or (isinstance(leaf, (float, complex, np.inexact))):
            try:
                return jnp.asarray(leaf)
            except TypeError as error:
                name = f"`args{jax.tree_util.keystr(path)}`"
                kind = getattr(leaf, "dtype", type(leaf).__name__)
                raise ProblemError(
                    f"{name} is an array of type {kind}; expected numbers."
                ) from error
        return leaf

    return jax.tree_util.tree_map_with_path(convert, args)


class _Leaf(NamedTuple):
    """A leaf of real numbers; `dtype` is None if it takes that of others."""

    value: Any
    shape: tuple[int, ...]
    dtype: Any


def _as_numbers(value: Any, name: str) -> _Leaf:
    """A leaf, or a complaint that names it."""
    array = value
    if not isinstance(value, jax.Array):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ProblemError(f"{name} is not an array of numbers: {error}.") from error
    dtype = array.dtype
    if jnp.issubdtype(dtype, np.complexfloating):
        raise ProblemError(f"{name} is complex; solve for its real and imaginary parts instead.")
    floating = jnp.issubdtype(dtype, np.floating)
    if not floating and not jnp.issubdtype(dtype, np.integer):
        raise ProblemError(f"{name} is of type {dtype}; expected real numbers.")
    if floating and dtype.itemsize < 4:
        raise ProblemError(
            f"{name} is of type {dtype}, which MPI cannot send; use float32 or float64."
        )
    has_own = floating and type(value) is not float and not getattr(value, "weak_type", False)
    own = jax.dtypes.canonicalize_dtype(dtype) if has_own else None
    return _Leaf(value, array.shape, own)


def _one_type(names: list[str], leaves: list[_Leaf]) -> Any:
    """The floating-point type that all leaves have or take."""
    typed = [(name, leaf.dtype) for name, leaf in zip(names, leaves, strict=True) if leaf.dtype]
    if not typed:
        return jax.dtypes.canonicalize_dtype(float)
    first, dtype = typed[0]
    for name, other in typed[1:]:
        if other != dtype:
            raise ProblemError(
                f"{first} is {dtype} and {name} is {other}; a state needs one type, the more "
                "precise one as a rule: cast with `.astype`."
            )
    return dtype


def _require_finite(value: Any, name: str, advice: str) -> None:
    value = value_of(value)
    if not isinstance(value, Tracer) and not np.all(np.isfinite(np.asarray(value))):
        raise NonFiniteError(f"{name} holds NaN or infinity.{advice}")


def _check_slope(who: str, layout: StateLayout, path: str, slope: Any, wanted: tuple) -> None:
    """One leaf of du/dt has the shape of u and its type; whole numbers may be converted."""
    where = f" at `u{path}`" if layout.is_tree else ""
    given, dtype = np.shape(slope), np.result_type(getattr(slope, "dtype", type(slope)))
    if given != wanted:
        raise ProblemError(
            f"{who} shape {given} for a state of shape {wanted}{where}; du/dt must have the shape "
            "of u."
        )
    if jnp.issubdtype(dtype, np.complexfloating):
        raise ProblemError(f"{who} complex numbers for a real state{where}.")
    whole = jnp.issubdtype(dtype, np.integer)
    floating = jnp.issubdtype(dtype, np.floating)
    untyped = floating and (type(slope) is float or getattr(slope, "weak_type", False))
    if not (whole or untyped or dtype == layout.dtype):
        raise ProblemError(
            f"{who} {dtype} for a state of {layout.dtype}{where}; du/dt must have the type of u. "
            f"Cast the initial state or the numbers in `args`, or the result: `.astype(u.dtype)`."
        )
