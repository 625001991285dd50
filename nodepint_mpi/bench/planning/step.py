"""A training step on simulated clocks: the operations of `training.step`, each with its cost.

Local; pure.

Reference:
    Aubanel (2011), Parallel Computing 37, 172-182, for the cost of a parareal sweep: with one slice
    to a rank, and messages that cost nothing, `solve` takes what its equations say.
"""

from typing import NamedTuple

import numpy as np

from nodepint_mpi.bench.planning.clocks import COARSE, FINE, OTHER, PARTS, Clocks
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.core.partition import check_layout

NUMBERS = 4 * 8
"""Bytes of what ranks agree on in a sweep: a jump, a front, counts."""


class Costs(NamedTuple):
    """Seconds on one rank with its share of the samples.

    Of a slice: `fine_s`, a fine solve; `pulled_s`, its pull-back; `tangents_s`, the tangents of a
    sweep; `coarse_s` and `copulled_s`, the coarse propagator and its pull-back; in coordinates of a
    basis `recurrence_s`, the walk through a slice's map, and `compose_s`, making one map of two. Of
    a step: `other_s`, which all ranks do.
    """

    fine_s: float
    pulled_s: float
    tangents_s: float
    coarse_s: float
    copulled_s: float
    recurrence_s: float
    compose_s: float
    other_s: float


class Sizes(NamedTuple):
    """Bytes: of a state of all of a group's samples, the gradient, a slice's affine maps of r
    coordinates, its r-vectors, and a sum that turns the basis, of which there are so many."""

    state: float
    gradient: float
    maps: float = 0.0
    vectors: float = 0.0
    turn: float = 0.0
    n_turn_sums: int = 0


class StepShape(NamedTuple):
    """What a step does.

    Of a `tracked` step each of the `sweeps` goes forward and back and ends with an update; others
    do `sweeps` and `adjoint_sweeps`, and where `judged` a last fine solve for the jumps left. A
    sweep walks through coarse states where it `walks`; else it solves so many problems in
    coordinates, `n_solves`, if any, in the way of `recurrence`.
    """

    n_slices: int
    method: str
    tracked: bool
    sweeps: int = 1
    adjoint_sweeps: int = 1
    judged: bool = False
    walks: bool = True
    n_solves: int = 0
    recurrence: str = "slices"
    at_once: int | None = None

    @property
    def n_updates(self) -> int:
        """How often gradients are summed over all ranks, and an update made of them."""
        return max(1, self.sweeps) if self.tracked and self.method != "serial" else 1

    @property
    def n_pulled(self) -> int:
        """How often each slice is pulled back."""
        if self.method == "serial":
            return 1
        return self.n_updates if self.tracked else self.adjoint_sweeps + 1

    @property
    def n_all_solves(self) -> int:
        """Coarse problems in coordinates, forward and back."""
        if self.tracked:
            return self.n_updates * (self.n_solves + 1)
        return self.n_solves * self.sweeps + self.adjoint_sweeps


class Layout(NamedTuple):
    """Ranks of a line, and lines that share the samples."""

    n_time: int
    n_data: int = 1

    @property
    def n_ranks(self) -> int:
        """All ranks."""
        return self.n_time * self.n_data


class Simulated(NamedTuple):
    """Seconds of a step, and what share of it the ranks, on average, spend on each part."""

    step_s: float
    shares: dict[str, float]


def simulate_step(
    costs: Costs, sizes: Sizes, shape: StepShape, layout: Layout, network: Network
) -> Simulated:
    """How long a step takes, by the clocks of one line of ranks. Local.

    Raises:
        LayoutError: for more ranks along time than slices.
    """
    check_layout(shape.n_slices, layout.n_time)
    clocks = Clocks(shape.n_slices, *layout, network)
    for _ in range(shape.n_updates):
        if shape.method == "serial":
            _serial(clocks, costs, sizes)
        elif shape.tracked:
            _tracked(clocks, costs, sizes, shape)
        else:
            _anew(clocks, costs, sizes, shape)
        clocks.reduce(sizes.gradient)
        clocks.work(OTHER, costs.other_s)
    step_s = float(clocks.now.max())
    means = {part: float(np.mean(clocks.spent[part])) for part in PARTS}
    return Simulated(step_s, {part: mean / step_s for part, mean in means.items()})


def solve(clocks: Clocks, costs: Costs, sizes: Sizes, shape: StepShape) -> None:
    """The forward solve of `parallel.solve`, of so many sweeps."""
    if costs.coarse_s:
        clocks.walk(COARSE, costs.coarse_s * clocks.owned, sizes.state, rightwards=True)
    for k in range(shape.sweeps + shape.judged):
        if k < shape.n_slices:
            clocks.work(FINE, costs.fine_s * clocks.unsolved(k, shape.at_once))
            clocks.reduce(NUMBERS)
        if k < min(shape.sweeps, shape.n_slices):
            _correct(clocks, costs, sizes, shape, front=k)
            clocks.reduce(NUMBERS)


