"""Corrections of a block from the coordinates that the ranks have solved for, along tangents.

delta[n+1] = (dF_n V) c[n] + b[n]            lambda[n] <- out[n] + V e[n]
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from nodepint_mpi.core.basis import along, combine, lift, transfers
from nodepint_mpi.core.complement import Split
from nodepint_mpi.core.scopes import TANGENTS, scope
from nodepint_mpi.core.transposed import BlockCotangents
from nodepint_mpi.core.types import Block
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import Coswept, with_lefts
from nodepint_mpi.parallel.recurrence import AdjointCoordinates, Coordinates


class Found(NamedTuple):
    """Corrections at the ends of the owned slices; slices damped, and slices guarded."""

    changes: Block
    damped: Array
    guarded: Array


def corrections_from(tangents: Array, jumps: Block, solved: Coordinates) -> Found:
    """Corrections at the ends of the owned slices from coordinates at their starts. Local."""
    with scope(TANGENTS):
        changes = combine(tangents, solved.at_starts) + jumps
    return Found(changes, solved.n_damped, jnp.array(0))


def pose_adjoint(line: Line, coswept: Coswept, outs: Block) -> tuple[BlockCotangents, Array, Array]:
    """Cotangents as they were pulled back, and the recurrence of their correction. Collective."""
    old, linear = coswept
    pulled = with_lefts(line, outs)
    with scope(TANGENTS):
        matrices = transfers(linear.basis, linear.tangents)
        misfits = along(linear.tangents, pulled.rights - old.rights, linear.basis.ndim - 1)
    return pulled, matrices, misfits


def correct_adjoint(
    linear: Split, pulled: BlockCotangents, solved: AdjointCoordinates
) -> BlockCotangents:
    """Cotangents after the correction. Local."""
    with scope(TANGENTS):
        return BlockCotangents(
            pulled.lefts + lift(linear.basis, solved.at_lefts),
            pulled.rights + lift(linear.basis, solved.at_rights),
        )
