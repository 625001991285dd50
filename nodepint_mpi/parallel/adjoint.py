"""The backward direction: cotangents at all slice boundaries, and the gradient they lead to.

    out[n] = (dF_n/du)^T (lambda[n+1] + g[n+1]) + (what the loss reads inside slice n)
    lambda[n] <- out[n] + (dC_n/du)^T (lambda[n+1] - lambda_old[n+1])

Every rank pulls its slices back at once; the parameter gradient comes out of the same pull-back.
The residual max |out[n] - lambda[n]| is the error of the cotangents.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int

from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.scopes import FINE_ADJOINT, SWEEP, scope
from nodepint_mpi.core.sweeps import slice_distance
from nodepint_mpi.core.transposed import BlockCotangents, PullBack
from nodepint_mpi.core.types import Block, Params
from nodepint_mpi.parallel.counters import Tally, note, work
from nodepint_mpi.parallel.exchange import max_over_ranks
from nodepint_mpi.parallel.iterate import (
    AbstractDirection,
    OnIterate,
    TimeSolver,
    Verdict,
    iterate,
)
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods.base import Carry, Coswept, Memory, no_carry
from nodepint_mpi.parallel.methods.serial import Walk, walk_back

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
    cotangent of the initial state, valid on the first rank. `seen` is what `on_iterate` has
    gathered.
    """

    params: Params
    initial: Inexact[Array, "*state"]
    record: AdjointRecord
    seen: object = None


class Coiterate(NamedTuple):
    """Cotangents, and the gradient that the last pull-back gave: `initial_bar` leaves to the left.

    `solved` ends the iteration. `n_stalled` counts sweeps in a row without a new smallest residual.
    """

    cotangents: BlockCotangents
    params_bar: Params
    initial_bar: Inexact[Array, "*state"]
    record: AdjointRecord
    solved: Bool[Array, ""]
    best_residual: Float[Array, ""]
    n_stalled: Int[Array, ""]


class Linear(NamedTuple):
    """The fine propagator, linearized on the owned slices: where, by what, and how to pull back.

    `memory` is what the forward sweeps ended with: its basis and tangents serve here as well.
    """

    starts: Block
    memory: Memory
    pull_back: PullBack


def solve_adjoint(
    line: Line,
    solver: TimeSolver,
    linear: Linear,
    sources: SliceResult,
    carry: Carry | None = None,
    on_iterate: OnIterate | None = None,
    seen: object = None,
) -> Gradient:
    """Solve for the cotangents at all slice boundaries at once.

    Collective over the line, inside jit. After k sweeps the last k + 1 slices are exact, so
    `n_slices - 1` sweeps always suffice. A method whose residual has not fallen for `PATIENCE`
    sweeps hands over to its fallback.

    Args:
        line: Ranks along time, and the parameters of the vector field.
        solver: Method, and the tolerance of the residual relative to the largest cotangent; zero
            asks for all sweeps, whatever the residual.
        linear: The fine propagator at the states the forward solve ended with.
        sources: Cotangents of what the loss reads inside the owned slices and at their ends.
        carry: What an earlier solve left, or a guess, on all ranks or none; without it the
            method's own iteration 0.
        on_iterate: Called after every sweep; see `parallel.iterate`.
        seen: What it begins with.

    Reference:
        Maday, Turinici (2002), C. R. Acad. Sci. 335, 387-392, for parareal of optimality systems.
    """
    with scope(SWEEP):
        begun = solver.method.adjoint_init(
            line, linear.starts, linear.memory, sources, no_carry() if carry is None else carry
        )
        backward = Backward(line, solver, linear, sources, begun.linear)
        last, seen = iterate(backward, backward.first(begun.cotangents), on_iterate, seen)
    return Gradient(last.params_bar, last.initial_bar, last.record, seen)


