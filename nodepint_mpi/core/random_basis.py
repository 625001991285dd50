"""Random directions in the space of parameters, and the projection of a gradient on them.

With directions v[1], ..., v[d] the gradient g of D parameters is replaced by

    s * sum_j <g, v[j]> v[j] / |v[j]|^2,    s = 1 or D / d,

that is, by its coefficients along unit vectors; with s = D / d its mean over draws is g. Number i
of direction j depends on the seed, the step, j and i alone: any rank can draw any part of any
direction, so that ranks which want whole directions exchange d coefficients. Directions are drawn
some at a time: there never is an array of D x d numbers. Those of the kind "hadamard" are rows of
a Hadamard matrix, drawn without replacement, with signs of the columns drawn at random; all
products with them are one transform, of D log2(D) operations whatever d is.

References:
    Gressmann, Eaton-Rosen, Luschi (2020), Improving neural network training in low dimensional
    random bases, NeurIPS 33, equations (1) and (2).
    Ailon, Chazelle (2009), The fast Johnson-Lindenstrauss transform, SIAM J. Computing 39, 302-322.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int, UInt32

from nodepint_mpi.core.hadamard import signs_of, transform

Kind = Literal["signs", "normal", "hadamard"]
"""Numbers of a direction: +1 or -1 with equal probability, normally distributed ones, or those of a
row of a Hadamard matrix whose columns have random signs."""

CHUNK = 2**20
"""Numbers of directions that are held at once; at least one direction."""
_TAG = 0x52424153
_BITS = 32


class RandomBasis(NamedTuple):
    """Which directions a step takes: `n_directions` of them, the same on any number of ranks.

    They are drawn anew in each step, or with `redraw=False` once; `unbiased` is the factor D / d.
    """

    n_directions: int
    seed: int = 0
    redraw: bool = True
    kind: Kind = "hadamard"
    unbiased: bool = False


class Segment(NamedTuple):
    """Numbers `start`, ..., `start + length - 1` of all parameters in a row."""

    start: int
    length: int


class Coefficients(NamedTuple):
    """<g, v[j]> and |v[j]|^2 of each direction, or a rank's part of these sums."""

    products: Float[Array, " directions"]
    squares: Float[Array, " directions"]


def direction_keys(
    basis: RandomBasis, step: Int[Array, ""], indices: Int[Array, " n"]
) -> UInt32[Array, "n words"]:
    """Keys of the directions with these indices in a step, of two words or three. Local.

    For the kind "hadamard" they are the key of all columns, and a row for each direction: rows
    a j + b with an odd a differ for all j below the size of the matrix, a power of two.
    """
    key = jax.random.fold_in(jax.random.key(basis.seed, impl="threefry2x32"), _TAG)
    if basis.redraw:
        key = jax.random.fold_in(key, step)
    if basis.kind == "hadamard":
        factor, offset = jax.random.key_data(jax.random.fold_in(key, 0))
        rows = (factor | jnp.uint32(1)) * indices.astype(jnp.uint32) + offset
        of_columns = jax.random.key_data(jax.random.fold_in(key, 1))
        shared = jnp.broadcast_to(of_columns[None], (len(indices), 2))
        return jnp.concatenate([shared, rows[:, None]], axis=1)
    return jax.vmap(lambda index: jax.random.key_data(jax.random.fold_in(key, index)))(indices)


def draw(
    kind: Kind, keys: UInt32[Array, "n words"], segments: Sequence[Segment], dtype: Any
) -> Float[Array, "n numbers"]:
    """The numbers of directions in segments of the parameters, one after the other. Local."""
    parts = [_DRAWN[kind](keys, segment, jnp.dtype(dtype)) for segment in segments]
    return jnp.concatenate(parts, axis=1) if parts else jnp.zeros((len(keys), 0), dtype)


