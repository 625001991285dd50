"""Arrays dealt over ranks in equal pieces, and functions of whole arrays evaluated on them.

What an optimizer does is mostly elementwise, with a few sums over all elements: norms that clip a
gradient, or scale the step of a layer. `on_pieces` takes a function of trees of whole arrays,
written without a thought of ranks, and evaluates it where every rank holds a piece of each array.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array, PyTree

MAX_ROWS = 2**14
"""Maximum number of rows of an array; each has a checksum in a checkpoint."""


class UnsupportedError(Exception):
    """What a function does with whole arrays cannot be done on pieces."""


class Deal(NamedTuple):
    """How an array of `shape` is dealt: flat, in `n_rows` rows of `width` elements.

    Every one of P ranks has ceil(n_rows / P) of them, filled up with zeros at the end.
    """

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the array."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Elements of a row; the same for any number of ranks."""
        return max(1, -(-self.size // MAX_ROWS))

    @property
    def n_rows(self) -> int:
        """Rows of the array, the last one filled up with zeros."""
        return -(-self.size // self.width)

    def rows(self, n_ranks: int, rank: int) -> range:
        """The rows of one rank: possibly none."""
        share = -(-self.n_rows // n_ranks)
        return range(min(rank * share, self.n_rows), min((rank + 1) * share, self.n_rows))

    def length(self, n_ranks: int) -> int:
        """Elements of a piece, with what it is filled up with."""
        return -(-self.n_rows // n_ranks) * self.width

    def n_held(self, n_ranks: int, rank: int) -> int:
        """Elements of the array in the piece of one rank."""
        length = self.length(n_ranks)
        return min(max(self.size - rank * length, 0), length)

    def blocks(self, array: Array, n_ranks: int) -> Array:
        """The pieces of all ranks, (ranks, length)."""
        length = self.length(n_ranks)
        flat = jnp.ravel(array)
        return jnp.pad(flat, (0, n_ranks * length - flat.size)).reshape(n_ranks, length)

    def piece(self, array: Array, n_ranks: int, rank: int) -> Array:
        """The piece of one rank, (length,)."""
        length, n_held = self.length(n_ranks), self.n_held(n_ranks, rank)
        start = min(rank * length, self.size)
        return jnp.pad(jnp.ravel(array)[start : start + n_held], (0, length - n_held))

    def whole(self, blocks: Array) -> Array:
        """The array that all pieces make, (ranks, length)."""
        return jnp.ravel(blocks)[: self.size].reshape(self.shape)


class Ranks(NamedTuple):
    """Where a rank stands among those that hold pieces, and how they add up what they hold.

    `total` takes "sum", "max" or "min" and a number of this rank, and returns that of all, the same
    bits on all; `first` returns the number of rank 0.
    """

    size: int
    rank: int
    total: Callable[[str, Array], Array]
    first: Callable[[Array], Array]


class _Piece(NamedTuple):
    """A rank's part of an array made from the leaf of this number, flat; the array's shape."""

    leaf: int
    shape: tuple[int, ...]
    values: Array


_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp conj "
    "convert_element_type copy copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not "
    "optimization_barrier or pow real reduce_precision rem round rsqrt select_n sign sin sinh sqrt "
    "square stop_gradient sub tan tanh xor".split()
)
_TOTALS = {
    "reduce_sum": ("sum", jnp.sum), "reduce_max": ("max", jnp.max), "reduce_min": ("min", jnp.min),
    "reduce_and": ("min", jnp.all), "reduce_or": ("max", jnp.any),
}  # fmt: skip
_INLINED = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "remat2": "jaxpr", "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr",
}  # fmt: skip


def match_leaves(params: PyTree, tree: PyTree) -> list[int | None]:
    """For each array of a tree, the number of the parameter that it belongs to. Local.

    It does if the parameter's path ends its own, as in optax's moments, and has its shape.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    known = {path: (number, leaf.shape) for number, (path, leaf) in enumerate(paths)}

    def number(path: tuple[Any, ...], leaf: Any) -> int | None:
        for start in range(len(path)):
            leaf_number, shape = known.get(path[start:], (None, None))
            if leaf_number is not None and shape == leaf.shape:
                return leaf_number
        return None

    return [number(tuple(path), leaf) for path, leaf in found]


class OnPieces(NamedTuple):
    """A function of whole arrays, to be evaluated on pieces; made by `on_pieces`."""

    jaxpr: Any
    leaves: tuple[int | None, ...]
    results: tuple[int | None, ...]
    deals: tuple[Deal, ...]
    structure: Any

    def __call__(self, ranks: Ranks, *arguments: Any) -> Any:
        """What the function returns, of its arguments with pieces in the place of arrays.

        To be traced on all ranks alike: it has messages where the function sums up whole arrays.
        """
        flat = jax.tree.leaves(arguments)
        given = [
            value if leaf is None else _Piece(leaf, self.deals[leaf].shape, value)
            for leaf, value in zip(self.leaves, flat, strict=True)
        ]
        found = _Evaluation(ranks, self.deals).evaluate(
            self.jaxpr.jaxpr, self.jaxpr.consts, given, self.results
        )
        return jax.tree.unflatten(self.structure, [_values(one) for one in found])


def on_pieces(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    leaves: Sequence[int | None],
    deals: Sequence[Deal],
    results: Callable[[Any], Sequence[int | None]],
) -> OnPieces:
    """Make a function that does on pieces what another one does on whole arrays. Local.

    Args:
        function: Of trees of arrays.
        arguments: Their shapes.
        leaves: For each array in all arguments, in order, the number of the leaf whose pieces are
            given in its place; None where it is given as it is, the same on all ranks.
        deals: How the leaves are dealt.
        results: The same of what the function returns.

    Raises:
        UnsupportedError: if it does more than elementwise work and reductions of whole arrays, or
            mixes elements of different leaves; the message says what.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    wanted = tuple(results(shapes))
    made = OnPieces(jaxpr, tuple(leaves), wanted, tuple(deals), jax.tree.structure(shapes))

    def pieces(leaf: int | None, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return (
            shape if leaf is None else jax.ShapeDtypeStruct((deals[leaf].length(2),), shape.dtype)
        )

    alone = Ranks(2, 0, lambda kind, value: value, lambda value: value)
    flat = [pieces(*one) for one in zip(leaves, jax.tree.leaves(arguments), strict=True)]
    tree = jax.tree.unflatten(jax.tree.structure(tuple(arguments)), flat)
    jax.eval_shape(lambda tree: made(alone, *tree), tree)
    return made


class _Evaluation:
    """Walks through the equations of a function, on one rank."""

    def __init__(self, ranks: Ranks, deals: Sequence[Deal]):
        self._ranks, self._deals = ranks, deals

    def evaluate(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        given: Sequence[Any],
        wanted: Sequence[int | None] | None = None,
    ) -> list[Any]:
        """The results, each a `_Piece` or what all ranks have alike: as `wanted`, if it is said."""
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known |= zip(jaxpr.invars, given, strict=True)

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, jex.Literal) else known[variable]

        for equation in jaxpr.eqns:
            found = self._equation(equation, [read(one) for one in equation.invars])
            known |= zip(equation.outvars, found, strict=True)
        results = [read(one) for one in jaxpr.outvars]
        if wanted is None:
            return results
        return [self._as(leaf, one) for leaf, one in zip(wanted, results, strict=True)]

    def _as(self, leaf: int | None, value: Any) -> Any:
        """A value as the piece of a leaf, or as what all ranks have."""
        if isinstance(value, _Piece):
            if value.leaf != leaf or value.shape != self._deals[value.leaf].shape:
                raise UnsupportedError("it moves elements from one array to another")
            return value
        return value if leaf is None else self._cut(leaf, value)

    def _cut(self, leaf: int, value: Any) -> _Piece:
        """A rank's part of what all ranks have whole."""
        deal = self._deals[leaf]
        if np.size(value) != deal.size:
            raise UnsupportedError("it moves elements from one array to another")
        piece = deal.piece(jnp.asarray(value), self._ranks.size, self._ranks.rank)
        return _Piece(leaf, np.shape(value), piece)

    def _equation(self, equation: Any, given: list[Any]) -> list[Any]:
        name, primitive = equation.primitive.name, equation.primitive
        pieces = [one for one in given if isinstance(one, _Piece)]
        if name in _INLINED:
            inner = equation.params[_INLINED[name]]
            inner, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            return self.evaluate(inner, consts, given)
        if not pieces:
            bound = primitive.bind(*given, **equation.params)
            return list(bound) if primitive.multiple_results else [bound]
        if name == "cond":
            return self._branches(equation, given)
        if len({one.leaf for one in pieces}) > 1:
            raise UnsupportedError(f"it mixes elements of different arrays ({name})")
        if name in _TOTALS:
            return [self._total(equation, *given)]
        leaf, shape = pieces[0].leaf, pieces[0].shape
        if name in ("reshape", "squeeze", "expand_dims", "ravel"):
            return [_Piece(leaf, equation.outvars[0].aval.shape, pieces[0].values)]
        if name == "broadcast_in_dim" and equation.params["shape"] == shape:
            return [pieces[0]]
        if name not in _ELEMENTWISE or {one.shape for one in pieces} != {shape}:
            raise UnsupportedError(f"it is not elementwise ({name})")
        values = [self._operand(one, leaf, shape) for one in given]
        bound = primitive.bind(*values, **equation.params)
        bound = list(bound) if primitive.multiple_results else [bound]
        return [_Piece(leaf, shape, one) for one in bound]

    def _operand(self, value: Any, leaf: int, shape: tuple[int, ...]) -> Any:
        """A piece, a number, or the piece of a whole array."""
        if isinstance(value, _Piece):
            return value.values
        return value if np.shape(value) == () and shape != () else self._cut(leaf, value).values

    def _total(self, equation: Any, piece: _Piece) -> Array:
        """A reduction of a whole array."""
        if len(equation.params["axes"]) != len(piece.shape):
            raise UnsupportedError(f"it needs sums along axes ({equation.primitive.name})")
        (kind, reduce), ranks = _TOTALS[equation.primitive.name], self._ranks
        held = self._deals[piece.leaf].n_held(ranks.size, ranks.rank)
        values = piece.values
        if held < values.size:
            neutral = _neutral(equation.primitive.name, values.dtype)
            values = jnp.where(jnp.arange(values.size) < held, values, neutral)
        found = reduce(values)
        if found.dtype == bool:
            return ranks.total(kind, found.astype(jnp.int32)) > 0
        return ranks.total(kind, found)

    def _branches(self, equation: Any, given: list[Any]) -> list[Any]:
        """A choice, which is rank 0's: there may be messages in a branch."""
        index, *operands = given
        if isinstance(index, _Piece):
            raise UnsupportedError("it chooses by elements (cond)")
        branches = [(one.jaxpr, one.consts) for one in equation.params["branches"]]
        kinds = [(one.leaf, one.shape) if isinstance(one, _Piece) else None for one in operands]
        flat = [_values(one) for one in operands]

        def typed(values: Sequence[Any]) -> list[Any]:
            return [
                value if kind is None else _Piece(*kind, value)
                for kind, value in zip(kinds, values, strict=True)
            ]

        found: list[list[tuple[int, tuple[int, ...]] | None]] = []
        for jaxpr, consts in branches:

            def look(values: Sequence[Any], jaxpr: Any = jaxpr, consts: Any = consts) -> list[Any]:
                results = self.evaluate(jaxpr, consts, typed(values))
                found.append([
                    (one.leaf, one.shape) if isinstance(one, _Piece) else None for one in results
                ])  # fmt: skip
                return [_values(one) for one in results]

            jax.eval_shape(look, flat)
        labels = [
            next((one for one in each if one is not None), None)
            for each in zip(*found, strict=True)
        ]
        if any(
            one not in (None, label)
            for each in found
            for one, label in zip(each, labels, strict=True)
        ):
            raise UnsupportedError("it moves elements from one array to another (cond)")

        def run(jaxpr: Any, consts: Any) -> Callable[[Sequence[Any]], list[Any]]:
            def branch(values: Sequence[Any]) -> list[Any]:
                results = self.evaluate(jaxpr, consts, typed(values))
                return [
                    jnp.asarray(_values(one if label is None or isinstance(one, _Piece)
                                        else self._cut(label[0], one)))
                    for label, one in zip(labels, results, strict=True)
                ]  # fmt: skip

            return branch

        chosen = self._ranks.first(jnp.asarray(index))
        results = jax.lax.switch(chosen, [run(*one) for one in branches], flat)
        return [
            one if label is None else _Piece(label[0], label[1], one)
            for label, one in zip(labels, results, strict=True)
        ]


def _neutral(name: str, dtype: Any) -> Any:
    """What changes no reduction."""
    if name in ("reduce_and", "reduce_or", "reduce_sum"):
        return name == "reduce_and" if dtype == np.bool_ else np.zeros((), dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return limits.min if name == "reduce_max" else limits.max
    return -jnp.inf if name == "reduce_max" else jnp.inf


def _values(one: Any) -> Any:
    return one.values if isinstance(one, _Piece) else one
