"""The optimizer's step: a program of its own, whose work and memory are dealt over the ranks.

Every number of the new parameters is computed on one rank and sent to the others, so that all hold
the same bits by construction, whatever their compilers made of the program. There are two ways, and
a third for random basis descent:

- sharded: a reduce-scatter of the gradient, an update of 1/P of the parameters with 1/P of the
  moments, an all-gather. Any optimizer that is elementwise but for sums over whole arrays.
- on the first rank: a sum of the gradient there, the update, a broadcast. For what needs more, such
  as factored moments, and for networks so small that what counts is the number of messages.
- on every rank: a sum of the coefficients along random directions, and nothing else; each rank
  draws the directions again and does the whole update, by a program that is the same on all of
  them. Their bits are the same where their processors and compilers are.

Reference:
    Rajbhandari, Rasley, Ruwase, He (2020), ZeRO, SC20, section 5 (stages 1 and 2).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from nodepint_mpi.build.optimizers import build_optimizer, check_optimizer, frozen_leaves
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.pieces import (
    Deal,
    OnPieces,
    Ranks,
    UnsupportedError,
    match_leaves,
    on_pieces,
)
from nodepint_mpi.core.random_basis import Coefficients, RandomBasis
from nodepint_mpi.core.scopes import UPDATE
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import counting, work
from nodepint_mpi.parallel.exchange import max_over_ranks, sum_over_grid
from nodepint_mpi.parallel.shards import (
    from_first,
    gather_shards,
    reduce_scatter,
    sum_on_first,
)
from nodepint_mpi.training.held import Held, each_leaf
from nodepint_mpi.training.random_descent import RandomDescent
from nodepint_mpi.training.train_state import Sums, TrainState, Updated, apply_gradient

SMALL = 2**14
"""A network of fewer parameters is updated on the first rank: a message of it takes no longer than
a few without content."""
SMALL_PIECE = 64
"""So is one of which a rank would have fewer."""


class Update:
    """The optimizer's step on a grid of ranks.

    Args:
        comm: The grid. Local to make; to be called by all its ranks together.
        optimizer: Any of optax's, or the user's own.
        params: Parameters, or their shapes.
        sharded: The way, see the module; unless given the sharded one where it is possible and the
            network is large enough for the number of ranks. With `descent` the ways are sharded and
            on every rank, the second one unless `sharded` is true.
        descent: The random directions that the gradient is projected on, if it is.

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
        descent: RandomDescent | None = None,
    ):
        self.comm, self.optimizer, self.descent = comm, optimizer, descent
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        self._params, self._state = like, jax.eval_shape(optimizer.init, like)
        self._deals = [Deal(tuple(leaf.shape)) for leaf in jax.tree.leaves(like)]
        self._leaves = match_leaves(like, self._state)
        self._ends = np.cumsum([deal.length(comm.n_grid) for deal in self._deals])
        self._on_pieces, self.reason = None, ""
        n_parameters, n_ranks = sum(deal.size for deal in self._deals), comm.n_grid
        if descent is not None and not sharded:
            self.reason = "ranks send coefficients along random directions only"
        elif sharded is None and n_parameters < max(SMALL, SMALL_PIECE * n_ranks):
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
                        f"update is then done on {self._where} rank."
                    ) from error
        way = "sharded" if self.is_sharded else "every" if self.is_on_every_rank else "first"
        self.held = Held(comm, like, self._state, way)
        self._step = jax.jit(self.update_step, static_argnums=0)
        self._sum = jax.jit(self._sum_coefficients)
        self._apply = jax.jit(self._apply_coefficients_step, static_argnums=0)
        self._gather = jax.jit(self._gathered, static_argnums=1)

    @property
    def is_sharded(self) -> bool:
        """Whether every rank updates its pieces. Local; equal on all ranks."""
        return self._on_pieces is not None

    @property
    def _where(self) -> str:
        return "the first" if self.descent is None else "every"

    @property
    def is_on_every_rank(self) -> bool:
        """Whether every rank does the whole update and has the optimizer's whole state. Local."""
        return self.comm.n_grid == 1 or (self.descent is not None and not self.is_sharded)

    def describe(self) -> str:
        """Where the update is done, and why. Local."""
        if self.comm.n_grid == 1:
            return "on one rank"
        if self.is_sharded:
            return f"sharded over {self.comm.n_grid} ranks"
        return f"on {self._where} rank: {self.reason}"

    def init(self, params: PyTree) -> PyTree:
        """This rank's part of the optimizer's first state. Local."""
        return jax.jit(lambda params: self.held.cut(self.optimizer.init(params)))(params)

    def __call__(
        self,
        finish: Callable[..., Any],
        state: TrainState,
        gradient: PyTree[Array],
        sums: Sums,
        *known: Any,
        step: Array | None = None,
    ) -> tuple[TrainState, PyTree[Array], Any]:
        """The step by a gradient of which every rank has its part. Collective over the grid.

        Random basis descent also takes the number of the `step`, and in place of the gradient
        coefficients, of which every rank has its part too.

        Returns:
            The new state, this rank's pieces of the gradient, and what `finish` makes of `Updated`
            and `known`, in the same jitted program.
        """
        if self.descent is None or self.is_sharded:
            return self._step(finish, state, gradient, sums, *known, step=step)
        return self._apply(finish, state, *self._sum(gradient, sums, step), step, *known)

    def take(
        self,
        state: TrainState,
        gradient: PyTree[Array],
        sums: Sums,
        step: Array | None = None,
    ) -> Updated:
        """The same without more, inside jit. Collective over the grid.

        Of ranks that share tangents, whose parts are alike, the first counts.
        """
        if self.descent is not None and not self.is_sharded:
            return self._on_every(state, *self._sum_coefficients(gradient, sums, step), step)
        if self.comm.basis_rank > 0:
            sums = jax.tree.map(jnp.zeros_like, sums)
            if not isinstance(gradient, Coefficients):  # which differ, direction by direction
                gradient = jax.tree.map(jnp.zeros_like, gradient)
        if self.is_sharded:
            return self._sharded(state, gradient, sums, step)
        return self._on_first(state, gradient, sums)

    def whole(self, opt_state: PyTree) -> PyTree:
        """The optimizer's whole state, on all ranks. Collective over the grid."""
        return self._gather(opt_state, tuple(self._leaves))

    def whole_params(self, pieces: PyTree) -> PyTree:
        """An average of parameters, or a gradient, on all ranks. Collective over the grid."""
        return self._gather(pieces, tuple(range(len(self._deals))))

    def held_alike(self, state: TrainState) -> dict[str, PyTree]:
        """What all ranks must hold in the same bits. Local."""
        alike = {"params": state.params}
        if self.is_on_every_rank:
            alike["opt_state"] = state.opt_state
        elif self.is_sharded:
            alike["opt_state"] = self.held.common(state.opt_state)
        return alike

    def shapes(self) -> dict[str, PyTree]:
        """Shapes of parameters and of the optimizer's whole state. Local."""
        return {"params": self._params, "opt_state": self._state}

    def update_step(self, finish, state: TrainState, gradient, sums: Sums, *known, step=None):
        """What is jitted; its name ends like those of steps, by which profiles find them."""
        updated = self.take(state, gradient, sums, step)
        return updated.state, updated.gradient, finish(updated, *known)

    # The sharded way.

    def _sharded(self, state: TrainState, gradient: Any, sums: Sums, step: Any) -> Updated:
        comm, deals, on_pieces = self.comm, self._deals, self._on_pieces
        assert on_pieces is not None
        with counting() as ledger:
            if self.descent is None:
                own = self._scattered(gradient)
                sums, square = sum_over_grid(comm, (sums, jnp.sum(own**2)))
            else:
                if not isinstance(gradient, Coefficients):
                    gradient = self.descent.of_piece(self._scattered(gradient), step)
                sums, gradient = sum_over_grid(comm, (sums, gradient))
                own = self.descent.projected_piece(gradient, step)
                square = sum_over_grid(comm, jnp.sum(own**2))
            own = own / sums.divisor.astype(own.dtype)
            grad_norm = jnp.sqrt(square) / sums.divisor
            pieces = self._split(own)
            held = sum(deal.n_held(comm.n_grid, comm.grid_rank) for deal in deals)
            with work(UPDATE, updated=held):
                params = each_leaf(state.params, range(len(deals)), self.held.cut_leaf)
                params, opt_state = on_pieces(self._ranks, pieces, state.opt_state, params)
            flat = gather_shards(comm, jnp.concatenate(jax.tree.leaves(params)))
            params = self._joined(flat)
            opt_state = self._with_common_of_first(opt_state)
        state, tally = TrainState(params, opt_state), ledger.tally.as_array()
        loss = sums.loss / sums.divisor
        return Updated(state, pieces, loss, sums.divisor, grad_norm, sums.misfits, tally)

    def _scattered(self, gradient: PyTree[Array]) -> Array:
        """This rank's pieces of the sum over all ranks, in a row."""
        leaves = zip(self._deals, jax.tree.leaves(gradient), strict=True)
        blocks = [deal.blocks(leaf, self.comm.n_grid) for deal, leaf in leaves]
        return reduce_scatter(self.comm, jnp.concatenate(blocks, axis=1))

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

        return each_leaf(opt_state, self._leaves, one)

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
                gradient = each_leaf(gradient, range(len(self._deals)), self.held.cut_leaf)
            known = new.params, loss, sums, grad_norm
            if comm.n_grid > 1:
                flat, unravel = ravel_pytree(known)
                known = unravel(from_first(comm, flat))
        params, loss, sums, grad_norm = known
        state, tally = TrainState(params, new.opt_state), ledger.tally.as_array()
        return Updated(state, gradient, loss, sums.divisor, grad_norm, sums.misfits, tally)

    # On every rank.

    def _sum_coefficients(self, gradient: Any, sums: Sums, step: Any):
        """Coefficients and sums over all ranks, and what was counted. Collective, inside jit."""
        assert self.descent is not None
        with counting() as ledger:
            if not isinstance(gradient, Coefficients):
                gradient = self.descent.of_gradient(gradient, step)
            if self.comm.basis_rank > 0:
                sums = jax.tree.map(jnp.zeros_like, sums)
            gradient, sums = sum_over_grid(self.comm, (gradient, sums))
        return gradient, sums, ledger.tally.as_array()

    def _apply_coefficients_step(self, finish, state: TrainState, gradient, sums, tally, step, *k):
        """Nothing in it depends on the rank: all compile the same program."""
        updated = self._on_every(state, gradient, sums, tally, step)
        return updated.state, updated.gradient, finish(updated, *k)

    def _on_every(self, state: TrainState, gradient: Any, sums: Sums, tally, step: Any) -> Updated:
        assert self.descent is not None
        with work(UPDATE, updated=sum(deal.size for deal in self._deals)):
            products = gradient.products / sums.divisor.astype(gradient.products.dtype)
            gradient = self.descent.projected(gradient._replace(products=products), step)
            state, norm = apply_gradient(self.optimizer, state, gradient), optax.tree.norm(gradient)
        loss = sums.loss / sums.divisor
        return Updated(state, gradient, loss, sums.divisor, norm, sums.misfits, tally)

    # In any way.

    def _gathered(self, tree: PyTree, leaves: tuple[int | None, ...]) -> PyTree:
        """Whole arrays of pieces, and the first rank's of all else."""
        comm = self.comm
        if self.is_on_every_rank:
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

        return each_leaf(tree, leaves, one)


def make_update(config: Config, comm: TimeComm, params: PyTree) -> Update:
    """The update of a config, on a grid. Local.

    Args:
        config: The experiment.
        comm: The grid.
        params: Parameters, or their shapes.

    Raises:
        ConfigError: for an optimizer that does not fit, or more random directions than parameters.
    """
    optimizer = build_optimizer(config.optim, params)
    check_optimizer(config.optim, optimizer, params)
    random, descent = config.optim.random_basis, None
    if random is not None:
        basis = RandomBasis(
            random.dims, config.run.seed, random.redraw, random.directions,
            random.scale == "unbiased",
        )  # fmt: skip
        descent = RandomDescent(
            comm, basis, params,
            trained=[not frozen for frozen in frozen_leaves(config.optim, params)],
            by_tangents=random.by == "tangents",
        )  # fmt: skip
    return Update(comm, optimizer, params, sharded=config.run.sharded_update, descent=descent)