def find_coefficients(
    basis: RandomBasis,
    step: Int[Array, ""],
    gradient: Float[Array, " numbers"],
    segments: Sequence[Segment],
    *,
    own: range | None = None,
) -> Coefficients:
    """What these numbers of a gradient add to the coefficients. Local, inside jit.

    Args:
        basis: The directions.
        step: The optimizer step, traced.
        gradient: The numbers in `segments`, one after the other.
        segments: Where they stand among all parameters.
        own: Indices of the directions to take; all unless given. Others get zeros.
    """
    own = range(basis.n_directions) if own is None else own
    if basis.kind == "hadamard":
        return _transformed(basis, step, gradient, segments, own)

    def of_chunk(keys: Array) -> Coefficients:
        directions = draw(basis.kind, keys, segments, gradient.dtype)
        return Coefficients(directions @ gradient, jnp.sum(directions**2, axis=1))

    width = chunk_width(len(own), gradient.size)
    return place_coefficients(basis, own, of_chunk, step, width=width)


def place_coefficients(
    basis: RandomBasis,
    own: range,
    of_chunk: Callable[[Array], Coefficients],
    step: Int[Array, ""],
    *,
    width: int,
    over_rows: Callable[..., Coefficients] = jax.lax.map,
) -> Coefficients:
    """Coefficients of the directions `own`, found chunk by chunk; zeros elsewhere.

    Local, if `of_chunk` is.

    Args:
        basis: The directions.
        own: Indices of those to take.
        of_chunk: From keys (n, words) to the coefficients of these directions.
        step: The optimizer step, traced.
        width: Directions of a chunk.
        over_rows: Applies a function to rows, as `jax.lax.map`.
    """
    if not len(own):
        keys = jax.eval_shape(lambda: direction_keys(basis, step, jnp.arange(1)))
        like = jax.eval_shape(of_chunk, keys)
        return jax.tree.map(lambda x: jnp.zeros(basis.n_directions, x.dtype), like)

    def of_row(indices: Array) -> Coefficients:
        return of_chunk(direction_keys(basis, step, indices))

    found = over_rows(of_row, _chunks(own, width))

    def placed(values: Array) -> Array:
        values = jnp.ravel(values)[: len(own)]
        return jnp.pad(values, (own.start, basis.n_directions - own.stop))

    return jax.tree.map(placed, found)