class Backward(AbstractDirection[Coiterate]):
    """From right to left: every slice pulled back, residuals, the method's transposed sweep."""

    def __init__(self, line: Line, solver: TimeSolver, linear: Linear, sources, at_starts):
        last, most = line.owned.n_slices - 1, solver.adjoint_max_sweeps
        self.line, self.solver, self.linear, self.sources = line, solver, linear, sources
        self.limit = last if most is None else min(most, last)
        self.at_starts, self.fallback = at_starts, solver.method.fallback()

    def first(self, cotangents: BlockCotangents) -> Coiterate:
        """Before anything was pulled back."""
        end = self.sources.end
        dtype = end.dtype
        return Coiterate(
            cotangents,
            jax.tree.map(jnp.zeros_like, self.line.params),
            jnp.zeros_like(end[0]),
            AdjointRecord(jnp.array(0), jnp.zeros((), dtype), jnp.array(True)),
            jnp.array(False),
            jnp.full((), jnp.inf, dtype),
            jnp.array(0),
        )

    def is_going(self, iterate):
        return ~iterate.solved

    def propagate(self, iterate):
        sources = self.sources
        note(SWEEP, swept=self.line.owned.n_owned)
        with work(FINE_ADJOINT, Tally(fine_pulled=self.line.owned.n_owned)):
            end = sources.end + iterate.cotangents.rights
            return self.linear.pull_back(SliceResult(sources.saves, end))

    def judge(self, iterate, propagated):
        params_bar, outs = propagated
        record = judge_residual(self.line, iterate, outs, self.sources)
        tol = self.solver.adjoint_tol
        stop = (record.residual <= tol) | (record.n_sweeps >= self.limit) | ~record.finite
        better = record.residual < iterate.best_residual
        waiting = jnp.where(better, 0, iterate.n_stalled + 1)
        n_stalled = jnp.where(iterate.n_stalled >= PATIENCE, iterate.n_stalled, waiting)
        best = jnp.minimum(record.residual, iterate.best_residual)
        judged = Coiterate(iterate.cotangents, params_bar, outs[0], record, stop, best, n_stalled)
        falls_back = n_stalled >= PATIENCE
        return judged, Verdict(~stop, falls_back, falls_back & (iterate.n_stalled < PATIENCE))

    def correct(self, iterate, propagated):
        coswept = Coswept(iterate.cotangents, self.at_starts)
        return self._swept(self.solver.method, iterate, coswept, propagated)

    def fall_back(self, iterate, propagated, verdict):
        del verdict
        assert self.fallback is not None  # else nothing falls back
        return self._swept(self.fallback, iterate, Coswept(iterate.cotangents, None), propagated)

    def _swept(self, method, iterate, coswept, propagated):
        _, outs = propagated
        after = method.adjoint_sweep(self.line, self.linear.starts, coswept, outs)
        record = iterate.record._replace(n_sweeps=iterate.record.n_sweeps + 1)
        return iterate._replace(cotangents=after.cotangents, record=record)

    def keep(self, iterate, propagated):
        _, outs = propagated
        return iterate._replace(cotangents=BlockCotangents(outs, iterate.cotangents.rights))


def judge_residual(line: Line, iterate: Coiterate, outs: Block, sources) -> AdjointRecord:
    """Relative residual of the interface cotangents; nothing depends on the first slice's."""
    interior = jnp.asarray(line.owned.indices) > 0
    misfit = slice_distance(outs, iterate.cotangents.lefts)
    local = jnp.stack(
        [
            jnp.max(jnp.where(interior, misfit, 0.0)),
            jnp.max(jnp.abs(outs)),
            jnp.max(jnp.abs(sources.end)),
            (~jnp.all(jnp.isfinite(outs))).astype(misfit.dtype),
        ]
    )
    misfit, largest_out, largest_source, broken = max_over_ranks(line.comm, local)
    scale = jnp.maximum(largest_out, largest_source)
    return iterate.record._replace(
        residual=jnp.where(scale > 0, misfit / jnp.where(scale > 0, scale, 1.0), 0.0),
        finite=broken == 0,
    )


def pull_back_walk(line: Line, walked: Walk, sources: SliceResult) -> Gradient:
    """The gradient of a serial solve, rank after rank. Collective, inside jit."""
    params_bar, left = walk_back(line, walked, sources)
    broken = max_over_ranks(line.comm, (~jnp.all(jnp.isfinite(left))).astype(left.dtype))
    record = AdjointRecord(jnp.array(0), jnp.zeros((), left.dtype), broken == 0)
    return Gradient(params_bar, left, record)
