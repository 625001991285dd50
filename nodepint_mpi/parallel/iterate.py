"""The iteration, the same for states and for cotangents.

Every sweep does four things: the slices are solved (or pulled back) all at once; the ranks judge
what that gives and agree; a correction travels along the line; and they go on or stop.

    forward    U[n+1]    <- F(U_old[n]) + C(U[n]) - C(U_old[n])                   `parallel.solve`
    backward   lambda[n] <- out[n] + (dC_n/du)^T (lambda[n+1] - lambda_old[n+1])  `parallel.adjoint`

Everything runs inside one jitted function on every rank of the line. Loop conditions are made from
numbers that all ranks agreed on.
"""

import abc
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
from jaxtyping import Array, Bool

from nodepint_mpi.core.partition import OwnedSlices
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.stopping import AbstractStopping
from nodepint_mpi.parallel.counters import Tally, cond, count, counting, while_loop
from nodepint_mpi.parallel.methods.base import AbstractMethod

It = TypeVar("It")
OnIterate = Callable[[Any, Any, Tally], Any]
"""What a bench sees of every iterate: `(seen, iterate, tally) -> seen`, with what this rank did for
it. It may be collective; what it returns has the structure of what it gets."""


class TimeSolver(eqx.Module):
    """Everything that fixes a time-parallel solve but the numbers: F, method, tolerances.

    `adjoint_tol` bounds the residual of the cotangents relative to the largest of them;
    `adjoint_max_sweeps` the number of adjoint sweeps. `slices_at_once` is the number of slices a
    rank propagates as one batch, all its own if None: few where a core is busy with one, so that
    finished slices are passed over; many on a GPU. `n_batch_axes` leading axes of a state count
    samples, whose sweeps are recorded one by one.
    """

    fine: Propagator
    method: AbstractMethod
    stopping: AbstractStopping
    adjoint_tol: float = eqx.field(static=True)
    adjoint_max_sweeps: int | None = eqx.field(static=True, default=None)
    slices_at_once: int | None = eqx.field(static=True, default=None)
    n_batch_axes: int = eqx.field(static=True, default=0)

    def walks(self, owned: OwnedSlices) -> bool:
        """Whether there is nothing to iterate over. Local; equal on all ranks."""
        return not self.method.iterates or owned.n_slices == 1


class Verdict(NamedTuple):
    """What the ranks agree on before the correction of a sweep.

    `goes_on` says that a correction is wanted, `falls_back` that the method's fallback makes it,
    `taken_over` that it does so for the first time.
    """

    goes_on: Bool[Array, ""]
    falls_back: Bool[Array, ""]
    taken_over: Bool[Array, ""]


class AbstractDirection(abc.ABC, Generic[It]):
    """One way through time: what a sweep does there. All but `is_going` are collective."""

    fallback: AbstractMethod | None

    @abc.abstractmethod
    def is_going(self, iterate: It) -> Bool[Array, ""]:
        """Whether another sweep is to follow. Local; equal on all ranks."""

    @abc.abstractmethod
    def propagate(self, iterate: It) -> Any:
        """The slices of this rank, all at once: where the time goes. Local."""

    @abc.abstractmethod
    def judge(self, iterate: It, propagated: Any) -> tuple[It, Verdict]:
        """How good the iterate is, from what its slices gave."""

    @abc.abstractmethod
    def correct(self, iterate: It, propagated: Any) -> It:
        """The method's correction."""

    @abc.abstractmethod
    def fall_back(self, iterate: It, propagated: Any, verdict: Verdict) -> It:
        """The correction of the method's fallback."""

    @abc.abstractmethod
    def keep(self, iterate: It, propagated: Any) -> It:
        """The last iterate, where no correction is wanted. Local."""


def iterate(
    direction: AbstractDirection[It],
    first: It,
    on_iterate: OnIterate | None = None,
    seen: Any = None,
) -> tuple[It, Any]:
    """Sweep until the direction has come to its end. Collective over the line, inside jit.

    Args:
        direction: Forward or backward.
        first: Iteration 0.
        on_iterate: Called after every sweep with what it has seen so far.
        seen: What it begins with.

    Returns:
        The last iterate, and what was seen.
    """

    def sweep(iterate: It) -> It:
        propagated = direction.propagate(iterate)
        judged, verdict = direction.judge(iterate, propagated)

        def corrected() -> It:
            def own() -> It:
                return direction.correct(judged, propagated)

            if direction.fallback is None:
                return own()
            return cond(
                verdict.falls_back,
                lambda: direction.fall_back(judged, propagated, verdict),
                own,
                usual=False,
            )

        return cond(
            verdict.goes_on, corrected, lambda: direction.keep(judged, propagated), usual=None
        )

    def step(carry: tuple[It, Any]) -> tuple[It, Any]:
        old, seen = carry
        with counting() as ledger:
            new = sweep(old)
        count(ledger.tally)
        return new, seen if on_iterate is None else on_iterate(seen, new, ledger.tally)

    return while_loop(lambda carry: direction.is_going(carry[0]), step, (first, seen))
