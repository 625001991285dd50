"""When a slice counts as solved, and when the iteration gives up."""

import abc
from typing import Any, ClassVar, Literal, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nodepint_mpi.core.types import Norm
from nodepint_mpi.errors import ProblemError


class AbstractStopping(eqx.Module):
    """A rule that moves the frozen front: slices left of it never change again.

    The front walks right over consecutive solved slices and stops at the first unsolved one.
    Whatever the rule, the first slice right of the front becomes exact in each sweep, so
    `n_slices` sweeps always suffice.
    """

    freezes_by_update: ClassVar[bool] = False
    """Whether slices are frozen without a fine solve from their frozen start."""
    judges_end: ClassVar[bool] = False
    """Whether all slices are frozen as soon as the last one changes little enough."""

    @property
    def norm(self) -> Norm:
        """What measures the change of a slice and its jump, over all samples together. Local."""
        return "max"

    @abc.abstractmethod
    def sweep_limit(self, n_slices: int) -> int:
        """The largest number of sweeps, at most `n_slices`. Local."""

    @abc.abstractmethod
    def unsolved_by_jump(self, jumps: Float[Array, "owned ..."]) -> Bool[Array, "owned ..."]:
        """Slices still unsolved, judged by their jumps before the correction. Local."""

    @abc.abstractmethod
    def unsolved_by_update(
        self, start_updates: Float[Array, "owned ..."], end_updates: Float[Array, "owned ..."]
    ) -> Bool[Array, "owned ..."]:
        """Slices still unsolved, judged by the change of their ends by the correction. Local."""


class JumpTolerance(AbstractStopping):
    """Stop when every jump is at most `tol`: maximum norm, absolute, in the state's units."""

    tol: float = eqx.field(static=True)
    max_sweeps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _check_positive("tol", self.tol)
        _check_sweeps(self.max_sweeps, least=1)

    def sweep_limit(self, n_slices):
        return min(self.max_sweeps or n_slices, n_slices)

    def unsolved_by_jump(self, jumps):
        return ~(jumps <= self.tol)

    def unsolved_by_update(self, start_updates, end_updates):
        return jnp.ones_like(end_updates, dtype=bool)


class FixedSweeps(AbstractStopping):
    """Do `n_sweeps` sweeps, whatever the jumps."""

    n_sweeps: int = eqx.field(static=True)

    def __check_init__(self):
        _check_sweeps(self.n_sweeps, least=0)

    def sweep_limit(self, n_slices):
        return min(self.n_sweeps, n_slices)

    def unsolved_by_jump(self, jumps):
        return jnp.ones_like(jumps, dtype=bool)

    def unsolved_by_update(self, start_updates, end_updates):
        return jnp.ones_like(end_updates, dtype=bool)


class AbstractUpdateRule(AbstractStopping):
    """A rule on how much a sweep changes, whatever the jumps."""

    freezes_by_update: ClassVar[bool] = True

    def unsolved_by_jump(self, jumps):
        return jnp.ones_like(jumps, dtype=bool)


class FreezeSlices(AbstractUpdateRule):
    """The slice-freezing rules of the published parareal codes: strictly less than `eps`.

    `where = "end"` freezes a slice end once it changes by less than `eps` in a sweep (Gattiglio
    et al., arXiv:2405.12182); `"start"` looks at the slice's start instead, which freezes one
    slice further (Pentland et al., Statistics and Computing 33:20, 2023).
    """

    eps: float = eqx.field(static=True)
    where: Literal["start", "end"] = eqx.field(static=True, default="end")
    max_sweeps: int | None = eqx.field(static=True, default=None)
    measure: Norm = eqx.field(static=True, default="max")
    """The largest change of a number, or the root mean square or mean of all samples' changes."""

    def __check_init__(self):
        _check_positive("eps", self.eps)
        _check_norm(self.measure)
        if self.where not in ("start", "end"):
            raise ProblemError(f"`where` is {self.where!r}; choose 'start' or 'end'.")
        _check_sweeps(self.max_sweeps, least=1)

    @property
    def norm(self):
        return self.measure

    def sweep_limit(self, n_slices):
        return min(self.max_sweeps or n_slices, n_slices)

    def unsolved_by_update(self, start_updates, end_updates):
        updates = end_updates if self.where == "end" else start_updates
        return ~(updates < self.eps)


class EndUpdate(AbstractUpdateRule):
    """Stop once the end of the last slice changes by less than `tol` in a sweep.

    No other slice is frozen by its change. Says little about the error: a sweep may change little
    because it gains little.

    Reference:
        Selvam, Merchant, Ermon (2024), Self-refining diffusion samplers, algorithm 1 (the mean).
    """

    judges_end: ClassVar[bool] = True

    tol: float = eqx.field(static=True)
    measure: Norm = eqx.field(static=True, default="mean")
    max_sweeps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _check_positive("tol", self.tol)
        _check_norm(self.measure)
        _check_sweeps(self.max_sweeps, least=1)

    @property
    def norm(self):
        return self.measure

    def sweep_limit(self, n_slices):
        return min(self.max_sweeps or n_slices, n_slices)

    def unsolved_by_update(self, start_updates, end_updates):
        return ~(end_updates < self.tol)


def _check_norm(value: Any) -> None:
    if value not in get_args(Norm):
        raise ProblemError(f"`measure` is {value!r}; choose 'max', 'rms' or 'mean'.")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ProblemError(f"`{name}` is {value!r}; it must be a number greater than zero.")


def _check_sweeps(value: Any, least: int) -> None:
    if value is None and least == 1:  # as many as there are slices
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ProblemError(
            f"The number of sweeps is {value!r}; it must be a whole number of at least {least}."
        )
