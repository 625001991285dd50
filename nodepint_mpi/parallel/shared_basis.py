"""The basis that all slices, samples and ranks of a solve share: how it begins and how it turns."""

import math
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from nodepint_mpi.core.basis import (
    Merged,
    identity_directions,
    merge,
    random_directions,
    rows_in_use,
)
from nodepint_mpi.core.scopes import FACTOR, SNAPSHOTS, scope
from nodepint_mpi.core.types import Block
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.counters import note
from nodepint_mpi.parallel.directions import leading_directions
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.recurrence import Recurrence

BasisKind = Literal["identity", "random", "pod", "jumps"]


class SharedBasis(eqx.Module):
    """How a basis of at most `rank` directions is chosen, and how many turn over in a sweep.

    An identity basis has the rank of the state and needs none.

    It begins as all coordinates (`identity`), seeded random directions (`random`), the leading
    directions of the interface states of iteration 0 (`pod`), or empty (`jumps`). In every sweep
    up to `n_new` directions come in: the leading ones of the jumps and of the corrections these
    lead to, which are what the sweep still gets wrong. The oldest go.

    `n_batch_axes` leading axes of a state count samples, which share the basis. Directions with
    less than `drop` of the largest singular value are left out.

    `recurrence` is how the coordinates of the slices are tied together: by the first rank alone
    (`slices`), by the first rank between blocks (`blocks`), by exchanges of all ranks (`scan`), or
    in that way of them which should take least (`auto`); see `parallel.recurrence`. The numbers are
    the same to round-off.
    """

    kind: BasisKind = eqx.field(static=True)
    rank: int | None = eqx.field(static=True, default=None)
    n_new: int = eqx.field(static=True, default=0)
    n_batch_axes: int = eqx.field(static=True, default=0)
    drop: float = eqx.field(static=True, default=1e-4)
    seed: int = eqx.field(static=True, default=0)
    recurrence: Recurrence = eqx.field(static=True, default="auto")

    def __check_init__(self):
        if self.kind not in get_args(BasisKind):
            known = ", ".join(map(repr, get_args(BasisKind)))
            raise ProblemError(f"A basis of kind {self.kind!r} is unknown; choose from {known}.")
        if self.recurrence not in get_args(Recurrence):
            known = ", ".join(map(repr, get_args(Recurrence)))
            raise ProblemError(f"Unknown recurrence {self.recurrence!r}; choose from {known}.")
        if self.rank is None:
            if self.kind != "identity":
                raise ProblemError(f"A basis of kind {self.kind!r} needs a rank.")
            return
        if self.rank < 1:
            raise ProblemError(f"The basis has rank {self.rank}; it needs at least one direction.")
        if not 0 <= self.n_new <= self.rank:
            raise ProblemError(
                f"{self.n_new} new directions a sweep do not fit into a basis of rank {self.rank}; "
                "give 0 to rank."
            )
        if self.kind == "jumps" and self.n_new == 0:
            raise ProblemError("A basis of jumps grows by `new` directions a sweep: at least 1.")

    def sample_shape(self, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one sample's state. Local.

        Raises:
            ProblemError: if the basis would have more directions than the state has entries.
        """
        sample = state_shape[self.n_batch_axes :]
        size = math.prod(sample)
        if self.rank is None:
            return sample
        if self.rank > size:
            raise ProblemError(
                f"A basis of rank {self.rank} is larger than the state of {size} entries; choose "
                f"a rank of at most {size}."
            )
        if self.kind == "identity" and self.rank != size:
            raise ProblemError(
                f"The identity basis of a state of {size} entries has rank {size}, not {self.rank}."
            )
        return sample

    def blank(self, state: jax.ShapeDtypeStruct) -> Inexact[Array, "rank *sample"]:
        """Zeros shaped like the basis of such a state. Local."""
        sample = self.sample_shape(state.shape)
        rank = math.prod(sample) if self.rank is None else self.rank
        return jnp.zeros((rank, *sample), state.dtype)

    def first(self, line: Line, starts: Block) -> Inexact[Array, "rank *sample"]:
        """The basis of iteration 0. Collective."""
        sample = self.sample_shape(starts.shape[1:])
        dtype = starts.dtype
        if self.rank is None or self.kind == "identity":
            return identity_directions(sample, dtype)
        if self.kind == "random":
            return random_directions(jax.random.key(self.seed), self.rank, sample, dtype)
        if self.kind == "jumps":
            return jnp.zeros((self.rank, *sample), dtype)
        snapshots, numbers = self._samples(line, starts, sample)
        key = jax.random.key(self.seed)
        return leading_directions(line.comm, key, snapshots, numbers, self.rank).vectors

    def new_directions(
        self, line: Line, key: Array, jumps: Block, corrections: Block
    ) -> Inexact[Array, "new *sample"]:
        """The leading directions of what a sweep has to put right. Collective."""
        sample = self.sample_shape(jumps.shape[1:])
        snapshots, numbers = self._samples(line, jnp.stack([jumps, corrections], axis=1), sample)
        found = leading_directions(line.comm, key, snapshots, numbers, self.n_new)
        keep = found.energies > self.drop**2 * found.energies[0]
        return jnp.where(keep.reshape(-1, *[1] * len(sample)), found.vectors, 0.0)

    def turn(
        self, new: Inexact[Array, "new *sample"], old: Inexact[Array, "rank *sample"]
    ) -> Merged:
        """Let new directions in and the oldest out. Local."""
        with scope(FACTOR):
            return merge(new, old, old.shape[0])

    def _samples(
        self, line: Line, block: Block, sample: tuple[int, ...]
    ) -> tuple[Array, Int[Array, " snapshots"]]:
        """A block's states as snapshots, with their numbers among those of all ranks."""
        note(SNAPSHOTS, snapshots=line.owned.n_owned)
        note(FACTOR, factored=1)  # once for these snapshots, and with it the turn
        flat = block.reshape(-1, *sample)
        per_slice = flat.shape[0] // line.owned.n_owned
        numbers = line.owned.first * per_slice + jnp.arange(flat.shape[0])
        end = block.ndim - len(sample)
        n_batch = math.prod(block.shape[end - self.n_batch_axes : end])
        place, number = numbers // n_batch, numbers % n_batch
        comm = line.comm
        return flat, (place * comm.n_groups + comm.group) * n_batch + number


def count_in_use(basis: Inexact[Array, "rank *sample"]) -> Int[Array, ""]:
    """How many directions a basis has. Local."""
    return jnp.sum(rows_in_use(basis))
