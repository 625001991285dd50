"""Recorded operations replayed on simulated clocks: each rank's work, and whom it waits for.

Local; pure.

Reference:
    Aubanel (2011), Parallel Computing 37, 172-182, for the cost of a parareal sweep: with one slice
    to a rank, and messages that cost nothing, a solve takes what its equations say.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nodepint_mpi.bench.planning.clocks import COARSE, FINE, OTHER, PARTS, Clocks, Ranks
from nodepint_mpi.bench.planning.lines import RecordedLine, Run
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.stages import (
    NOTHING_SOLVED,
    Stage,
    Sweeps,
    align,
    amounts,
    known_on,
    make_clocks,
    unrolled,
)
from nodepint_mpi.core.scopes import COARSE as COARSE_PHASE
from nodepint_mpi.core.scopes import (
    ENCODER,
    FACTOR,
    FINE_ADJOINT,
    FINE_FORWARD,
    LOSS,
    SNAPSHOTS,
    SWEEP,
    TANGENTS,
    UPDATE,
)
from nodepint_mpi.errors import DataError
from nodepint_mpi.parallel import operations
from nodepint_mpi.parallel.operations import Call, FromFront, OfGroups

PART_OF = {
    FINE_FORWARD: FINE, FINE_ADJOINT: FINE, TANGENTS: FINE, COARSE_PHASE: COARSE, UPDATE: OTHER,
    SWEEP: OTHER, SNAPSHOTS: OTHER, FACTOR: OTHER, ENCODER: OTHER, LOSS: OTHER,
}  # fmt: skip
"""Where the time of a phase goes; messages are not work."""


class Costs(NamedTuple):
    """Seconds on one rank with its share of the samples.

    Of a slice: `fine_s`, a fine solve; `pulled_s`, its pull-back; `tangent_s`, a direction pushed
    through it; `coarse_s` and `copulled_s`, the coarse propagator and its pull-back; in coordinates
    of a basis `recurrence_s`, the walk through a slice's map, and `compose_s`, making one map of
    two; `sweep_s`, what else a sweep does with it, `snapshot_s`, its snapshots' part in a basis
    that turns. Of a turn of the basis: `factor_s`. Of a batch: `encoder_s`. Of an observation time:
    `loss_s`. Of a parameter: `update_s`, its update. Of a step: `other_s`, which all ranks do.
    """

    fine_s: float
    pulled_s: float
    tangent_s: float
    coarse_s: float
    copulled_s: float
    recurrence_s: float
    compose_s: float
    other_s: float
    update_s: float = 0.0
    sweep_s: float = 0.0
    snapshot_s: float = 0.0
    factor_s: float = 0.0
    encoder_s: float = 0.0
    loss_s: float = 0.0


class Simulated(NamedTuple):
    """Seconds of a step, and what share of it the ranks, on average, spend on each part."""

    step_s: float
    shares: dict[str, float]


def simulate_step(line: RecordedLine, costs: Costs, sweeps: Sweeps, network: Network) -> Simulated:
    """How long a step takes, by the clocks of one line of ranks. Local."""
    clocks = make_clocks(line, network)
    for _ in range(sweeps.n_updates):
        replay(clocks, line, costs, sweeps)
        clocks.work(OTHER, costs.other_s)
    step_s = float(clocks.now.max())
    means = {part: float(np.mean(clocks.spent[part])) for part in PARTS}
    return Simulated(step_s, {part: mean / step_s for part, mean in means.items()})


def replay(clocks: Clocks, line: RecordedLine, costs: Costs, sweeps: Sweeps) -> None:
    """Move the clocks on by what a line does once, with these sweeps. Local.

    Raises:
        DataError: if ranks do not make the same calls in the same order, or do something else
            between receiving from a neighbor and sending to the other.
    """
    seconds_of = _per_stage(lambda stage: _Seconds(clocks, line.runs, stage, costs))
    begun = None
    for stage, front in unrolled(align(line.runs), sweeps, line.n_slices):
        seconds, kind = seconds_of(stage).at(front), None
        if stage.calls is not None:
            kind = stage.calls[0].kind
        if begun is not None:
            if stage.calls is None or kind not in _WALKS[begun]:
                raise DataError(f"A rank makes the call {kind!r} where it should end {begun!r}.")
            n_bytes = _by_rank(clocks, line.runs, stage.calls)
            _walk(clocks, seconds, n_bytes, stage.calls[0])
            begun = None
            continue
        for part, of_ranks in seconds.items():
            clocks.work(part, of_ranks)
        if kind in _WALKS:
            begun = kind
        elif stage.calls is not None:
            _exchange(clocks, line.runs, stage.calls)


_WALKS = {
    operations.RECV_LEFT: (operations.SEND_RIGHT,),
    operations.RECV_RIGHT: (operations.SEND_LEFT,),
    operations.BEGIN_WITHIN: (operations.SEND_WITHIN_RIGHT, operations.SEND_WITHIN_LEFT),
    operations.BEGIN_RELAY: (operations.RELAY_RIGHT, operations.RELAY_LEFT),
}
"""What ranks that receive from one neighbor do next, for the other."""


def _walk(clocks: Clocks, seconds: dict[str, Ranks], n_bytes: Ranks, call: Call) -> None:
    """From rank to rank, through all of them or by groups of slices."""
    match call.kind:
        case operations.SEND_RIGHT | operations.SEND_LEFT:
            clocks.walk(seconds, n_bytes, rightwards=call.kind == operations.SEND_RIGHT)
        case operations.SEND_WITHIN_RIGHT | operations.SEND_WITHIN_LEFT:
            rightwards = call.kind == operations.SEND_WITHIN_RIGHT
            clocks.walk_within(seconds, n_bytes, call.coarsening, rightwards=rightwards)
        case _:
            rightwards = call.kind == operations.RELAY_RIGHT
            clocks.relay(seconds, n_bytes, call.coarsening, rightwards=rightwards)


def _exchange(clocks: Clocks, runs: Sequence[Run], calls: Sequence[Call]) -> None:
    """A call of all ranks at the same place of the step."""
    kind, n_bytes, distance, _ = calls[0]
    together = {
        operations.REDUCE_ALL: clocks.reduce,
        operations.FROM_ONE: clocks.spread,
        operations.TO_FIRST: clocks.gather,
        operations.FROM_FIRST: clocks.deal,
        operations.TO_ALL: clocks.gather,
        operations.REDUCE_SCATTER: clocks.reduce_scatter,
        operations.GATHER_SHARDS: clocks.gather_shards,
        operations.ON_FIRST: clocks.on_first,
        operations.TO_GRID: clocks.to_grid,
        operations.TO_CELL: clocks.join,
        operations.FROM_CELL: clocks.share,
    }
    if kind in together:
        together[kind](n_bytes)
    elif kind in (operations.SHIFT_RIGHT, operations.SHIFT_LEFT):
        sent = _by_rank(clocks, runs, calls)
        rightwards = kind == operations.SHIFT_RIGHT
        clocks.shift(sent, rightwards=rightwards, distance=distance)
    else:
        raise DataError(f"A rank makes the call {kind!r} without having received anything.")


def _by_rank(clocks: Clocks, runs: Sequence[Run], calls: Sequence[Call]) -> Ranks:
    sent = np.zeros(clocks.n_time)
    for run, call in zip(runs, calls, strict=True):
        sent[run.start : run.stop] = call.n_bytes
    return sent


class _Seconds:
    """What a stage takes on every rank: what is fixed, and what depends on the front."""

    def __init__(self, clocks: Clocks, runs: Sequence[Run], stage: Stage, costs: Costs):
        self._clocks, self._fixed, self._moving = clocks, {}, []
        for run, works in zip(runs, stage.works, strict=True):
            here = slice(run.start, run.stop)
            for work in works:
                part = PART_OF.get(work.phase)
                if part is None:
                    continue
                for name, amount in amounts(work):
                    each_s = cost_of(costs, work.phase, name)
                    if not each_s or amount == 0:
                        continue
                    if isinstance(amount, (FromFront, OfGroups)):
                        self._moving.append((part, here, amount, each_s))
                        continue
                    seconds = self._fixed.setdefault(part, np.zeros(clocks.n_time))
                    seconds[here] += each_s * known_on(amount, clocks, NOTHING_SOLVED)[here]

    def at(self, front: int) -> dict[str, Ranks]:
        """Seconds by part with this front."""
        found = {part: seconds.copy() for part, seconds in self._fixed.items()}
        for part, here, amount, each_s in self._moving:
            seconds = found.setdefault(part, np.zeros(self._clocks.n_time))
            seconds[here] += each_s * known_on(amount, self._clocks, front)[here]
        return found


def cost_of(costs: Costs, phase: str, name: str) -> float:
    """Seconds of one that is counted by this name in this phase. Local."""
    each = {
        FINE_FORWARD: {"fine": costs.fine_s},
        FINE_ADJOINT: {"fine_pulled": costs.pulled_s},
        TANGENTS: {"tangent_passes": costs.tangent_s, "reduced": costs.tangent_s},
        COARSE_PHASE: {
            "coarse": costs.coarse_s,
            "coarse_pulled": costs.copulled_s,
            "reduced": costs.recurrence_s,
            "reduced_pulled": costs.recurrence_s,
            "walked": costs.recurrence_s,
            "composed": costs.compose_s,
        },
        UPDATE: {"updated": costs.update_s},
        SWEEP: {"swept": costs.sweep_s},
        SNAPSHOTS: {"snapshots": costs.snapshot_s},
        FACTOR: {"factored": costs.factor_s},
        ENCODER: {"encoded": costs.encoder_s},
        LOSS: {"observed": costs.loss_s},
    }
    return each[phase].get(name, 0.0)


def _per_stage(make: Callable[[Stage], _Seconds]) -> Callable[[Stage], _Seconds]:
    """Made once for every stage, however often it is replayed."""
    known: dict[int, _Seconds] = {}

    def of(stage: Stage) -> _Seconds:
        if id(stage) not in known:
            known[id(stage)] = make(stage)
        return known[id(stage)]

    return of
