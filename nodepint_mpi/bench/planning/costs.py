"""What the operations of a step cost, and how large they are: from a config and a short run.

Local; pure. Importing this module loads no MPI.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nodepint_mpi.bench.planning.step import Costs, Sizes, StepShape
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.scopes import COARSE, FINE_ADJOINT, FINE_FORWARD, TANGENTS
from nodepint_mpi.errors import DataError
from nodepint_mpi.parallel.directions import OVERSAMPLING, POWER_ITERATIONS
from nodepint_mpi.profiling.trace import OTHER

PULLED = 2.0
"""A coarse pull-back in coarse solves: it passes forward and back."""

COMPOSED = 6.0
"""Making one map of two, in walks through a slice: 5 to 8 of them for 16 to 64 directions and
several samples (`nodepint bench coarse`)."""

ByRank = Mapping[str, Sequence[int | float]]


def step_shape(config: Config, sweeps: Sequence[int | float]) -> StepShape:
    """What a step of a config does, with sweeps forward and back as they were counted. Local."""
    section, basis = config.time, config.time.basis
    method = "serial" if section.n_slices == 1 else section.method
    walks, n_solves = method == "parareal", 0
    if method in ("tangent", "reduced"):
        assert basis is not None  # the config is checked
        walks = basis.complement
        if not walks:
            n_solves = 2 if method == "tangent" and _n_new(config) else 1
    forward, back = (max(0, round(n)) for n in sweeps)
    return StepShape(
        n_slices=section.n_slices,
        method=method,
        tracked=section.tracking is not None,
        sweeps=forward,
        adjoint_sweeps=back,
        judged=section.stopping.rule != "sweeps",
        walks=walks,
        n_solves=n_solves,
        recurrence="slices" if basis is None else basis.recurrence,
        at_once=section.slices_at_once,
    )


def step_sizes(config: Config, info: Mapping[str, Any], n_data: int) -> Sizes:
    """Bytes of what ranks send, where so many lines share the samples. Local.

    Args:
        config: The experiment.
        info: Of `training.info.make_plan` on one rank.
        n_data: Lines of ranks.
    """
    number = 8 if config.run.precision == "float64" else 4
    n_samples, size = info["batch_size"] / n_data, info["state_size"]
    sizes = Sizes(state=info["message_bytes"] / n_data, gradient=info["gradient_message_bytes"])
    if config.time.method not in ("tangent", "reduced"):
        return sizes
    basis = config.time.basis
    assert basis is not None  # the config is checked
    rank, n_new = min(basis.rank or size, size), _n_new(config)
    return sizes._replace(
        maps=n_samples * rank * (rank + 1) * number,
        vectors=n_samples * rank * number,
        turn=min(n_new + OVERSAMPLING, size) * size * number,
        n_turn_sums=2 + POWER_ITERATIONS if n_new else 0,
    )


def read_costs(seconds: ByRank, counts: ByRank, shape: StepShape) -> Costs:
    """What a step's phases and counts on some ranks say of a slice. Local.

    Args:
        seconds: Of a step by phase, of every rank.
        counts: What every rank counted in it; see `parallel.counters.Tally`.
        shape: What such a step does.

    Raises:
        DataError: if there is no fine solve among them, as of plain training.
    """
    spent = {name: math.fsum(ranks) for name, ranks in seconds.items()}
    done = {name: math.fsum(ranks) for name, ranks in counts.items()}
    if not done["fine"] or not done["fine_pulled"]:
        raise DataError("These steps have no time-parallel fine solves to estimate costs from.")
    n_lines = max(1, round(done["fine_pulled"] / (shape.n_slices * shape.n_pulled)))
    n_swept = n_lines * shape.n_slices * max(1, shape.sweeps)
    costs = Costs(
        fine_s=spent[FINE_FORWARD] / done["fine"],
        pulled_s=spent[FINE_ADJOINT] / done["fine_pulled"],
        tangents_s=spent[TANGENTS] / n_swept,
        coarse_s=0.0,
        copulled_s=0.0,
        recurrence_s=0.0,
        compose_s=0.0,
        other_s=spent[OTHER] / len(seconds[OTHER]) / shape.n_updates,
    )
    if shape.n_solves:
        n_solved = n_lines * shape.n_slices * shape.n_all_solves
        recurrence_s = spent[COARSE] / max(n_solved, 1)
        return costs._replace(recurrence_s=recurrence_s, compose_s=COMPOSED * recurrence_s)
    passes = done["coarse"] + PULLED * done["coarse_pulled"]
    coarse_s = spent[COARSE] / passes if passes else 0.0
    return costs._replace(coarse_s=coarse_s, copulled_s=PULLED * coarse_s)


def for_share(whole: Costs, half: Costs, share: float) -> Costs:
    """Costs with a share of the samples, linear in them through two that were measured. Local."""
    fixed = [max(0.0, 2 * part - all_) for all_, part in zip(whole, half, strict=True)]
    return Costs(*(base + (all_ - base) * share for base, all_ in zip(fixed, whole, strict=True)))


def with_slices(costs: Costs, shape: StepShape, n_slices: int) -> tuple[Costs, StepShape]:
    """The same fine steps dealt to another number of slices, with a coarse step each. Local."""
    ratio = shape.n_slices / n_slices
    return (
        costs._replace(
            fine_s=costs.fine_s * ratio,
            pulled_s=costs.pulled_s * ratio,
            tangents_s=costs.tangents_s * ratio,
        ),
        shape._replace(n_slices=n_slices),
    )


def _n_new(config: Config) -> int:
    """Directions that come in with each sweep."""
    basis = config.time.basis
    assert basis is not None
    if basis.new is not None:
        return basis.new
    return basis.rank or 0 if basis.kind == "jumps" else 0
