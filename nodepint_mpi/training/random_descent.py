"""Random basis descent on a grid of ranks: where gradients, directions and coefficients are.

Ranks that share directions (`run.basis_ranks`) find the coefficients of their part of these, from
the same gradient; ranks along time and of groups of samples find those of their part of the
gradient. The sum over all is one message of d coefficients each way, in place of D numbers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.core.pieces import Deal
from nodepint_mpi.core.random_basis import (
    Coefficients,
    RandomBasis,
    Segment,
    chunk_width,
    combine,
    draw,
    find_coefficients,
    place_coefficients,
)
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import map_rows

PIPELINED = 4
"""Chunks of directions that each rank along time works on in turn, while others do the next."""


class RandomDescent:
    """The random directions of parameters like these, for the ranks of a grid.

    Args:
        comm: The grid. Local to make.
        basis: Which directions there are.
        params: Parameters, or their shapes.
        trained: Which of them are not frozen, in the order of the leaves; all unless given. Frozen
            ones take no part: directions are zero there.
        by_tangents: Coefficients are derivatives along the directions, found without a gradient.

    Raises:
        ConfigError: for more directions than parameters, or parameters of several types.
    """

    def __init__(
        self,
        comm: TimeComm,
        basis: RandomBasis,
        params: PyTree,
        *,
        trained: Sequence[bool] | None = None,
        by_tangents: bool = False,
    ):
        self.comm, self.basis, self.by_tangents = comm, basis, by_tangents
        leaves, self._structure = jax.tree.flatten(params)
        kinds = {np.dtype(leaf.dtype) for leaf in leaves}
        if len(kinds) != 1 or not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
            raise ConfigError(
                "`optim.random_basis` needs parameters of one real type; the network has "
                f"{', '.join(sorted(map(str, kinds)))}: remove the section, or give all the same."
            )
        (self._dtype,) = kinds
        self._deals = [Deal(tuple(leaf.shape)) for leaf in leaves]
        self._trained = [True] * len(leaves) if trained is None else list(trained)
        sizes = [deal.size if used else 0 for deal, used in self._used()]
        self._starts = [0, *np.cumsum(sizes)[:-1].tolist()]
        self.n_parameters = sum(sizes)
        if basis.n_directions > self.n_parameters:
            raise ConfigError(
                f"`optim.random_basis.dims` is {basis.n_directions}, but the network has only "
                f"{self.n_parameters} parameters that are trained: take fewer directions."
            )

    @property
    def own(self) -> range:
        """Indices of the directions whose coefficients this rank finds. Local."""
        return owned_range(self.basis.n_directions, self.comm.n_basis, self.comm.basis_rank)

    @property
    def message_bytes(self) -> int:
        """Of the coefficients that a rank sends in a step. Local."""
        return 2 * self.basis.n_directions * self._dtype.itemsize

    def describe(self) -> str:
        """How many directions there are, and who has them. Local."""
        n_basis, n = self.comm.n_basis, self.basis.n_directions
        each = owned_range(n, n_basis, 0)
        dealt = "" if n_basis == 1 else f", {len(each)} on each of {n_basis} basis ranks"
        drawn = "redrawn in each step" if self.basis.redraw else "the same in all steps"
        return f"{n} directions of {self.n_parameters} dimensions{dealt}, {drawn}"

    def of_gradient(self, gradient: PyTree[Array], step: Int[Array, ""]) -> Coefficients:
        """This rank's part of the coefficients, from its part of the gradient. Local, inside jit.

        To be added up over all ranks.
        """
        leaves = zip(jax.tree.leaves(gradient), self._trained, strict=True)
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf, used in leaves if used])
        found = find_coefficients(self.basis, step, flat, self._whole(), own=self.own)
        return self.counted_once(found)

    def of_piece(self, piece: Float[Array, " length"], step: Int[Array, ""]) -> Coefficients:
        """The same from this rank's pieces of the whole gradient, all in a row. Local, inside jit.

        To be added up over all ranks.
        """
        parts, _ = self._pieces()
        numbers = jnp.concatenate([piece[at : at + part.length] for at, part in parts])
        return find_coefficients(self.basis, step, numbers, [part for _, part in parts])

    def along(self, of_chunk: Any, step: Int[Array, ""], *, numbers: int) -> Coefficients:
        """The same from derivatives along directions. Collective over the line, if `of_chunk` is.

        Args:
            of_chunk: Takes directions, a tree like the parameters with an axis (n, ...) in front,
                and returns n numbers: this rank's part of the derivatives of the loss.
            step: The optimizer step, traced.
            numbers: How many numbers are held for a direction; equal on all ranks.
        """
        basis, segments = self.basis, self._whole()

        def found(keys: Array) -> Coefficients:
            rows = draw(basis.kind, keys, segments, self._dtype)
            return Coefficients(of_chunk(jax.vmap(self._tree)(rows)), jnp.sum(rows**2, axis=1))

        n_chunks = 1 if self.comm.size == 1 else PIPELINED * self.comm.size
        width = chunk_width(len(self.own), numbers + self.n_parameters, n_chunks=n_chunks)
        return self.counted_once(
            place_coefficients(basis, self.own, found, step, width=width, over_rows=map_rows)
        )

    def counted_once(self, part: Coefficients) -> Coefficients:
        """With squares of whole directions on one of the ranks that have them all. Local."""
        if self.comm.rank == 0 and self.comm.group == 0:
            return part
        return part._replace(squares=jnp.zeros_like(part.squares))

    def projected(self, coefficients: Coefficients, step: Int[Array, ""]) -> PyTree[Array]:
        """The projected gradient, from coefficients summed over all ranks. Local, inside jit."""
        return self._tree(self._combined(coefficients, step, self._whole()))

    def projected_piece(
        self, coefficients: Coefficients, step: Int[Array, ""]
    ) -> Float[Array, " length"]:
        """This rank's pieces of it, all in a row. Local, inside jit."""
        parts, length = self._pieces()
        numbers = self._combined(coefficients, step, [part for _, part in parts])
        piece, taken = jnp.zeros(length, numbers.dtype), 0
        for at, part in parts:
            piece = piece.at[at : at + part.length].set(numbers[taken : taken + part.length])
            taken += part.length
        return piece

    def project(self, gradient: PyTree[Array], step: Int[Array, ""]) -> PyTree[Array]:
        """The projection of a whole gradient by one rank alone. Local, inside jit."""
        flat = jax.tree.leaves(gradient)
        flat = [jnp.ravel(leaf) for leaf, used in zip(flat, self._trained, strict=True) if used]
        found = find_coefficients(self.basis, step, jnp.concatenate(flat), self._whole())
        return self.projected(found, step)

    def _used(self) -> list[tuple[Deal, bool]]:
        return list(zip(self._deals, self._trained, strict=True))

    def _whole(self) -> list[Segment]:
        return [Segment(0, self.n_parameters)]

    def _pieces(self) -> tuple[list[tuple[int, Segment]], int]:
        """Where this rank's numbers of each trained array are in its row of pieces, and among all
        parameters; and the length of the row."""
        n_ranks, rank, at, parts = self.comm.n_grid, self.comm.grid_rank, 0, []
        for (deal, used), start in zip(self._used(), self._starts, strict=True):
            length = deal.length(n_ranks)
            if used:
                first = start + min(rank * length, deal.size)
                parts.append((at, Segment(first, deal.n_held(n_ranks, rank))))
            at += length
        return parts, at

    def _combined(
        self, coefficients: Coefficients, step: Int[Array, ""], segments: list[Segment]
    ) -> Array:
        n_parameters = self.n_parameters
        return combine(self.basis, step, coefficients, segments, n_parameters=n_parameters)

    def _tree(self, numbers: Array) -> PyTree[Array]:
        """Numbers of all trained parameters as a tree, with zeros for frozen ones."""
        leaves = [
            numbers[start : start + deal.size].reshape(deal.shape)
            if used
            else jnp.zeros(deal.shape, numbers.dtype)
            for (deal, used), start in zip(self._used(), self._starts, strict=True)
        ]
        return jax.tree.unflatten(self._structure, leaves)
