"""How samples of a velocity field are drawn: the options, and what a drawing costs."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import diffrax
import numpy as np

from nodepint_mpi.core.evaluations import evaluations
from nodepint_mpi.core.propagators import AbstractIntegrator, FixedSteps, Stay
from nodepint_mpi.core.stopping import AbstractStopping, EndUpdate, FreezeSlices, JumpTolerance
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.parallel.solution import Solution

SamplerKind = Literal["ode", "sde"]
SamplingMethod = Literal["serial", "parareal", "picard", "tangent"]

_TOL = {"parareal": 1e-3, "picard": 1e-2, "tangent": 1e-6, "serial": 1e-6}


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: which equation, in how many steps, and by which method in parallel.

    Args:
        sampler: "ode", the probability-flow equation, or "sde", the stochastic one with the same
            distribution; its noise is fixed by `seed` and the number of the sample.
        method: "serial"; "parareal", with one coarse step a slice (SRDS); "picard", Picard's
            iteration of all steps at once (ParaDiGMS), which is parareal with the state itself for
            a coarse solution and slices of one step, not the method "picard" of `solve`, which has
            no correction; or "tangent", Newton's method.
        n_steps: Equal steps from noise to data; `n_slices` must divide it.
        n_slices: What is solved at once; about the root of `n_steps` unless given, all steps for
            "picard".
        solver: Of each step, from diffrax.
        coarse_steps: Coarse steps in a slice.
        rank: "tangent": directions that all samples and slices share, found as the solve goes;
            all of the state (Newton's method) unless given.
        n_new: "tangent" with a rank: new directions in each sweep; a third of `rank` unless given.
        complement: "tangent" with a rank: use the coarse propagator on what lies outside.
        tangent_steps: "tangent": steps in a slice of the solution whose derivative is taken; those
            of the fine one unless given.
        tol: Where to stop: "parareal" when the mean change of the samples is less (1e-3 as
            published), "picard" when that of each step's states is, in the root mean square
            (1e-2), "tangent" when no jump of any number is larger (1e-6). The first two bound no
            error.
        max_sweeps: The most sweeps; as many as slices unless given.
        seed: Of the initial noise and of that of "sde".
        end: Last time, at most 1, the data; a variance-preserving path ends a little before.
    """

    sampler: str = "ode"
    method: str = "tangent"
    n_steps: int = 256
    n_slices: int | None = None
    solver: diffrax.AbstractSolver = field(default_factory=diffrax.Euler)
    coarse_steps: int = 1
    rank: int | None = None
    n_new: int | None = None
    complement: bool = True
    tangent_steps: int | None = None
    tol: float | None = None
    max_sweeps: int | None = None
    seed: int = 0
    end: float = 1.0

    @property
    def slices(self) -> int:
        """The number of slices. Local.

        Raises:
            ProblemError: if none divides the steps.
        """
        if self.n_slices is not None:
            if self.n_steps % self.n_slices:
                raise ProblemError(
                    f"{self.n_steps} steps do not divide into {self.n_slices} slices, which must "
                    f"have equally many: take {_near_multiples(self.n_steps, self.n_slices)} steps."
                )
            return self.n_slices
        if self.method == "picard":
            return self.n_steps
        return _slices_near_root(self.n_steps)

    @property
    def steps_per_slice(self) -> int:
        """Fine steps of a slice. Local."""
        return self.n_steps // self.slices

    @property
    def tolerance(self) -> float:
        """`tol`, or the published one of the method. Local."""
        return _TOL[self.method] if self.tol is None else self.tol

    def checked(self, size: int) -> "Sampling":
        """These options, checked against the size of a state. Local.

        Raises:
            ProblemError: with what does not fit and what would.
        """
        for name, kinds in _CHOICES.items():
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(map(repr, get_args(kinds)))
                raise ProblemError(f"`{name}` is {getattr(self, name)!r}; choose from {known}.")
        for name in (
            "n_steps",
            "n_slices",
            "coarse_steps",
            "rank",
            "n_new",
            "tangent_steps",
            "max_sweeps",
        ):
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 1):
                raise ProblemError(f"`{name}` is {value!r}; expected a whole number from 1 on.")
        if not _is_whole(self.seed):
            raise ProblemError(f"`seed` is {self.seed!r}; expected a whole number.")
        if not 0 < self.end <= 1:
            raise ProblemError(f"`end` is {self.end!r}; expected a time in (0, 1], 1 is the data.")
        if self.tol is not None and not self.tol > 0:
            raise ProblemError(f"`tol` is {self.tol!r}; it must be a number greater than zero.")
        if self.steps_per_slice % self.coarse_steps and self.method in ("parareal", "tangent"):
            raise ProblemError(
                f"{self.coarse_steps} coarse steps do not divide the {self.steps_per_slice} fine "
                "steps of a slice."
            )
        if self.tangent_steps is not None and self.steps_per_slice % self.tangent_steps:
            raise ProblemError(
                f"`tangent_steps` is {self.tangent_steps}, which does not divide the "
                f"{self.steps_per_slice} fine steps of a slice."
            )
        if self.rank is None:
            return self
        if self.method != "tangent":
            raise ProblemError(f"`rank` belongs to method 'tangent', not {self.method!r}.")
        if self.rank > size:
            raise ProblemError(
                f"`rank` is {self.rank}, but a state has {size} numbers: choose at most {size}, or "
                "leave it out for all of them."
            )
        n_new = max(1, self.rank // 3) if self.n_new is None else self.n_new
        if n_new > self.rank:
            raise ProblemError(f"`n_new` is {n_new}, more than the rank of {self.rank}.")
        return replace(self, n_new=n_new)

    def fine(self) -> FixedSteps:
        """Steps of a slice. Local."""
        return FixedSteps(self.solver, self.steps_per_slice)

    def tangent_integrator(self) -> FixedSteps:
        """Steps of a slice whose derivative "tangent" takes. Local."""
        return FixedSteps(self.solver, self.tangent_steps or self.steps_per_slice)

    def coarse_integrator(self) -> AbstractIntegrator:
        """Coarse steps of a slice. Local."""
        if self.method == "picard":
            return Stay()
        return FixedSteps(self.solver, self.coarse_steps)

    def stopping(self) -> AbstractStopping:
        """The rule that the method is published with. Local."""
        match self.method:
            case "parareal":
                return EndUpdate(self.tolerance, "mean", self.max_sweeps)
            case "picard":
                return FreezeSlices(self.tolerance, "end", self.max_sweeps, "rms")
        return JumpTolerance(self.tolerance, self.max_sweeps)

    def basis(self) -> SharedBasis | None:
        """That of "tangent". Local."""
        if self.method != "tangent":
            return None
        if self.rank is None:
            return SharedBasis("identity", n_batch_axes=1)
        return SharedBasis("jumps", self.rank, self.n_new or 1, n_batch_axes=1)


_CHOICES: dict[str, Any] = {"sampler": SamplerKind, "method": SamplingMethod}


class SamplingCounts(NamedTuple):
    """What a drawing costs in evaluations of the field, of all samples at once.

    `evaluations` are those of all slices, slices that were solved already left out, and of
    derivatives along directions, each counted as one; `equivalents` are these in serial solutions.
    `serial_steps` are evaluations that follow one another, with a rank for each slice: all, and
    where coarse steps overlap with the fine ones of other slices. None for a solver whose
    evaluations are unknown. A final check of the jumps of all slices is not counted.
    """

    sweeps: int
    evaluations: int | None
    equivalents: float | None
    serial_steps: int | None
    serial_steps_pipelined: int | None


def count_work(options: Sampling, solution: Solution, n_owned: int) -> SamplingCounts:
    """The work of a solve, from its record. Local; equal on all ranks.

    Args:
        options: What was asked for.
        solution: What came of it.
        n_owned: The largest number of slices of a rank.
    """
    n_slices, sweeps = options.slices, solution.sweeps
    fine, tangent = evaluations(options.fine()), evaluations(options.tangent_integrator())
    coarse = evaluations(options.coarse_integrator())
    if fine is None or tangent is None or coarse is None:
        return SamplingCounts(sweeps, None, None, None, None)
    if options.method == "serial":
        total = n_slices * fine
        return SamplingCounts(sweeps, total, 1.0, total, total)
    fronts = np.asarray(solution.record.fronts)[: sweeps + 1]
    by_update = options.method != "tangent"
    # A rule on jumps has solved the last iterate, too, and knows less while it does.
    before = fronts[:-1] if by_update else np.minimum(np.append(0, fronts[:-1] + 1), n_slices)
    n_fine = int(np.sum(n_slices - before))
    n_coarse = n_slices + sweeps * n_slices if options.rank is None or options.complement else 0
    if options.method == "tangent" and options.rank is None:
        n_coarse = n_slices
    passes = int(solution.work.tangent_passes) // max(n_owned, 1)
    total = n_fine * fine + n_coarse * coarse + passes * n_slices * tangent
    solves = sweeps if by_update else len(before)
    with_tangents = solves * fine + (sweeps * tangent if options.method == "tangent" else 0)
    begun = n_slices * coarse
    every_sweep = sweeps * begun if n_coarse > n_slices else 0
    return SamplingCounts(
        sweeps,
        total,
        total / (n_slices * fine),
        begun + every_sweep + with_tangents,
        begun + with_tangents,
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _slices_near_root(n_steps: int) -> int:
    """The smallest divisor from the root on."""
    root = math.isqrt(n_steps - 1) + 1 if n_steps > 1 else 1
    for n_slices in range(root, 2 * root + 1):
        if n_steps % n_slices == 0:
            return n_slices
    raise ProblemError(
        f"{n_steps} steps do not divide into about {root} equal slices: take "
        f"{_near_multiples(n_steps, root)} steps, or choose `n_slices`."
    )


def _near_multiples(n_steps: int, n_slices: int) -> str:
    below = n_steps // n_slices * n_slices
    return f"{below or n_slices} or {below + n_slices}" if below else f"{n_slices}"
