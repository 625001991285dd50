"""Tracking in a training loop of the user's own: one sweep each way per step, from the last ones.

An optimizer step moves the solution little, so the next solve starts from what the last one left.
Half of that is known only when the cotangents have come back, so it cannot be a result of the
forward solve: it comes out of the derivative. `value_and_grad` differentiates with respect to a
slot besides the parameters, whose cotangent is defined to be what the sweeps leave.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.methods.base import Carry, no_carry
from nodepint_mpi.parallel.replicated import Slot
from nodepint_mpi.parallel.warm_start import Misfits

_ONCE = (
    "The loss must call `nm.solve(..., carry=carry)` exactly once, outside of functions under "
    "`jax.jit` of its own"
)


class SolveCarry(eqx.Module):
    """What a tracked step leaves for the next; `SolveCarry()` to begin with, when nothing is known.

    A tree of arrays, so it may go through `jax.jit`. Its rows are those of this rank's slices:
    it differs between ranks, and belongs to these slices, this number of ranks and these samples.
    """

    carry: Carry = eqx.field(default_factory=no_carry)
    misfits: Misfits | None = None

    @property
    def jump(self) -> Float[Array, ""]:
        """Root mean square of the jumps that the step left, relative to the states.

        NaN at first, and after a step that was not finite. Equal on all ranks.
        """
        if self.misfits is None:
            return jnp.array(jnp.nan)
        return jnp.where(jnp.isfinite(self.misfits.states), self.misfits.jump(), jnp.nan)

    @property
    def residual(self) -> Float[Array, ""]:
        """The same of the cotangents, relative to these."""
        if self.misfits is None:
            return jnp.array(jnp.nan)
        return jnp.where(jnp.isfinite(self.misfits.cotangents), self.misfits.residual(), jnp.nan)


class LentCarry:
    """What a loss gets and hands on to its one `solve`. No tree, so that it is used in one trace.

    Without a `slot` nothing is differentiated: the solve says what it would leave (`found`).
    """

    def __init__(self, carry: Carry, slot: Slot | None):
        self.carry, self.slot, self.found, self.n_uses = carry, slot, [], 0

    def take(self, n_owned: int) -> tuple[Carry, Slot | None]:
        """For the solve that uses it, with `n_owned` slices on this rank. Local.

        Raises:
            ProblemError: if another has, or it is of other slices.
        """
        self.n_uses += 1
        if self.n_uses > 1:
            raise ProblemError(f"{_ONCE}; it does so again.")
        for name, rows in self.carry.rows.items():
            if len(rows) != n_owned:
                raise ProblemError(
                    f"The carry holds {name} of {len(rows)} slices, and this rank owns {n_owned}: "
                    "begin with `nm.SolveCarry()` when `edges` or the number of ranks change."
                )
        return self.carry, self.slot


def value_and_grad(loss: Callable, *, has_aux: bool = False) -> Callable:
    """A loss of a tracked solve as a function of value, gradient and carry.

    Local to make. What it returns is collective over the ranks of the solve, as `solve` is, and
    may be called inside `jax.jit`:

        value, gradient, carry = nm.value_and_grad(loss)(params, carry, *rest)

    `loss(params, carry, *rest)` calls `nm.solve(..., carry=carry)` exactly once, computes the same
    number on every rank from `ys` or `interface`, and may depend on `params` in any other way. In a
    loop that changes `params` little from step to step, each step does one sweep forward and one
    back from where the last ones ended: every rank propagates its slices once and pulls them back
    once. Value and gradient are as near as these sweeps are, and converge to those of `jax.grad`
    through a plain `solve` where `params` come to rest: see `SolveCarry.jump` and `residual`. These
    are the steps that `nodepint train` takes with `[time.tracking]`, without its control of the
    gradient's error: repeat the call at the same `params` to sweep again.

    The carry cannot be a result of `solve`: half of it is the cotangents', which are known only
    after the loss. The first call, with an empty carry, looks at the loss twice, and a function
    under `jax.jit` is compiled once more when the carry is no longer empty.

    Args:
        loss: See above. With `has_aux` it returns its value and anything else.
        has_aux: Whether it does.

    Returns:
        A function `(params, carry, *rest) -> (value, gradient, carry)`, or with `has_aux`
        `((value, aux), gradient, carry)`. `params` is any tree; the gradient is that of its
        floating-point arrays, with None for all else, whole and equal on all ranks. `carry` is a
        `SolveCarry`.

    Raises:
        ProblemError: by that function, if the loss does not solve once, or the carry is of other
            slices or another method.
    """

    def with_carry(params: PyTree, carry: SolveCarry, *rest: Any) -> tuple[Any, PyTree, SolveCarry]:
        if not isinstance(carry, SolveCarry):
            raise ProblemError(
                f"`carry` is a {type(carry).__name__}; pass `nm.SolveCarry()` first, and then what "
                "the last call returned."
            )
        like = carry.carry
        if not jax.tree.leaves(like):
            lent = LentCarry(like, None)
            eqx.filter_eval_shape(lambda: loss(params, lent, *rest))
            if not lent.found:
                raise ProblemError(f"{_ONCE}; it does not.")
            like = lent.found[0]
        wanted, others = eqx.partition(params, eqx.is_inexact_array)

        def of(variables):
            wanted, slot = variables
            lent = LentCarry(carry.carry, slot)
            found = loss(eqx.combine(wanted, others), lent, *rest)
            if not lent.n_uses:
                raise ProblemError(f"{_ONCE}; it does not.")
            return found

        slot = _slot_like(like)
        value, (gradient, left) = jax.value_and_grad(of, has_aux=has_aux)((wanted, slot))
        kept = jax.tree.map(lambda new, old: new.astype(old.dtype), left.carry, like)
        return value, gradient, SolveCarry(kept, left.misfits)

    return with_carry


def _slot_like(carry: Carry) -> Slot:
    """Zeros for what such a carry holds."""

    def zeros(leaf: Any) -> Array:
        real = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jnp.zeros(leaf.shape, leaf.dtype if real else float)

    slot = jax.tree.map(zeros, carry)
    row = jax.tree.leaves(slot.rows)[0]
    return Slot(slot, Misfits(*(jnp.zeros((), row.dtype) for _ in Misfits._fields)))
