"""The record of a start's times and counts, over the ranks: `phases.json` in the run directory."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nodepint_mpi.core.scopes import SCOPES
from nodepint_mpi.io.directory import PHASES, write_text
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.counters import WORD_BYTES, Tally
from nodepint_mpi.parallel.differentiate import TimeSolver
from nodepint_mpi.profiling.equivalents import work_equivalents
from nodepint_mpi.profiling.sampling import Sample
from nodepint_mpi.profiling.timers import Timers
from nodepint_mpi.profiling.trace import OTHER
from nodepint_mpi.profiling.waits import WAIT, split_waits

STEP_PHASES = (*SCOPES, WAIT, OTHER)
"""Phases of a step, as the record has them."""
HOST_PHASES = {
    "data": "reading a batch",
    "checkpoint": "saving a checkpoint",
    "agreement": "agreeing on the next step",
    "comparison": "comparing parameters",
}
"""Phases of the loop besides the step, and what the watchdog calls them."""


Number = int | float
Shares = list[dict[str, float]]


class Own(NamedTuple):
    """What a rank knows of itself at the end of a start."""

    n_steps: int
    warm_s: list[float]
    host_s: dict[str, float]
    counts: dict[str, Number | None]
    samples: list[Sample]
    cost_s: float
    why: str


def record_times(
    comms: Comms, timers: Timers, spent: Mapping[str, float], solver: TimeSolver
) -> dict[str, Any] | None:
    """What all ranks have found, reduced. Collective over `comms.control`; None but on rank 0.

    The profiles of a thousand ranks are more than each of them should hold.

    Args:
        comms: The run's communicators.
        timers: Of this rank's steps.
        spent: Seconds in the phases the watchdog knows, by name.
        solver: What a slice's propagation costs, for the fine-solve equivalents.
    """
    tally, sampler = timers.tally, timers.sampler
    host_s = {name: spent.get(phase, 0.0) for name, phase in HOST_PHASES.items()}
    host_s |= {"compile": timers.compiling.seconds, "steps": sum(timers.seconds.steps, 0.0)}
    counts: dict[str, Any] = tally._asdict()
    counts["bytes"] = counts.pop("words") * WORD_BYTES
    forward, back = work_equivalents(solver, tally)
    counts |= {"fine_equivalents": forward, "pull_back_equivalents": back}
    own = Own(
        len(timers.seconds.steps), timers.warm_s, host_s, counts, sampler.samples,
        sampler.cost_s, sampler.why,
    )  # fmt: skip
    ranks = comms.control.gather(own)
    return None if ranks is None else reduce_times(ranks, comms.time.n_groups, comms.time.n_basis)


def reduce_times(ranks: Sequence[Own], n_groups: int, n_basis: int = 1) -> dict[str, Any]:
    """Minimum, mean and maximum over the ranks of all they know. Local; pure."""
    step_s = [statistics.median(own.warm_s) if own.warm_s else None for own in ranks]
    samples = [own.samples for own in ranks]
    shares, steps = phase_shares(samples, n_groups, n_basis), _common(samples)
    phases_s = None
    if shares is not None and None not in step_s:
        # A profile makes a step longer, so it is asked for shares only.
        phases_s = {
            name: reduced([
                share[name] * seconds for share, seconds in zip(shares, step_s, strict=True)
                if seconds is not None
            ])
            for name in STEP_PHASES
        }  # fmt: skip
    return {
        "n_ranks": len(ranks),
        "data_ranks": n_groups,
        "basis_ranks": n_basis,
        "n_steps": ranks[0].n_steps,
        "n_warm_steps": min(len(own.warm_s) for own in ranks),
        "step_s": reduced(step_s),
        "phases_s": phases_s,
        "host_s": {name: reduced([own.host_s[name] for own in ranks]) for name in ranks[0].host_s},
        "counts": {
            name: summed([own.counts[name] for own in ranks]) for name in ranks[0].counts
        },
        "profiles": {
            "steps": steps,
            "counts": profiled_counts(samples),
            "cost_s": max(own.cost_s for own in ranks),
            "missing": None if steps else _why_none(ranks),
        },
    }  # fmt: skip


def write_times(folder: Path, times: Mapping[str, Any]) -> None:
    """Write the record into the run directory. Local; rank 0 only. Raises OutputError."""
    write_text(folder / PHASES, json.dumps(times, indent=1) + "\n")


def reduced(values: Sequence[Number | None]) -> dict[str, Any] | None:
    """Minimum, mean and maximum, and the values of all ranks; None if one is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"min": min(known), "mean": sum(known) / len(known), "max": max(known), "ranks": known}


def summed(values: Sequence[Number | None]) -> dict[str, Any] | None:
    """The same with the sum."""
    found = reduced(values)
    return found if found is None else found | {"sum": sum(found["ranks"])}


def phase_shares(
    samples: Sequence[Sequence[Sample]], n_groups: int, n_basis: int = 1
) -> Shares | None:
    """Shares of a step by phase, for every rank: the mean over the steps that all have profiled.

    Local; pure. None if there is no such step. What no operation of XLA's is known to have taken is
    `other`.

    Args:
        samples: Of every rank, in the order of the grid.
        n_groups: How many groups of ranks share the samples.
        n_basis: How many ranks share the tangents of the same slices.
    """
    shares: list[dict[str, list[float]]] = [{name: [] for name in STEP_PHASES} for _ in samples]
    for step in _common(samples):
        those = [next(sample for sample in own if sample.step == step) for own in samples]
        split = split_waits([sample.profile for sample in those], n_groups, n_basis)
        for share, sample, phases in zip(shares, those, split, strict=True):
            known = {name: phases.get(name, 0.0) / sample.seconds for name in STEP_PHASES[:-1]}
            for name, part in known.items():
                share[name].append(part)
            share[OTHER].append(1 - sum(known.values()))
    if not shares[0][OTHER]:
        return None
    return [{name: statistics.fmean(parts) for name, parts in share.items()} for share in shares]


def _common(samples: Sequence[Sequence[Sample]]) -> list[int]:
    """Steps that all ranks have profiled."""
    steps = [{sample.step for sample in own} for own in samples]
    return sorted(set.intersection(*steps))


def profiled_counts(samples: Sequence[Sequence[Sample]]) -> dict[str, Any] | None:
    """What a step did that all ranks have profiled, as the mean of these; None without one."""
    steps = _common(samples)
    if not steps:
        return None
    tallies = [[one.tally for one in own if one.step in steps] for own in samples]
    return {
        name: reduced([statistics.fmean(getattr(one, name) for one in own) for own in tallies])
        for name in Tally._fields
    }


def _why_none(ranks: Sequence[Own]) -> str:
    """Why no step was profiled by all."""
    lacking = [own.why for own in ranks if not own.samples]
    return lacking[0] if lacking else "no step was profiled by all ranks"
