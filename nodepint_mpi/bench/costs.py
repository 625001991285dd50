"""What sweeps cost, counted in field evaluations and given in fine solves of one slice."""

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nodepint_mpi.bench.cases import SweepCase
from nodepint_mpi.core.evaluations import evaluations
from nodepint_mpi.core.propagators import AbstractIntegrator, Propagator
from nodepint_mpi.core.types import Params
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.methods.parareal import Parareal
from nodepint_mpi.parallel.methods.reduced import Reduced
from nodepint_mpi.parallel.methods.tangent import Tangent

DEFINITION = """\
work: fine-solve equivalents, the field evaluations of a slice over those of one fine solve of it, a
mean over slices: a serial solve has 1. A sweep costs a fine solve of every unfinished slice, a pass
for every direction pushed and one for every 8 of them, and its coarse passes; one from slice to
slice costs nothing where a slice is finished. An implicit solver counts by measured time. path:
the same along the longest chain of passes with a rank for every slice, where a coarse pass from
slice to slice counts once for each that is not finished; a serial solve has n_slices. Adjoint:
likewise in fine pull-backs of a slice, of which none is finished."""
TIMED_RUNS = 7


class Cost(NamedTuple):
    """Passes over a slice besides fine solves, each in fine solves of a slice.

    `first` is walked from slice to slice in iteration 0, `walked` by unfinished slices in every
    sweep, `spread` is done by all slices at once; `tangent` is one direction. `pulled` is walked in
    every adjoint sweep, `linearised` is spread before the first, but for tangents taken anew.
    """

    first: float
    walked: float
    spread: float
    tangent: float
    pulled: float
    linearised: float


def seconds_per_slice(propagator: Propagator, params: Params, start: jax.Array, t1: float) -> float:
    """Median time of one slice [0, t1], compiled. Local."""
    ends = jnp.asarray([0.0, t1], start.dtype)

    @jax.jit
    def propagate(params, start):
        return propagator(params, start, ends[0], ends[1], ends[:0]).end

    times = []
    for _ in range(TIMED_RUNS + 1):
        began = time.perf_counter()
        jax.block_until_ready(propagate(params, start))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def fine_equivalents(case: SweepCase, integrator: AbstractIntegrator) -> float:
    """One slice by `integrator` in fine solves of it, by evaluations or else by time. Local."""
    n_fine, n_other = evaluations(case.fine), evaluations(integrator)
    if n_fine is not None and n_other is not None:
        return n_other / n_fine
    problem = case.problem
    params, start = jax.tree.map(jnp.asarray, (problem.args, problem.initial))
    length = (problem.span[1] - problem.span[0]) / case.n_slices
    seconds, fine_seconds = (
        seconds_per_slice(Propagator(problem.field, steps), params, start, length)
        for steps in (integrator, case.fine)
    )
    return seconds / fine_seconds


def method_cost(method: AbstractMethod | None, weights: Mapping[Any, float]) -> Cost:
    """What one sweep of a method does; nothing besides fine solves if it is none of ours. Local.

    Args:
        method: Parareal, Tangent or Reduced.
        weights: Fine-solve equivalents of every integrator in use.
    """
    coarse = getattr(method, "coarse", None)
    weight = 0.0 if coarse is None else weights[coarse.integrator]
    match method:
        case Parareal():
            return Cost(weight, weight, 0.0, 0.0, weight, 0.0)
        case Tangent(use_complement=both):
            n_walks = both * (2 if method.basis.n_new else 1)  # the first predicts directions
            tangent = weights[method.propagator.integrator]
            return Cost(weight, n_walks * weight, n_walks * weight, tangent, both * weight, 0.0)
        case Reduced(use_complement=both):
            # A stage of the reduced field costs one of the full field.
            reduced = weights[method.coarse.integrator]
            passes = reduced + both * weight
            slopes = 0.0 if both else reduced * (1 + (method.basis.rank or 0))
            return Cost(weight, passes, passes, 0.0, both * passes, slopes)
    return Cost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
