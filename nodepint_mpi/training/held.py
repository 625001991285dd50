"""What ranks hold of an optimizer's state, and what a checkpoint has of it."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nodepint_mpi.core.pieces import Deal, match_leaves
from nodepint_mpi.io.checkpoint_rows import Rows
from nodepint_mpi.io.leaves import LeafSpec, describe_leaves
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.training.train_state import TrainState

Way = Literal["sharded", "first", "every"]
"""Which ranks hold arrays like parameters: each its pieces, the first all, or every rank all."""


class Held:
    """Whose arrays like parameters are in an optimizer's state, by the way of an update.

    Args:
        comm: The grid. Local to make.
        params: Shapes of the parameters.
        opt_state: Shapes of the optimizer's whole state.
        way: Who holds what.
    """

    def __init__(self, comm: TimeComm, params: PyTree, opt_state: PyTree, way: Way):
        self._comm, self._params, self._state, self._way = comm, params, opt_state, way
        self._deals = [Deal(tuple(leaf.shape)) for leaf in jax.tree.leaves(params)]
        self._leaves = match_leaves(params, opt_state)

    def cut(self, opt_state: PyTree) -> PyTree:
        """This rank's part of an optimizer's whole state. Local."""
        return each_leaf(opt_state, self._leaves, self.cut_leaf)

    def like(self) -> dict[str, PyTree]:
        """Shapes of what all ranks hold whole, as a checkpoint has it. Local."""
        return {"params": self._params, "opt_state": self.common(self._state)}

    def kept(self, state: TrainState) -> tuple[dict[str, PyTree], dict[str, Rows]]:
        """What a checkpoint holds: what rank 0 has whole, and rows of what is dealt. Local."""
        rows = {}
        for name, leaf, value in self._named(state.opt_state):
            deal, own = self._deals[leaf], self._own_rows(leaf)
            block = np.zeros((len(own), deal.width), value.dtype)
            held = np.ravel(jax.device_get(value))[: max(0, deal.size - own.start * deal.width)]
            block.reshape(-1)[: held.size] = held[: block.size]
            rows[name] = Rows(block, own.start, deal.n_rows)
        return {"params": state.params, "opt_state": self.common(state.opt_state)}, rows

    def row_specs(self) -> dict[str, tuple[LeafSpec, range]]:
        """Shapes of the arrays that are dealt, whole, and the rows that this rank reads. Local."""
        return {
            name: (
                LeafSpec((self._deals[leaf].n_rows, self._deals[leaf].width), np.dtype(like.dtype)),
                range(self._deals[leaf].n_rows) if self._way == "every" else self._own_rows(leaf),
            )
            for name, leaf, like in self._named(self._state)
        }

    def restored(self, kept: dict[str, PyTree], rows: dict[str, np.ndarray]) -> TrainState:
        """The state that `kept` gave, on this grid. Local."""
        common = iter(jax.tree.leaves(kept["opt_state"]))
        blocks = (self._from_rows(leaf, rows[name]) for name, leaf, _ in self._named(self._state))
        flat = [jnp.asarray(next(common if leaf is None else blocks)) for leaf in self._leaves]
        opt_state = jax.tree.unflatten(jax.tree.structure(self._state), flat)
        return TrainState(jax.tree.map(jnp.asarray, kept["params"]), opt_state)

    def cut_leaf(self, leaf: int | None, value: Array) -> Array:
        """This rank's part of an array like the parameter of this number. Local."""
        if leaf is None or self._way == "every":
            return value
        if self._way == "sharded":
            return self._deals[leaf].piece(value, self._comm.n_grid, self._comm.grid_rank)
        return value if self._comm.grid_rank == 0 else jnp.zeros(0, value.dtype)

    def _from_rows(self, leaf: int, rows: np.ndarray) -> np.ndarray:
        deal, flat = self._deals[leaf], np.ravel(rows)
        if self._way == "sharded":
            return np.pad(flat, (0, deal.length(self._comm.n_grid) - flat.size))
        whole = self._way == "every" or self._comm.grid_rank == 0
        return flat[: deal.size].reshape(deal.shape) if whole else flat

    def _own_rows(self, leaf: int) -> range:
        deal = self._deals[leaf]
        if self._way == "sharded":
            return deal.rows(self._comm.n_grid, self._comm.grid_rank)
        return range(deal.n_rows) if self._comm.grid_rank == 0 else range(deal.n_rows, deal.n_rows)

    def common(self, opt_state: PyTree) -> PyTree:
        """The state without what is dealt. Local."""
        return each_leaf(opt_state, self._leaves, lambda n, x: x if n is None else None)

    def _named(self, opt_state: PyTree) -> list[tuple[str, int, Any]]:
        """Name, number of the leaf, and value of what is dealt."""
        names, values = describe_leaves({"opt_state": self._state}), jax.tree.leaves(opt_state)
        listed = zip(names, self._leaves, values, strict=True)
        return [(name, leaf, value) for name, leaf, value in listed if leaf is not None]


def each_leaf(tree: PyTree, leaves: Iterable[Any], function: Callable[..., Any]) -> PyTree:
    """A function of the number of the parameter and of the value, for each leaf. Local."""
    values, structure = jax.tree.flatten(tree)
    new = [function(*one) for one in zip(leaves, values, strict=True)]
    return jax.tree.unflatten(structure, new)
