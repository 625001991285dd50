"""What a time-parallel solve returns: states, the record of its sweeps, and how it ended."""

import enum

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Inexact, PyTree

from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.parallel.judge import SweepRecord


class Status(enum.StrEnum):
    """How a solve ended; the value says what that means."""

    CONVERGED = "converged: every slice is solved"
    MAX_SWEEPS = (
        "not converged: the largest number of sweeps was done before every slice was solved. "
        "Allow more sweeps, loosen the tolerance, or use a better coarse propagator."
    )
    NON_FINITE = (
        "not finite: the fine propagator returned NaN or infinity from an exact start, or ran "
        "out of steps; states are NaN from there on. Check the field, use smaller steps, or "
        "raise `max_steps`."
    )
    TRACKED = (
        "tracked: one sweep from what the last step left. `jump` and `residual` of the carry that "
        "`value_and_grad` returns say how far it is from converged."
    )


class Solution(eqx.Module):
    """States of a time-parallel solve, equal on all ranks.

    `interface` has one state per slice boundary, (n_slices + 1, *state), the initial state first;
    `ys` one per time of `ts`, (times, *state), None without `ts`. A batch made by `in_axes` has its
    samples behind the time: (times, samples, *state). `work` has the largest count of any rank, in
    a tracked solve that of this one. The other properties read the record of the iteration and so
    need concrete values: use them outside jit.
    """

    interface: PyTree[Inexact[Array, "edges ..."]]
    record: SweepRecord
    work: Tally
    ts: np.ndarray | Array | None = None
    ys: PyTree[Inexact[Array, "times ..."]] | None = None
    tracked: bool = eqx.field(static=True, default=False)
    _held: tuple[int, int] = eqx.field(static=True, default=(0, 0))

    @property
    def held(self) -> slice:
        """Which of `ts` lie in the slices of this rank: `ys[held]` is this rank's part. Local.

        Every time is one rank's; a rank may have none. A time on a slice boundary belongs to the
        slice left of it, the initial state to the first rank.
        """
        return slice(*self._held)

    @property
    def sweeps(self) -> int:
        """Correction sweeps done, the published K."""
        return int(self.record.n_sweeps)

    @property
    def jumps(self) -> np.ndarray:
        """Largest jump of each iterate, starting with iteration 0, where it was evaluated."""
        jumps = np.asarray(self.record.jumps)[: self.sweeps + 1]
        return jumps[~np.isnan(jumps)]

    @property
    def updates(self) -> np.ndarray:
        """Largest change of the interface by each sweep, (sweeps,)."""
        return np.asarray(self.record.updates)[1 : self.sweeps + 1]

    @property
    def fronts(self) -> np.ndarray:
        """Number of frozen slices after each sweep, (sweeps,)."""
        return np.asarray(self.record.fronts)[1 : self.sweeps + 1]

    @property
    def sample_sweeps(self) -> np.ndarray | None:
        """Sweeps after which each sample was solved, (*samples); None without `n_batch_axes`.

        All samples take the sweeps of the slowest: one stiff sample shows here.
        """
        of_samples = self.record.sample_sweeps
        return None if of_samples is None else np.minimum(np.asarray(of_samples), self.sweeps)

    @property
    def meaning(self) -> str:
        """The status in words, with the samples that are not solved where these are known."""
        text, of_samples = self.status.value, self.sample_sweeps
        if self.status is not Status.MAX_SWEEPS or of_samples is None:
            return text
        late = [tuple(map(int, index)) for index in np.argwhere(of_samples >= self.sweeps)]
        names = ", ".join(str(index[0] if len(index) == 1 else index) for index in late[:8])
        return f"{text} Not solved: samples {names}{' and more' if len(late) > 8 else ''}."

    @property
    def status(self) -> Status:
        """Converged, out of sweeps, not finite, or tracked."""
        if not bool(self.record.finite):
            return Status.NON_FINITE
        if self.tracked:
            return Status.TRACKED
        n_slices = jax.tree.leaves(self.interface)[0].shape[0] - 1
        front = int(self.record.fronts[self.record.n_sweeps])
        return Status.CONVERGED if front >= n_slices else Status.MAX_SWEEPS
