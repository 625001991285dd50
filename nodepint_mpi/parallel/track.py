"""Following a solution while its parameters change: one sweep forward and one back.

A new optimizer step moves the solution little, so its sweeps start from what the last ones left,
the tracks. Every rank solves its slices once, and pulls them back once:

    U <- (the method's iteration 0 from the track)        fine ends F_n(U[n])
    lambda <- (the same, transposed)                      pull-back of lambda[n+1] + g[n+1]

With parareal the tracks are the defects of the coarse propagator, F_n(U[n]) - G_n(U[n]), and those
of its transpose. New parameters enter by G at once; only the defects are a step old. This is the
tau correction of full approximation schemes, applied along training.

Reference:
    Brandt (1977), Math. Comp. 31, 333-390, section 4.2, for the tau correction.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.core.scopes import FINE_ADJOINT, FINE_FORWARD
from nodepint_mpi.core.transposed import linearise_block
from nodepint_mpi.core.types import Block, Params, State
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.counters import Tally, work
from nodepint_mpi.parallel.differentiate import TimeSolver
from nodepint_mpi.parallel.exchange import in_order
from nodepint_mpi.parallel.failure import warn_of_drift
from nodepint_mpi.parallel.methods import AbstractSweeps, Line, Memory


class Tracks(NamedTuple):
    """What is kept of the last sweeps: a block each way, and what the method has learned.

    (owned, samples, *state), or None before the first. What the blocks mean is the method's.
    """

    states: Block | None = None
    cotangents: Block | None = None
    memory: Memory | None = None


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
    """This rank's part of the gradient; `initial` is valid on the first rank."""

    params: Params
    initial: Inexact[Array, "*state"]
    misfits: Misfits
    tracks: Tracks


def follow(
    comm: TimeComm,
    solver: TimeSolver,
    params: Params,
    initial: State,
    tracks: Tracks,
    owned: OwnedSlices,
    read_loss: Callable[[SliceResult], tuple[SliceResult, Any]],
) -> tuple[Followed, Any]:
    """One sweep forward and one back from the tracks. Collective over `comm`, inside jit.

    Args:
        comm: Line of ranks along time.
        solver: Propagators and method, which is not Serial.
        params: Parameters of the vector field, replicated.
        initial: State at the first edge, (*state). Read on the first rank only.
        tracks: Of the last sweeps; all None to begin with.
        owned: The slices of this rank.
        read_loss: Local: from the owned slices to the cotangents of what the loss reads there,
            and whatever else it finds, which is returned.
    """
    line, method = Line(comm, owned, params), solver.method
    assert isinstance(method, AbstractSweeps)  # the serial one has nothing to follow
    begun = method.resume(line, initial, tracks.states, tracks.memory)
    states = begun.states
    with work(FINE_FORWARD, Tally(fine=owned.n_owned)):
        result, pull_back = linearise_block(
            solver.fine, params, states.starts, owned, at_once=solver.slices_at_once
        )
    result = result._replace(end=in_order(comm, result.end))
    warn_of_drift(comm, solver.fine, params, states.starts, result.end, owned, again=False)
    sources, found = read_loss(result)
    linear = method.linearise(line, states.starts, begun.memory)
    old = method.resume_cotangents(line, linear, states.starts, sources, tracks.cotangents)
    with work(FINE_ADJOINT, Tally(fine_pulled=owned.n_owned)):
        params_bar, outs = pull_back(SliceResult(sources.saves, sources.end + old.rights))
    track, memory = method.track(line, initial, states, result.end, begun.memory)
    cotrack = method.track_cotangents(line, linear, states.starts, outs, old, tracks.cotangents)
    indices = jnp.asarray(owned.indices).reshape(-1, *[1] * (outs.ndim - 1))
    last = owned.n_slices - 1  # nothing starts at its end, and nothing reads the first cotangent
    misfits = Misfits(
        jnp.sum(jnp.where(indices < last, result.end - states.ends, 0.0) ** 2),
        jnp.sum(result.end**2),
        jnp.sum(jnp.where(indices > 0, outs - old.lefts, 0.0) ** 2),
        jnp.sum(outs**2),
    )
    kept = method.recalled(*method.kept(memory))
    return Followed(params_bar, outs[0], misfits, Tracks(track, cotrack, kept)), found


def _relative(part: Array, whole: Array) -> Array:
    return jnp.sqrt(jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0))
