"""What `solve_paraopt` is asked for, and what it returns."""

import enum
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from nodepint_mpi.errors import ProblemError
from nodepint_mpi.optimal_control.schemes import make_scheme


@dataclass(frozen=True, eq=False)
class ParaOpt:
    """Options of ParaOpt, Newton's method on states and multipliers at the slice edges.

    Newton's matrix has the derivatives of slices with `coarse_steps` steps, `ratio` of the fine
    ones: with all of them the method is Newton's, with fewer a sweep costs less and the iteration
    converges linearly. The solution is that of the fine steps in any case.

    Attributes:
        n_steps: Fine steps of a slice.
        ratio: Coarse steps of a slice as a share of the fine ones, which it must divide. All of
            them unless this or `coarse_steps` is given.
        coarse_steps: Coarse steps of a slice, any number from 1 to `n_steps`.
        scheme: "implicit_euler", as in the reference, order one; or "implicit_midpoint", order two,
            whose solution minimizes the discrete cost.
        linearize: What the derivatives are taken at: "coarse", the solution by coarse steps with
            the same ends, as in the reference; or "fine", the fine solution at the coarse nodes,
            which saves solving the coarse problems and cannot fail where these have no solution.
        start: "line", states on the straight line to the target and multipliers one, as in the
            reference; or "coarse", the solution of the whole problem by coarse steps, which the
            first rank computes.
        basis: For large states, derivatives along r directions only: the number r of leading
            singular vectors of states and multipliers of the coarse solution of the whole problem,
            or an array (state, r), whose columns are made orthonormal. What lies outside is
            corrected by the jumps alone, as in Picard's iteration.
        tol: Euclidean norm of the changes of all states and multipliers at edges below which the
            iteration has converged, as in the reference.
        max_sweeps: Largest number of sweeps.

    Raises:
        ProblemError: if they do not fit together.
    """

    n_steps: int
    ratio: float | Fraction | None = None
    coarse_steps: int | None = None
    scheme: str = "implicit_euler"
    linearize: Literal["coarse", "fine"] = "coarse"
    start: Literal["line", "coarse"] = "line"
    basis: Any = None
    tol: float = 1e-9
    max_sweeps: int = 50

    def __post_init__(self) -> None:
        make_scheme(self.scheme)
        for name, choices in (("linearize", ("coarse", "fine")), ("start", ("line", "coarse"))):
            if getattr(self, name) not in choices:
                raise ProblemError(
                    f"`{name}` is {getattr(self, name)!r}; choose from {', '.join(choices)}."
                )
        for name in ("n_steps", "max_sweeps"):
            if getattr(self, name) < 1:
                raise ProblemError(f"`{name}` is {getattr(self, name)}; it must be 1 or more.")
        if not self.tol > 0:
            raise ProblemError(f"`tol` is {self.tol}; it must be positive.")
        if self.ratio is not None and self.coarse_steps is not None:
            raise ProblemError("Give `ratio` or `coarse_steps`, not both.")
        if not 1 <= self.n_coarse <= self.n_steps:
            raise ProblemError(
                f"`coarse_steps` is {self.n_coarse}; it must be from 1 to `n_steps` = "
                f"{self.n_steps}."
            )

    @property
    def n_coarse(self) -> int:
        """Coarse steps of a slice."""
        if self.coarse_steps is not None:
            return self.coarse_steps
        if self.ratio is None:
            return self.n_steps
        if not 0 < self.ratio <= 1:
            raise ProblemError(f"`ratio` is {self.ratio}; it must be above 0 and at most 1.")
        n_coarse = Fraction(self.ratio).limit_denominator(10**6) * self.n_steps
        if n_coarse.denominator != 1:
            raise ProblemError(
                f"`ratio` = {self.ratio} of {self.n_steps} fine steps is not a whole number "
                f"of coarse steps: choose 1/k where k divides {self.n_steps}, or give "
                "`coarse_steps`."
            )
        return int(n_coarse)

    @property
    def is_exact(self) -> bool:
        """Whether Newton's matrix is that of the fine slices."""
        return self.n_coarse == self.n_steps and self.basis is None


class ParaOptStatus(enum.StrEnum):
    """How a solve ended; `ParaOptSolution.reason` says more."""

    CONVERGED = "converged"
    MAX_SWEEPS = "not converged"
    DIVERGED = "diverged"


@dataclass(frozen=True, eq=False)
class ParaOptSolution:
    """Optimal states, multipliers and controls, equal on all ranks.

    Where the iteration diverged they are those of the last sweep that could be evaluated; if there
    was none, the start, and `cost` is NaN.

    Attributes:
        states: At the slice edges, (n_slices + 1, state).
        multipliers: There, (n_slices + 1, state).
        times: All fine nodes, (n_slices * n_steps + 1,), in the unit of time.
        node_states: States there, (nodes, state).
        node_multipliers: Multipliers there, (nodes, state).
        controls: The control of every fine step, (nodes - 1, controls).
        control_times: Where a step takes it: at its right end by implicit Euler, in the middle by
            the midpoint rule, (nodes - 1,).
        cost: J: the terminal cost and the running costs of all steps times their widths.
        costs: J before each sweep and after the last, in the unit of the cost; NaN of sweeps that
            could not be evaluated.
        updates: Norm of the changes by each sweep, (sweeps,).
        jump: Largest jump of a state or multiplier at an edge that is left.
        contraction: Estimate, made at the start, of the factor by which a sweep reduces errors in
            the end; 0 for Newton's own matrix. Above 1 the iteration is likely to diverge.
        status: How it ended.
        reason: The status in a sentence, with what to do where it did not converge.
    """

    states: np.ndarray
    multipliers: np.ndarray
    times: np.ndarray
    node_states: np.ndarray
    node_multipliers: np.ndarray
    controls: np.ndarray
    control_times: np.ndarray
    cost: float
    costs: np.ndarray
    updates: np.ndarray
    jump: float
    contraction: float
    status: ParaOptStatus
    reason: str

    @property
    def sweeps(self) -> int:
        """Sweeps done."""
        return len(self.updates)
