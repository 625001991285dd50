"""Following a solution while its parameters change: one sweep forward and one back.

A new optimizer step moves the solution little, so its sweeps start from what the last ones carried.
Every rank solves its slices once, and pulls them back once:

    U <- (the method's iteration 0 from the carry)        fine ends F_n(U[n])
    lambda <- (the same, transposed)                      pull-back of lambda[n+1] + g[n+1]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.scopes import FINE_ADJOINT, FINE_FORWARD, SWEEP, scope
from nodepint_mpi.core.transposed import PullBack, linearise_block
from nodepint_mpi.core.types import Params, State
from nodepint_mpi.parallel.counters import Tally, work
from nodepint_mpi.parallel.exchange import in_order
from nodepint_mpi.parallel.failure import warn_of_drift
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import Carry, Swept


class Misfits(NamedTuple):
    """Sums of squares over the slices of a rank; add them up over the ranks.

    A misfit is what F and its transpose did not reproduce: jumps, and residuals of cotangents.
    """

    jumps: Float[Array, ""]
    states: Float[Array, ""]
    residuals: Float[Array, ""]
    cotangents: Float[Array, ""]

    def jump(self) -> Float[Array, ""]:
        """Root mean square of the jumps, relative to that of the states."""
        return _relative(self.jumps, self.states)

    def residual(self) -> Float[Array, ""]:
        """Root mean square of the residuals, relative to that of the cotangents."""
        return _relative(self.residuals, self.cotangents)


class Followed(NamedTuple):
    """This rank's part of the gradient; `initial` is valid on the first rank.

    `carry` is what the next step starts from.
    """

    params: Params
    initial: Inexact[Array, "*state"]
    misfits: Misfits
    carry: Carry


class Begun(NamedTuple):
    """The sweep forward: what the method began with, and the owned slices solved from there."""

    swept: Swept
    result: SliceResult
    pull_back: PullBack


def follow(
    line: Line,
    solver: TimeSolver,
    initial: State,
    carry: Carry,
    read_loss: Callable[[SliceResult], tuple[SliceResult, Any]],
) -> tuple[Followed, Any]:
    """One sweep forward and one back from what is carried. Collective over the line, inside jit.

    Args:
        line: Ranks along time, and the parameters of the vector field.
        solver: Propagators and a method that iterates.
        initial: State at the first edge, (*state). Read on the first rank only.
        carry: Of the last sweeps; empty to begin with.
        read_loss: Local: from the owned slices to the cotangents of what the loss reads there,
            and whatever else it finds, which is returned.
    """
    begun = follow_forward(line, solver, initial, carry)
    with scope(SWEEP):
        sources, found = read_loss(begun.result)
    return follow_back(line, solver, initial, carry, begun, sources), found


def follow_forward(line: Line, solver: TimeSolver, initial: State, carry: Carry) -> Begun:
    """The first half of `follow`. Collective over the line, inside jit."""
    owned = line.owned
    with work(SWEEP, swept=owned.n_owned):
        begun = solver.method.init(line, initial, carry)
        starts = begun.states.starts
        with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
            result, pull_back = linearise_block(
                solver.fine, line.params, starts, owned, at_once=solver.slices_at_once
            )
        result = result._replace(end=in_order(line.comm, result.end))
        warn_of_drift(line, solver.fine, starts, result.end, again=False)
    return Begun(begun, result, pull_back)


def follow_back(
    line: Line, solver: TimeSolver, initial: State, carry: Carry, begun: Begun, sources: SliceResult
) -> Followed:
    """The second half, from the cotangents of what the loss reads. Collective, inside jit."""
    with work(SWEEP, swept=line.owned.n_owned):
        return _follow_back(line, solver, initial, carry, begun, sources)


def _follow_back(
    line: Line, solver: TimeSolver, initial: State, carry: Carry, begun: Begun, sources: SliceResult
) -> Followed:
    method, owned = solver.method, line.owned
    swept, result, pull_back = begun
    states = swept.states
    back = method.adjoint_init(line, states.starts, swept.memory, sources, carry)
    old = back.cotangents
    with work(FINE_ADJOINT, Tally(fine_pulled=owned.n_owned)):
        params_bar, outs = pull_back(SliceResult(sources.saves, sources.end + old.rights))
    left = method.carry(line, initial, swept, result.end, back, outs, carry)
    indices = jnp.asarray(owned.indices).reshape(-1, *[1] * (outs.ndim - 1))
    last = owned.n_slices - 1  # nothing starts at its end, and nothing reads the first cotangent
    misfits = Misfits(
        jnp.sum(jnp.where(indices < last, result.end - states.ends, 0.0) ** 2),
        jnp.sum(result.end**2),
        jnp.sum(jnp.where(indices > 0, outs - old.lefts, 0.0) ** 2),
        jnp.sum(outs**2),
    )
    return Followed(params_bar, outs[0], misfits, left)


def _relative(part: Array, whole: Array) -> Array:
    return jnp.sqrt(jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0))
