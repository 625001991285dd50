"""What the operations of a step cost, from the phases of a short run. Local; pure."""

import math
from collections.abc import Mapping, Sequence

from nodepint_mpi.bench.planning.lines import RecordedLine
from nodepint_mpi.bench.planning.replay import Costs
from nodepint_mpi.bench.planning.stages import Sweeps, count_work
from nodepint_mpi.core.scopes import (
    COARSE,
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
from nodepint_mpi.profiling.trace import OTHER

PULLED = 2.0
"""A coarse pull-back in coarse solves: it passes forward and back."""

COMPOSED = 6.0
"""Making one map of two, in walks through a slice: 5 to 8 of them for 16 to 64 directions and
several samples (`nodepint bench coarse`)."""

ByRank = Mapping[str, Sequence[int | float]]


def read_costs(
    seconds: ByRank, line: RecordedLine, sweeps: Sweeps, coarse_in_fine: float | None
) -> Costs:
    """What the phases of a step say of a slice. Local.

    Args:
        seconds: Of a step by phase, of every rank of all lines. Ranks that share tangents count as
            if each had as many as the first: by less than one direction a rank they may not.
        line: What such a step does on these ranks.
        sweeps: How often it did.
        coarse_in_fine: What a coarse step takes of a fine solve. By this its share of the coarse
            phase is told from that of coordinates; all is its own if None.

    Raises:
        DataError: if there is no fine solve among them, as of plain training.
    """
    spent = {name: math.fsum(ranks) for name, ranks in seconds.items()}
    repeats = line.layout.n_data * line.layout.n_basis * sweeps.n_updates
    done = {what: repeats * float(n.sum()) for what, n in count_work(line, sweeps).items()}

    def count(phase: str, *names: str) -> float:
        return sum(done.get((phase, name), 0.0) for name in names)

    n_fine, n_pulled = count(FINE_FORWARD, "fine"), count(FINE_ADJOINT, "fine_pulled")
    if not n_fine or not n_pulled or not spent[FINE_FORWARD]:
        raise DataError("These steps have no time-parallel fine solves to estimate costs from.")
    fine_s = spent[FINE_FORWARD] / n_fine
    n_tangents = count(TANGENTS, "tangent_passes", "reduced")
    tangent_s = spent[TANGENTS] / n_tangents if n_tangents else 0.0
    if not n_tangents:  # what is done with tangents of earlier steps belongs to the slices
        fine_s += spent[TANGENTS] / n_fine
    n_coarse = count(COARSE, "coarse") + PULLED * count(COARSE, "coarse_pulled")
    n_walked = count(COARSE, "walked", "reduced") + PULLED * count(COARSE, "reduced_pulled")
    n_walked += COMPOSED * count(COARSE, "composed")
    coarse_s = spent[COARSE] / n_coarse if n_coarse else 0.0
    if n_walked and coarse_in_fine is not None:
        coarse_s = min(coarse_s, coarse_in_fine * spent[FINE_FORWARD] / n_fine)
    rest_s = max(0.0, spent[COARSE] - n_coarse * coarse_s)
    recurrence_s = rest_s / n_walked if n_walked else 0.0

    def each(phase: str, name: str) -> float:
        number = count(phase, name)
        return spent.get(phase, 0.0) / number if number else 0.0

    return Costs(
        fine_s=fine_s,
        pulled_s=spent[FINE_ADJOINT] / n_pulled,
        tangent_s=tangent_s,
        coarse_s=coarse_s,
        copulled_s=PULLED * coarse_s,
        recurrence_s=recurrence_s,
        compose_s=COMPOSED * recurrence_s,
        other_s=spent[OTHER] / len(seconds[OTHER]) / sweeps.n_updates,
        update_s=each(UPDATE, "updated"),
        sweep_s=each(SWEEP, "swept"),
        snapshot_s=each(SNAPSHOTS, "snapshots"),
        factor_s=each(FACTOR, "factored"),
        encoder_s=each(ENCODER, "encoded"),
        loss_s=each(LOSS, "observed"),
    )


def for_share(whole: Costs, half: Costs, share: float) -> Costs:
    """Costs with a share of the samples, linear in them through two that were measured. Local."""
    fixed = [max(0.0, 2 * part - all_) for all_, part in zip(whole, half, strict=True)]
    return Costs(*(base + (all_ - base) * share for base, all_ in zip(fixed, whole, strict=True)))


def with_slices(costs: Costs, ratio: float) -> Costs:
    """Those of slices so much longer, by as many fine steps, with a coarse step each. Local."""
    return costs._replace(
        fine_s=costs.fine_s * ratio,
        pulled_s=costs.pulled_s * ratio,
        tangent_s=costs.tangent_s * ratio,
    )
