"""The optimizer's step: a program of its own, whose work and memory are dealt over the ranks.

Every number of the new parameters is computed on one rank and sent to the others, so that all hold
the same bits by construction, whatever their compilers made of the program. There are two ways:

- sharded: a reduce-scatter of the gradient, an update of 1/P of the parameters with 1/P of the
  moments, an all-gather. Any optimizer that is elementwise but for sums over whole arrays.
- on the first rank: a sum of the gradient there, the update, a broadcast. For what needs more, such
  as factored moments, and for networks so small that what counts is the number of messages.

Reference:
    Rajbhandari, Rasley, Ruwase, He (2020), ZeRO, SC20, section 5 (stages 1 and 2).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from nodepint_mpi.core.pieces import (
    Deal,
    OnPieces,
    Ranks,
    UnsupportedError,
    match_leaves,
    on_pieces,
)
from nodepint_mpi.core.scopes import UPDATE
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.io.checkpoint_rows import Rows
from nodepint_mpi.io.leaves import LeafSpec, describe_leaves
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import counting, work
from nodepint_mpi.parallel.exchange import max_over_ranks, sum_over_grid
from nodepint_mpi.parallel.shards import (
    from_first,
    gather_shards,
    reduce_scatter,
    sum_on_first,
)
from nodepint_mpi.parallel.warm_start import Misfits

SMALL = 2**14
"""A network of fewer parameters is updated on the first rank: a message of it takes no longer than
a few without content."""
SMALL_PIECE = 64
"""So is one of which a rank would have fewer."""


class TrainState(NamedTuple):
    """What the optimizer changes.

    Parameters are equal on all ranks. Of the optimizer's state a rank has its pieces: in the
    sharded way flat ones, (length,); else all on the first rank, and arrays without elements on the
    others. What the state holds besides arrays like parameters, such as a count, it has whole.
    """

    params: PyTree[Array]
    opt_state: PyTree


class Sums(NamedTuple):
    """What a step adds up over all ranks besides its gradient: of each its part.

    The gradient and the loss are divided by `divisor`, once it is summed.
    """

    loss: Array
    divisor: Array
    misfits: Misfits


class Updated(NamedTuple):
    """The new state, this rank's pieces of the gradient, and what was summed, equal on all ranks.

    `loss` and `gradient` are divided by the divisor; `tally` is what this rank did.
    """

    state: TrainState | None
    gradient: PyTree[Array]
    loss: Array
    divisor: Array
    grad_norm: Array
    misfits: Misfits
    tally: Array


def apply_gradient(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: PyTree[Array]
) -> TrainState:
    """The optimizer step on whole arrays. Local."""
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by its integer count
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state)


class Update:
    """The optimizer's step on a grid of ranks.

    Args:
        comm: The grid. Local to make; to be called by all its ranks together.
        optimizer: Any of optax's, or the user's own.
        params: Parameters, or their shapes.
        sharded: The way, see the module; unless given the sharded one where it is possible and the
            network is large enough for the number of ranks.

    Raises:
        ConfigError: if `sharded` is asked for and the optimizer needs more.
    """

    def __init__(
        self,
        comm: TimeComm,
        optimizer: optax.GradientTransformation,
        params: PyTree,
        *,
        sharded: bool | None = None,
    ):
        self.comm, self.optimizer = comm, optimizer
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        self._params, self._state = like, jax.eval_shape(optimizer.init, like)
        self._deals = [Deal(tuple(leaf.shape)) for leaf in jax.tree.leaves(like)]
        self._leaves = match_leaves(like, self._state)
        self._ends = np.cumsum([deal.length(comm.n_grid) for deal in self._deals])
        self._on_pieces, self.reason = None, ""
        n_parameters, n_ranks = sum(deal.size for deal in self._deals), comm.n_grid
        if sharded is None and n_parameters < max(SMALL, SMALL_PIECE * n_ranks):
            self.reason = f"it has {n_parameters} parameters, few for {n_ranks} ranks"
        elif sharded is False:
            self.reason = "`run.sharded_update` is false"
        elif n_ranks > 1:
            try:
                self._on_pieces = self._make_on_pieces()
            except UnsupportedError as error:
                self.reason = f"the optimizer needs whole arrays: {error}"
                if sharded:
                    raise ConfigError(
                        f"`run.sharded_update` is true, but {self.reason}. Leave it out: the "
                        "update is then done on the first rank."
                    ) from error
        self._step = jax.jit(self.update_step, static_argnums=0)
        self._gather = jax.jit(self._gathered, static_argnums=1)

    @property
    def is_sharded(self) -> bool:
        """Whether every rank updates its pieces. Local; equal on all ranks."""
        return self._on_pieces is not None

    def describe(self) -> str:
        """Where the update is done, and why. Local."""
        if self.comm.n_grid == 1:
            return "on one rank"
        if self.is_sharded:
            return f"sharded over {self.comm.n_grid} ranks"
        return f"on the first rank: {self.reason}"

    def init(self, params: PyTree) -> PyTree:
        """This rank's part of the optimizer's first state. Local."""
        return jax.jit(lambda params: self.cut(self.optimizer.init(params)))(params)

    def __call__(
        self,
        finish: Callable[..., Any],
        state: TrainState,
        gradient: PyTree[Array],
        sums: Sums,
        *known: Any,
    ) -> tuple[TrainState, PyTree[Array], Any]:
        """The step by a gradient of which every rank has its part. Collective over the grid.

        Returns:
            The new state, this rank's pieces of the gradient, and what `finish` makes of `Updated`
            and `known`, in the same jitted program.
        """
        return self._step(finish, state, gradient, sums, *known)

    def take(self, state: TrainState, gradient: PyTree[Array], sums: Sums) -> Updated:
        """The same without more, inside jit. Collective over the grid.

        Of ranks that share tangents, whose parts are alike, the first counts.
        """
        if self.comm.basis_rank > 0:
            gradient, sums = jax.tree.map(jnp.zeros_like, (gradient, sums))
        return (self._sharded if self.is_sharded else self._on_first)(state, gradient, sums)

    def cut(self, opt_state: PyTree) -> PyTree:
        """This rank's part of an optimizer's whole state. Local."""
        return self._each(opt_state, self._leaves, self._cut)

    def whole(self, opt_state: PyTree) -> PyTree:
        """The optimizer's whole state, on all ranks. Collective over the grid."""
        return self._gather(opt_state, tuple(self._leaves))

    def whole_params(self, pieces: PyTree) -> PyTree:
        """An average of parameters, or a gradient, on all ranks. Collective over the grid."""
        return self._gather(pieces, tuple(range(len(self._deals))))

    def held_alike(self, state: TrainState) -> dict[str, PyTree]:
        """What all ranks must hold in the same bits. Local."""
        alike = {"params": state.params}
        if self.is_sharded or self.comm.n_grid == 1:
            alike["opt_state"] = self._common(state.opt_state)
        return alike

    def like(self) -> dict[str, PyTree]:
        """Shapes of what all ranks hold whole, as a checkpoint has it. Local."""
        return {"params": self._params, "opt_state": self._common(self._state)}

    def shapes(self) -> dict[str, PyTree]:
        """Shapes of parameters and of the optimizer's whole state. Local."""
        return {"params": self._params, "opt_state": self._state}

    def kept(self, state: TrainState) -> tuple[dict[str, PyTree], dict[str, Rows]]:
        """What a checkpoint holds: what rank 0 has whole, and rows of what is dealt. Local."""
        rows = {}
        for name, leaf, value in self._named(state.opt_state):
            deal, own = self._deals[leaf], self._own_rows(leaf)
            block = np.zeros((len(own), deal.width), value.dtype)
            held = np.ravel(jax.device_get(value))[: max(0, deal.size - own.start * deal.width)]
            block.reshape(-1)[: held.size] = held[: block.size]
            rows[name] = Rows(block, own.start, deal.n_rows)
        return {"params": state.params, "opt_state": self._common(state.opt_state)}, rows

    def row_specs(self) -> dict[str, tuple[LeafSpec, range]]:
        """Shapes of the arrays that are dealt, whole, and the rows that this rank has. Local."""
        return {
            name: (
                LeafSpec((self._deals[leaf].n_rows, self._deals[leaf].width), np.dtype(like.dtype)),
                self._own_rows(leaf),
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

    def update_step(self, finish, state: TrainState, gradient, sums: Sums, *known):
        """What is jitted; its name ends like those of steps, by which profiles find them."""
        updated = self.take(state, gradient, sums)
        return updated.state, updated.gradient, finish(updated, *known)

    # The sharded way.

    def _sharded(self, state: TrainState, gradient: PyTree[Array], sums: Sums) -> Updated:
        comm, deals, on_pieces = self.comm, self._deals, self._on_pieces
        assert on_pieces is not None
        leaves = zip(deals, jax.tree.leaves(gradient), strict=True)
        with counting() as ledger:
            blocks = [deal.blocks(leaf, comm.n_grid) for deal, leaf in leaves]
            own = reduce_scatter(comm, jnp.concatenate(blocks, axis=1))
            sums, square = sum_over_grid(comm, (sums, jnp.sum(own**2)))
            own = own / sums.divisor.astype(own.dtype)
            grad_norm = jnp.sqrt(square) / sums.divisor
            pieces = self._split(own)
            held = sum(deal.n_held(comm.n_grid, comm.grid_rank) for deal in deals)
            with work(UPDATE, updated=held):
                params = self._each(state.params, range(len(deals)), self._cut)
                params, opt_state = on_pieces(self._ranks, pieces, state.opt_state, params)
            flat = gather_shards(comm, jnp.concatenate(jax.tree.leaves(params)))
            params = self._joined(flat)
            opt_state = self._with_common_of_first(opt_state)
        state, tally = TrainState(params, opt_state), ledger.tally.as_array()
        loss = sums.loss / sums.divisor
        return Updated(state, pieces, loss, sums.divisor, grad_norm, sums.misfits, tally)

    def _make_on_pieces(self) -> OnPieces:
        """The optimizer on pieces. Raises UnsupportedError."""
        kinds = {leaf.dtype for leaf in jax.tree.leaves(self._params)}
        if len(kinds) > 1 or not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
            raise UnsupportedError("parameters are of several types, or complex")

        def update(gradient: PyTree, opt_state: PyTree, params: PyTree):
            return apply_gradient(self.optimizer, TrainState(params, opt_state), gradient)

        leaves = list(range(len(self._deals)))
        given = [*leaves, *self._leaves, *leaves]
        shapes = self._params, self._state, self._params
        return on_pieces(update, shapes, given, self._deals, lambda _: [*leaves, *self._leaves])

    @property
    def _ranks(self) -> Ranks:
        comm = self.comm

        def total(kind: str, value: Array) -> Array:
            if kind == "sum":
                return sum_over_grid(comm, value)
            return max_over_ranks(comm, value) if kind == "max" else -max_over_ranks(comm, -value)

        return Ranks(comm.n_grid, comm.grid_rank, total, lambda value: from_first(comm, value))

    def _split(self, flat: Array) -> PyTree[Array]:
        """One rank's pieces of all parameters from what they are in a row."""
        parts = jnp.split(flat, self._ends[:-1])
        return jax.tree.unflatten(jax.tree.structure(self._params), parts)

    def _joined(self, flat: Array) -> PyTree[Array]:
        """Whole parameters from the pieces of all ranks, (ranks, length)."""
        parts = jnp.split(flat, self._ends[:-1], axis=1)
        whole = [deal.whole(part) for deal, part in zip(self._deals, parts, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(self._params), whole)

    def _with_common_of_first(self, opt_state: PyTree) -> PyTree:
        """Whole numbers are counted alike everywhere; others are those of the first rank."""

        def one(leaf: int | None, value: Array) -> Array:
            inexact = leaf is None and jnp.issubdtype(value.dtype, jnp.inexact)
            return from_first(self.comm, value) if inexact else value

        return self._each(opt_state, self._leaves, one)

    # On the first rank.

    def _on_first(self, state: TrainState, gradient: PyTree[Array], sums: Sums) -> Updated:
        comm, loss = self.comm, sums.loss
        with counting() as ledger:
            flat, unravel = ravel_pytree((gradient, sums))
            total, new = sum_on_first(comm, flat), state
            grad_norm = jnp.zeros_like(loss)
            if total is not None:
                gradient, sums = (gradient, sums) if comm.n_grid == 1 else unravel(total)
                loss = sums.loss / sums.divisor
                with work(UPDATE, updated=sum(deal.size for deal in self._deals)):
                    gradient = jax.tree.map(lambda x: x / sums.divisor.astype(x.dtype), gradient)
                    grad_norm = optax.tree.norm(gradient)
                    new = apply_gradient(self.optimizer, state, gradient)
            else:
                gradient = self._each(gradient, range(len(self._deals)), self._cut)
            known = new.params, loss, sums, grad_norm
            if comm.n_grid > 1:
                flat, unravel = ravel_pytree(known)
                known = unravel(from_first(comm, flat))
        params, loss, sums, grad_norm = known
        state, tally = TrainState(params, new.opt_state), ledger.tally.as_array()
        return Updated(state, gradient, loss, sums.divisor, grad_norm, sums.misfits, tally)

    # Either way.

    def _gathered(self, tree: PyTree, leaves: tuple[int | None, ...]) -> PyTree:
        """Whole arrays of pieces, and the first rank's of all else."""
        comm, n_ranks = self.comm, self.comm.n_grid
        if n_ranks == 1:
            return tree

        def one(leaf: int | None, value: Array) -> Array:
            if leaf is None:
                return from_first(comm, value)
            deal = self._deals[leaf]
            if self.is_sharded:
                return deal.whole(gather_shards(comm, value))
            return from_first(
                comm, value if comm.grid_rank == 0 else jnp.zeros(deal.shape, value.dtype)
            )

        return self._each(tree, leaves, one)

    def _cut(self, leaf: int | None, value: Array) -> Array:
        if leaf is None or self.comm.n_grid == 1:
            return value
        if self.is_sharded:
            return self._deals[leaf].piece(value, self.comm.n_grid, self.comm.grid_rank)
        return value if self.comm.grid_rank == 0 else jnp.zeros(0, value.dtype)

    def _from_rows(self, leaf: int, rows: np.ndarray) -> np.ndarray:
        deal, flat = self._deals[leaf], np.ravel(rows)
        if self.is_sharded:
            return np.pad(flat, (0, deal.length(self.comm.n_grid) - flat.size))
        return flat[: deal.size].reshape(deal.shape) if self.comm.grid_rank == 0 else flat

    def _own_rows(self, leaf: int) -> range:
        deal = self._deals[leaf]
        if self.is_sharded:
            return deal.rows(self.comm.n_grid, self.comm.grid_rank)
        return range(deal.n_rows) if self.comm.grid_rank == 0 else range(deal.n_rows, deal.n_rows)

    def _common(self, opt_state: PyTree) -> PyTree:
        """The state without what is dealt."""
        return self._each(opt_state, self._leaves, lambda n, x: x if n is None else None)

    def _named(self, opt_state: PyTree) -> list[tuple[str, int, Any]]:
        """Name, number of the leaf, and value of what is dealt."""
        names, values = describe_leaves({"opt_state": self._state}), jax.tree.leaves(opt_state)
        listed = zip(names, self._leaves, values, strict=True)
        return [(name, leaf, value) for name, leaf, value in listed if leaf is not None]

    @staticmethod
    def _each(tree: PyTree, leaves: Any, function: Any) -> PyTree:
        values, structure = jax.tree.flatten(tree)
        new = [function(*one) for one in zip(leaves, values, strict=True)]
        return jax.tree.unflatten(structure, new)
