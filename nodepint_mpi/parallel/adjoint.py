"""The time-parallel adjoint: the solver of `parallel.solve`, transposed.

    out[n] = (dF_n/du)^T (lambda[n+1] + g[n+1]) + (what the loss reads inside slice n)
    lambda[n] <- out[n] + (dC_n/du)^T (lambda[n+1] - lambda_old[n+1])

Every rank pulls its slices back at once; the parameter gradient comes out of the same pull-back.
The residual max |out[n] - lambda[n]| is the error of the cotangents.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.scopes import FINE_ADJOINT, FINE_FORWARD
from nodepint_mpi.core.sweeps import BlockStates, chain_block, slice_distance
from nodepint_mpi.core.transposed import BlockCotangents, PullBack
from nodepint_mpi.core.types import Block, Params, State
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, cond, while_loop, work
from nodepint_mpi.parallel.exchange import (
    max_over_ranks,
    recv_left,
    recv_right,
    send_left,
    send_right,
)
from nodepint_mpi.parallel.methods import AbstractSweeps, Line, Memory, with_lefts

PATIENCE = 4
"""Sweeps in a row without a new smallest residual after which the fallback takes over."""


class AdjointRecord(NamedTuple):
    """What happened in an adjoint solve; equal on all ranks.

    `residual` is relative to the largest cotangent: an estimate of the gradient's error.
    """

    n_sweeps: Int[Array, ""]
    residual: Float[Array, ""]
    finite: Bool[Array, ""]


class Gradient(NamedTuple):
    """This rank's part of the gradient.

    `params` is the part of the owned slices: sum it over the ranks once. `initial` is the
    cotangent of the initial state, valid on the first rank. `lefts` (owned, *state) are the
    cotangents at the left edges of the owned slices, a warm start; the serial method has none.
    """

    params: Params
    initial: Inexact[Array, "*state"]
    lefts: Inexact[Array, "owned *state"] | None
    record: AdjointRecord


class _Iterate(NamedTuple):
    cotangents: BlockCotangents
    params_bar: Params
    record: AdjointRecord
    solved: Bool[Array, ""]
    best_residual: Float[Array, ""]
    n_stalled: Int[Array, ""]


def solve_adjoint(
    comm: TimeComm,
    params: Params,
    starts: Block,
    sources: SliceResult,
    guess: Block | None,
    memory: Memory | None = None,
    *,
    pull_back: PullBack,
    method: AbstractSweeps,
    tol: float,
    max_sweeps: int | None,
    owned: OwnedSlices,
) -> Gradient:
    """Solve for the cotangents at all slice boundaries at once.

    Collective over `comm`, inside jit. After k sweeps the last k + 1 slices are exact, so
    `n_slices - 1` sweeps always suffice. A method whose residual has not fallen for `PATIENCE`
    sweeps hands over to its fallback.

    Args:
        comm: Line of ranks along time.
        params: Parameters of the vector field, replicated.
        starts: States the pull-back was linearized at, (owned, *state).
        sources: Cotangents of what the loss reads inside the owned slices and at their ends.
        guess: Cotangents at the left edges of the owned slices to start from, on all ranks or
            none; without it the method's own iteration 0.
        memory: What the forward solve ended with: its basis and tangents serve here as well.
        pull_back: From `core.transposed.linearise_block`.
        method: How information travels between slices; not Serial.
        tol: Bound on the residual, relative to the largest cotangent. Zero asks for
            `max_sweeps` sweeps, whatever the residual.
        max_sweeps: Upper bound on the sweeps; `n_slices - 1` if not given.
        owned: The slices of this rank.

    Reference:
        Maday, Turinici (2002), C. R. Acad. Sci. 335, 387-392, for parareal of optimality systems.
    """
    line = Line(comm, owned, params)
    last = owned.n_slices - 1
    limit = last if max_sweeps is None else min(max_sweeps, last)
    linear, fallback = method.linearise(line, starts, memory), method.fallback()
    cotangents = (
        method.first_cotangents(line, linear, starts, sources)
        if guess is None
        else with_lefts(line, guess)
    )
    dtype = sources.end.dtype
    first = _Iterate(
        cotangents,
        jax.tree.map(jnp.zeros_like, params),
        AdjointRecord(jnp.array(0), jnp.zeros((), dtype), jnp.array(True)),
        jnp.array(False),
        jnp.full((), jnp.inf, dtype),
        jnp.array(0),
    )

    def sweep(iterate: _Iterate) -> _Iterate:
        old = iterate.cotangents
        with work(FINE_ADJOINT, Tally(fine_pulled=owned.n_owned)):
            params_bar, outs = pull_back(SliceResult(sources.saves, sources.end + old.rights))
        record = _judge_residual(comm, iterate, outs, sources, owned)
        stop = (record.residual <= tol) | (record.n_sweeps >= limit) | ~record.finite
        better = record.residual < iterate.best_residual
        waiting = jnp.where(better, 0, iterate.n_stalled + 1)
        n_stalled = jnp.where(iterate.n_stalled >= PATIENCE, iterate.n_stalled, waiting)

        def correct():
            def own():
                return method.correct_cotangents(line, linear, starts, outs, old)

            def other():
                assert fallback is not None
                at_starts = fallback.linearise(line, starts, None)
                return fallback.correct_cotangents(line, at_starts, starts, outs, old)

            if fallback is None:
                corrected = own()
            else:
                corrected = cond(n_stalled >= PATIENCE, other, own)
            return corrected, record._replace(n_sweeps=record.n_sweeps + 1)

        def keep():
            return BlockCotangents(outs, old.rights), record

        cotangents, record = cond(stop, keep, correct)
        best = jnp.minimum(record.residual, iterate.best_residual)
        return _Iterate(cotangents, params_bar, record, stop, best, n_stalled)

    final = while_loop(lambda iterate: ~iterate.solved, sweep, first)
    lefts = final.cotangents.lefts
    return Gradient(final.params_bar, lefts[0], lefts, final.record)


class SerialLine(NamedTuple):
    """A serial forward pass and what its pull-back needs."""

    states: BlockStates
    result: SliceResult
    pull_back: PullBack


def linearise_serially(
    comm: TimeComm, fine: Propagator, params: Params, initial: State, owned: OwnedSlices
) -> SerialLine:
    """Propagate slice after slice and rank after rank, ready to be pulled back. Collective."""

    def propagate(params, incoming):
        starts, result = chain_block(fine, params, incoming, owned)
        return result, starts

    incoming = recv_left(comm, initial)
    with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
        result, pull_back, starts = jax.vjp(propagate, params, incoming, has_aux=True)
    send_right(comm, result.end[-1])
    return SerialLine(BlockStates(starts, result.end), result, pull_back)


def pull_back_serially(comm: TimeComm, line: SerialLine, sources: SliceResult) -> Gradient:
    """Pull back rank after rank, from the last to the first. Collective."""
    incoming = recv_right(comm, jnp.zeros_like(sources.end[-1]))
    end = sources.end.at[-1].add(incoming)
    with work(FINE_ADJOINT, Tally(fine_pulled=len(end))):
        params_bar, left = line.pull_back(SliceResult(sources.saves, end))
    send_left(comm, left)
    broken = max_over_ranks(comm, (~jnp.all(jnp.isfinite(left))).astype(left.dtype))
    record = AdjointRecord(jnp.array(0), jnp.zeros((), left.dtype), broken == 0)
    return Gradient(params_bar, left, None, record)


def _judge_residual(comm, iterate, outs, sources, owned) -> AdjointRecord:
    """Relative residual of the interface cotangents; nothing depends on the first slice's."""
    interior = jnp.asarray(owned.indices) > 0
    misfit = slice_distance(outs, iterate.cotangents.lefts)
    local = jnp.stack(
        [
            jnp.max(jnp.where(interior, misfit, 0.0)),
            jnp.max(jnp.abs(outs)),
            jnp.max(jnp.abs(sources.end)),
            (~jnp.all(jnp.isfinite(outs))).astype(misfit.dtype),
        ]
    )
    misfit, largest_out, largest_source, broken = max_over_ranks(comm, local)
    scale = jnp.maximum(largest_out, largest_source)
    return iterate.record._replace(
        residual=jnp.where(scale > 0, misfit / jnp.where(scale > 0, scale, 1.0), 0.0),
        finite=broken == 0,
    )
