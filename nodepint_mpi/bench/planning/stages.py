"""The operations of all ranks of a line side by side, as they follow each other. Local; pure."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nodepint_mpi.bench.planning.clocks import Clocks, Ranks
from nodepint_mpi.bench.planning.lines import Operations, RecordedLine, Run
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.core.levels import Grouping
from nodepint_mpi.core.scopes import FINE_ADJOINT, FINE_FORWARD
from nodepint_mpi.errors import DataError
from nodepint_mpi.parallel.operations import Branch, Call, FromFront, Loop, OfGroups, Work

NOTHING_SOLVED = -1
"""The front outside of an iteration."""


class Sweeps(NamedTuple):
    """How often a step sweeps.

    A solve does `forward` and `back` sweeps, and where `judged` a last fine solve for the jumps
    that are left. `n_updates` is how often the step is done, each time with an update.
    """

    forward: int = 1
    back: int = 1
    judged: bool = False
    n_updates: int = 1


class Stage(NamedTuple):
    """What each run of ranks does by itself, and then the call that all ranks make, if any."""

    works: tuple[tuple[Work, ...], ...]
    calls: tuple[Call, ...] | None


class Iteration(NamedTuple):
    """The stages of a sweep, and those of the iterate that is the last."""

    going: "tuple[Stage | Iteration, ...]"
    ending: "tuple[Stage | Iteration, ...]"
    phases: frozenset[str]


Stages = tuple[Stage | Iteration, ...]


def align(runs: Sequence[Run]) -> Stages:
    """The operations of all ranks side by side. Local.

    Raises:
        DataError: if ranks do not make the same calls in the same order.
    """
    return _align([run.operations for run in runs], going=True)


def _align(ranks: Sequence[Operations], *, going: bool) -> Stages:
    """Of a loop's body as it is while sweeps go on, or in the end."""
    found: list[Stage | Iteration] = []
    rest = [list(_straight(one, going)) for one in ranks]
    while any(rest):
        works = []
        for one in rest:
            n_works = next((i for i, op in enumerate(one) if not isinstance(op, Work)), len(one))
            works.append(tuple(op for op in one[:n_works] if isinstance(op, Work)))
            del one[:n_works]
        heads = [one.pop(0) if one else None for one in rest]
        calls = tuple(head for head in heads if isinstance(head, Call))
        loops = [head for head in heads if isinstance(head, Loop)]
        alike = len({(call.kind, call.distance) for call in calls}) <= 1
        if not alike or 0 < len(calls) < len(heads) or 0 < len(loops) < len(heads):
            raise DataError(f"Ranks of a line do not make the same calls: {heads}.")
        found.append(Stage(tuple(works), calls or None))
        if loops:
            bodies = [loop.body for loop in loops]
            phases = frozenset(op.phase for op in bodies[0] if isinstance(op, Work))
            going_on, ending = (_align(bodies, going=going) for going in (True, False))
            found.append(Iteration(going_on, ending, phases))
    return tuple(found)


def _straight(ranks: Operations, going: bool) -> Iterator[Work | Call | Loop]:
    """The operations with one way taken at every branch."""
    for operation in ranks:
        if isinstance(operation, Branch):
            yield from _straight(operation.going if going else operation.ending, going)
        else:
            yield operation


def unrolled(stages: Stages, sweeps: Sweeps, n_slices: int) -> Iterator[tuple[Stage, int]]:
    """The stages as they follow each other, with the front. Local.

    After k sweeps the first k slices are solved: that is where the front is in sweep k.
    """
    for stage in stages:
        if isinstance(stage, Stage):
            yield stage, NOTHING_SOLVED
            continue
        if FINE_FORWARD in stage.phases:
            n_sweeps = min(sweeps.forward, n_slices)
            last = sweeps.judged and n_sweeps < n_slices
        elif FINE_ADJOINT in stage.phases:
            n_sweeps, last = min(sweeps.back, n_slices - 1), True
        else:
            n_sweeps, last = 1, False
        for k in range(n_sweeps):
            yield from ((one, k) for one, _ in unrolled(stage.going, sweeps, n_slices))
        if last:
            yield from ((one, n_sweeps) for one, _ in unrolled(stage.ending, sweeps, n_slices))


def count_work(line: RecordedLine, sweeps: Sweeps) -> dict[tuple[str, str], Ranks]:
    """How much of everything each rank does in one go, by phase and count. Local.

    Counts are those of `parallel.counters.Tally` and of `parallel.operations.Work`.
    """
    clocks = make_clocks(line, Network(0.0, np.inf))
    found: dict[tuple[str, str], Ranks] = {}
    for stage, front in unrolled(align(line.runs), sweeps, line.n_slices):
        for run, works in zip(line.runs, stage.works, strict=True):
            here = slice(run.start, run.stop)
            for work in works:
                for name, amount in amounts(work):
                    done = found.setdefault((work.phase, name), np.zeros(clocks.n_time))
                    done[here] += known_on(amount, clocks, front)[here]
    return found


def make_clocks(line: RecordedLine, network: Network) -> Clocks:
    """Clocks of a line, all at zero. Local."""
    n_time, n_data, n_basis = line.layout
    return Clocks(line.n_slices, n_time, n_data, network, n_basis)


def amounts(work: Work) -> Iterator[tuple[str, Any]]:
    """All that a work counts."""
    yield from work.tally._asdict().items()
    yield from work.others


def known_on(
    amount: int | float | FromFront | OfGroups | None, clocks: Clocks, front: int
) -> Ranks:
    """A count on all ranks; what is not known before a step runs is taken for all slices."""
    if amount is None:
        return clocks.owned.astype(float)
    if isinstance(amount, OfGroups):
        grouping = Grouping(int(clocks.owned.sum()), amount.coarsening)
        number = grouping.number_of(amount.what, clocks.first, clocks.owned, front)
        return amount.each * number.astype(float)
    if not isinstance(amount, FromFront):
        return np.full(clocks.n_time, float(amount))
    if amount.whole and clocks.n_time > 1:  # the walk on the first rank
        n_slices = int(clocks.owned.sum())
        number = n_slices - max(0, front + amount.beyond)
        return np.full(clocks.n_time, float(amount.more + number))
    return amount.more + clocks.unsolved(front + amount.beyond, amount.at_once).astype(float)