def combine(
    basis: RandomBasis,
    step: Int[Array, ""],
    coefficients: Coefficients,
    segments: Sequence[Segment],
    *,
    n_parameters: int,
) -> Float[Array, " numbers"]:
    """The projected gradient in segments of the parameters, from whole sums. Local, inside jit.

    Args:
        basis: The directions.
        step: The optimizer step, traced.
        coefficients: Of all directions, added up over all parameters.
        segments: Where the numbers stand that are wanted.
        n_parameters: D, for the factor D / d.
    """
    products, squares = coefficients
    weights = products / squares
    if basis.unbiased:
        weights = weights * (n_parameters / basis.n_directions)
    numbers = sum(segment.length for segment in segments)
    if basis.kind == "hadamard":
        return _transformed_back(basis, step, weights, segments)
    every = range(basis.n_directions)
    chunks = _chunks(every, chunk_width(len(every), numbers))
    weights = jnp.pad(weights, (0, chunks.size - len(every))).reshape(chunks.shape)

    def advance(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        indices, weights = row
        keys = direction_keys(basis, step, indices)
        return total + weights @ draw(basis.kind, keys, segments, total.dtype), None

    total = jnp.zeros(numbers, products.dtype)
    return jax.lax.scan(advance, total, (chunks, weights))[0]


def chunk_width(n_directions: int, numbers: int, *, n_chunks: int = 1) -> int:
    """Directions to be held at once, in at least `n_chunks` chunks where there are as many. Local.

    Args:
        n_directions: How many there are.
        numbers: How many numbers are held for each.
        n_chunks: How many chunks there should be.
    """
    return max(1, min(CHUNK // max(1, numbers), -(-n_directions // n_chunks)))


def _chunks(own: range, width: int) -> Int[Array, "chunks width"]:
    """Indices of directions in rows of equal length, the last one filled up."""
    n_chunks = -(-len(own) // width)
    indices = own.start + jnp.arange(n_chunks * width, dtype=jnp.int32)
    return indices.reshape(n_chunks, width)


def _words(keys: Array, first: int, count: int) -> tuple[Array, Array]:
    """Two random words for each of the counters from `first` on, (directions, count)."""
    shape = len(keys), count
    counters = jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(first)
    counters = jnp.broadcast_to(counters[None], shape)
    key0, key1 = (jnp.broadcast_to(keys[:, n, None], shape) for n in (0, 1))
    one, other = threefry2x32_p.bind(key0, key1, jnp.zeros_like(counters), counters)
    return one, other


def _in_segment(values: Array, segment: Segment, per_counter: int) -> Array:
    """What belongs to a segment of what whole counters gave."""
    skipped = segment.start % per_counter
    return values.reshape(len(values), -1)[:, skipped : skipped + segment.length]


def _counters(segment: Segment, per_counter: int) -> tuple[int, int]:
    """The first counter of a segment, and how many there are."""
    first = segment.start // per_counter
    return first, -(-(segment.start + segment.length) // per_counter) - first


def _signs(keys: Array, segment: Segment, dtype: Any) -> Array:
    words = jnp.stack(_words(keys, *_counters(segment, 2 * _BITS)), axis=-1)
    shifts = jnp.arange(_BITS, dtype=jnp.uint32).reshape(1, 1, 1, _BITS)
    bits = (words[..., None] << shifts) & jnp.uint32(1 << (_BITS - 1))
    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.uint32)  # a bit more is -1
    values = jax.lax.bitcast_convert_type(bits | one, jnp.float32)
    return _in_segment(values, segment, 2 * _BITS).astype(dtype)


def _normal(keys: Array, segment: Segment, dtype: Any) -> Array:
    """By Box and Muller, two numbers of two words."""
    radial, angular = (
        (word.astype(dtype) + jnp.asarray(0.5, dtype)) * jnp.asarray(2.0**-_BITS, dtype)
        for word in _words(keys, *_counters(segment, 2))
    )
    radius, angle = jnp.sqrt(-2 * jnp.log(radial)), 2 * jnp.pi * angular
    values = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)
    return _in_segment(values, segment, 2)


def _hadamard(keys: Array, segment: Segment, dtype: Any) -> Array:
    columns = jnp.uint32(segment.start) + jnp.arange(segment.length, dtype=jnp.uint32)
    of_columns = _signs(keys[:1, :2], segment, dtype)
    return of_columns * signs_of(keys[:, 2], columns).astype(dtype)


def _transformed(
    basis: RandomBasis, step: Array, gradient: Array, segments: Sequence[Segment], own: range
) -> Coefficients:
    """Coefficients of rows of a Hadamard matrix, all by one transform."""
    keys = direction_keys(basis, step, jnp.arange(basis.n_directions))
    size = _matrix_size(segments)
    signed = draw("signs", keys[:1, :2], segments, gradient.dtype)[0] * gradient
    columns, taken = jnp.zeros(size, gradient.dtype), 0
    for start, length in segments:
        columns = columns.at[start : start + length].set(signed[taken : taken + length])
        taken += length
    products = transform(columns)[keys[:, 2] & jnp.uint32(size - 1)]
    indices = jnp.arange(basis.n_directions)
    mine = ((indices >= own.start) & (indices < own.stop)).astype(gradient.dtype)
    return Coefficients(products * mine, gradient.size * mine)


def _transformed_back(
    basis: RandomBasis, step: Array, weights: Array, segments: Sequence[Segment]
) -> Array:
    """The sum of rows of a Hadamard matrix with these weights, by one transform."""
    keys = direction_keys(basis, step, jnp.arange(basis.n_directions))
    size = _matrix_size(segments)
    rows = jnp.zeros(size, weights.dtype).at[keys[:, 2] & jnp.uint32(size - 1)].add(weights)
    columns = transform(rows)
    parts = [columns[start : start + length] for start, length in segments]
    return jnp.concatenate(parts) * draw("signs", keys[:1, :2], segments, weights.dtype)[0]


def _matrix_size(segments: Sequence[Segment]) -> int:
    """Of the smallest matrix with these columns: those of larger ones begin as its rows do."""
    end = max((segment.start + segment.length for segment in segments), default=1)
    return 1 << max(0, end - 1).bit_length()


_DRAWN: dict[Kind, Callable[[Array, Segment, Any], Array]] = {
    "signs": _signs, "normal": _normal, "hadamard": _hadamard,
}  # fmt: skip