def _anew(clocks: Clocks, costs: Costs, sizes: Sizes, shape: StepShape) -> None:
    """`training.step.loss_and_gradient`, without what an earlier step has left."""
    clocks.reduce(NUMBERS)  # what iteration 0 had to guard
    solve(clocks, costs, sizes, shape)
    clocks.work(FINE, costs.fine_s * clocks.owned)  # once more, to be linearized
    clocks.reduce(NUMBERS)
    _solve_adjoint(clocks, costs, sizes, shape)
    clocks.reduce(NUMBERS)  # the number of observations


def _serial(clocks: Clocks, costs: Costs, sizes: Sizes) -> None:
    """From slice to slice and back."""
    clocks.walk(FINE, costs.fine_s * clocks.owned, sizes.state, rightwards=True)
    clocks.walk(FINE, costs.pulled_s * clocks.owned, sizes.state, rightwards=False)


def _tracked(clocks: Clocks, costs: Costs, sizes: Sizes, shape: StepShape) -> None:
    """`parallel.track.follow`."""
    if shape.method == "parareal":  # its tracks are defects of the coarse propagator
        clocks.walk(COARSE, costs.coarse_s * clocks.owned, sizes.state, rightwards=True)
        clocks.work(FINE, costs.fine_s * clocks.owned)
        clocks.walk(COARSE, costs.copulled_s * clocks.owned, sizes.state, rightwards=False)
        clocks.work(FINE, costs.pulled_s * clocks.owned)
        return
    clocks.shift(sizes.state, rightwards=True)
    clocks.work(FINE, costs.fine_s * clocks.owned)
    clocks.shift(sizes.state, rightwards=False)
    clocks.work(FINE, costs.pulled_s * clocks.owned)
    _correct(clocks, costs, sizes, shape, front=-1)
    _correct_cotangents(clocks, costs, sizes, shape)


def _correct(clocks: Clocks, costs: Costs, sizes: Sizes, shape: StepShape, *, front: int) -> None:
    """A correction sweep; in the slice at the front nothing is left to correct."""
    for _ in range(sizes.n_turn_sums):
        clocks.reduce(sizes.turn)
    clocks.work(FINE, costs.tangents_s * clocks.owned)
    if shape.walks:
        slices = clocks.unsolved(front + 1)
        clocks.walk(COARSE, costs.coarse_s * slices, sizes.state, rightwards=True)
        return
    for _ in range(shape.n_solves):
        _tie(clocks, costs, sizes, shape, rightwards=True)
    clocks.shift(sizes.state, rightwards=True)


def _tie(clocks: Clocks, costs: Costs, sizes: Sizes, shape: StepShape, *, rightwards: bool) -> None:
    """The coarse problem in coordinates: `parallel.recurrence`, in its three ways."""
    n_time, widest = clocks.n_time, int(clocks.owned[0])
    if n_time == 1 or shape.recurrence == "slices":
        walk_s = costs.recurrence_s * shape.n_slices
        clocks.on_first(walk_s, widest * sizes.maps, widest * sizes.vectors)
        return
    clocks.work(COARSE, costs.compose_s * (clocks.owned - 1))
    if shape.recurrence == "blocks":
        clocks.on_first(costs.recurrence_s * n_time, sizes.maps, sizes.vectors)
    else:
        distance = 1
        while distance < n_time - 1:
            # What the last ranks get in the last round reaches back to the beginning: no matrix.
            whole = 2 * distance < n_time - 1
            n_bytes = sizes.maps if whole else sizes.vectors
            clocks.shift(n_bytes, rightwards=rightwards, distance=distance)
            clocks.work(COARSE, costs.compose_s if whole else costs.recurrence_s)
            distance *= 2
        clocks.shift(sizes.vectors, rightwards=rightwards)
    clocks.work(COARSE, costs.recurrence_s * clocks.owned)
    clocks.reduce(NUMBERS)  # whether a correction was too long


def _solve_adjoint(clocks: Clocks, costs: Costs, sizes: Sizes, shape: StepShape) -> None:
    """`parallel.adjoint.solve_adjoint`, of so many sweeps."""
    if costs.copulled_s:
        clocks.walk(COARSE, costs.copulled_s * clocks.owned, sizes.state, rightwards=False)
    for k in range(shape.adjoint_sweeps + 1):
        clocks.work(FINE, costs.pulled_s * clocks.owned)
        clocks.reduce(NUMBERS)
        if k < shape.adjoint_sweeps:
            _correct_cotangents(clocks, costs, sizes, shape)


def _correct_cotangents(clocks: Clocks, costs: Costs, sizes: Sizes, shape: StepShape) -> None:
    """A transposed correction sweep."""
    if shape.walks:
        clocks.walk(COARSE, costs.copulled_s * clocks.owned, sizes.state, rightwards=False)
        return
    clocks.shift(sizes.state, rightwards=False)
    if shape.n_solves:
        _tie(clocks, costs, sizes, shape, rightwards=False)
