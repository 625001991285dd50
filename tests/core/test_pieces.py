"""Functions of whole arrays on pieces: optax itself on one piece, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nodepint_mpi.core.pieces import MAX_ROWS, Deal, Ranks, UnsupportedError, on_pieces

pytestmark = pytest.mark.mpi(max_size=1)

ALONE = Ranks(1, 0, lambda kind, value: value, lambda value: value)
SHAPES = {"a": (3, 4), "b": (5,), "c": ()}


@pytest.mark.parametrize("size", [0, 1, 5, 7, MAX_ROWS, 2 * MAX_ROWS + 3])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
def test_pieces_make_the_whole_on_any_number_of_ranks(size, n_ranks):
    deal, array = Deal((size,)), jnp.arange(float(size)) + 1
    pieces = [deal.piece(array, n_ranks, rank) for rank in range(n_ranks)]
    assert {piece.shape for piece in pieces} == {(deal.length(n_ranks),)}
    np.testing.assert_array_equal(deal.whole(jnp.stack(pieces)), array)
    np.testing.assert_array_equal(deal.blocks(array, n_ranks), jnp.stack(pieces))
    held = [deal.n_held(n_ranks, rank) for rank in range(n_ranks)]
    assert [int(np.count_nonzero(piece)) for piece in pieces] == held and sum(held) == size
    rows = [deal.rows(n_ranks, rank) for rank in range(n_ranks)]
    assert [row for part in rows for row in part] == list(range(deal.n_rows))
    for rank, part in enumerate(rows):  # rows of a checkpoint are those of the piece
        assert len(part) * deal.width >= held[rank] > (len(part) - 1) * deal.width or not held[rank]


def evaluated(function, *trees):
    """On one piece that is the whole, and as it is."""
    params = jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))
    deals = [Deal(leaf.shape) for leaf in jax.tree.leaves(params)]
    flat = [jax.tree.map(jnp.ravel, tree) for tree in trees]
    leaves = list(range(len(deals)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)
    made = on_pieces(function, shapes, leaves * len(trees), deals, lambda results: leaves)
    return made(ALONE, *flat), function(*trees)


def test_numbers_of_all_elements_are_the_same():
    """Norms, largest elements, choices and nested functions, each with the elements of a leaf."""

    def function(g, p):
        norm = optax.tree.norm(g)
        largest = jnp.max(jnp.abs(g["a"]))
        chosen = jax.lax.cond(norm > 1, lambda x: x / jnp.sum(x), jnp.zeros_like, g["b"])
        positive = jnp.all(p["b"] < 9).astype(float)
        flat = jax.jit(jnp.ravel)(p["a"]) * jnp.minimum(positive, 1 / largest)
        return {"a": flat.reshape(3, 4) * jnp.sum(p["b"]), "b": chosen, "c": p["c"] * 2}

    keys = jax.random.split(jax.random.key(0), 2)
    g, p = ({name: jax.random.normal(key, shape) for name, shape in SHAPES.items()} for key in keys)
    found, wanted = evaluated(function, g, p)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, np.ravel(other))


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda g: g | {"a": g["a"] / jnp.sum(g["a"], axis=0, keepdims=True)}, "sums along axes"),
        (lambda g: g | {"a": g["a"] @ g["a"].T @ g["a"]}, "not elementwise .transpose"),
        (lambda g: g | {"a": g["a"] + g["b"][0]}, "not elementwise .slice"),
        (lambda g: g | {"b": jnp.flip(g["b"])}, "not elementwise .rev"),
        (lambda g: g | {"b": jnp.full(5, 1.0) * g["c"]}, "from one array to another"),
        (lambda g: g | {"b": g["b"] * g["c"]}, "different arrays"),
        (lambda g: g | {"a": jnp.sort(g["a"])}, "not elementwise .sort"),
        (
            lambda g: g | {"b": jax.lax.scan(lambda c, x: (c, x + c), 0.0, g["b"])[1]},
            "not elementwise .scan",
        ),
    ],
)
def test_what_cannot_be_done_on_pieces_is_refused(function, message):
    trees = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    with pytest.raises(UnsupportedError, match=message):
        evaluated(function, trees)
