"""What a step would take on any number of ranks, from trials: which layout, and whether it pays."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nodepint_mpi.bench.planning.clocks import COARSE, FINE, MESSAGES, OTHER, WAIT
from nodepint_mpi.bench.planning.costs import for_share, read_costs, with_slices
from nodepint_mpi.bench.planning.lines import Layout
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.recording import StepRecorder
from nodepint_mpi.bench.planning.replay import Costs, Simulated, simulate_step
from nodepint_mpi.bench.planning.stages import Sweeps
from nodepint_mpi.bench.planning.trials import Trial, Trials, noise_fits
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.training.info import make_plan

LEAST_ERROR = 0.05
"""The forecast is not trusted more than that."""


class Way(NamedTuple):
    """A way to do the steps, as it was tried on one rank: what they do, and what it costs.

    `half` is what it costs with half of the samples, by what the config as it is saves then; None
    where that was not tried. `slices_tried` is false where costs were carried over from another
    number of slices.
    """

    settings: tuple[str, ...]
    recorder: StepRecorder
    sweeps: Sweeps
    costs: Costs
    half: Costs | None
    info: Mapping[str, Any]
    trial: Trial
    slices_tried: bool = True

    @property
    def config(self) -> Config:
        """The experiment, in this way."""
        return self.recorder.config

    @property
    def n_slices(self) -> int:
        """How many the horizon is cut into."""
        return self.config.time.n_slices


class Choice(NamedTuple):
    """A way on a layout of ranks, and what a step of it would take; measured or simulated."""

    way: Way
    layout: Layout
    simulated: Simulated
    step_s: float
    measured: bool
    memory_bytes: float


def ways_of(config: Config, trials: Trials) -> list[Way]:
    """Every way that was tried, with its costs. Local; opens the data."""
    found, saved, base = [], None, StepRecorder.of(config)
    for trial in trials.ours:  # first the config as it is
        recorder = base.changed(*trial.settings)
        costs, half = costs_of(trial, recorder, Layout(1)), None
        if trials.along_samples is not None and not trial.settings:
            of_half = costs_of(trials.along_samples, recorder, Layout(1, 2))
            saved = [
                part / all_ if all_ else 0.5 for all_, part in zip(costs, of_half, strict=True)
            ]
        if saved is not None:
            half = Costs(*(cost * share for cost, share in zip(costs, saved, strict=True)))
            # The same parameters, the same basis.
            half = half._replace(update_s=costs.update_s, factor_s=costs.factor_s)
        sweeps, info = recorder.sweeps(trial.sweeps), make_plan(recorder.config, 1)
        found.append(Way(trial.settings, recorder, sweeps, costs, half, info, trial))
    return found


def costs_of(trial: Trial, recorder: StepRecorder, layout: Layout) -> Costs:
    """What a trial of ours on such ranks says operations cost. Local."""
    assert trial.shares is not None  # profiled: `advise` checks
    seconds = {
        name: [share[name] * trial.seconds for share in trial.shares] for name in trial.shares[0]
    }
    sweeps = recorder.sweeps(trial.sweeps)
    return read_costs(seconds, recorder.line(layout), sweeps, recorder.coarse_in_fine())


def choices_for(
    ways: Sequence[Way],
    n_ranks: int,
    network: Network,
    measured: Mapping[Layout, Trial],
    basis_ranks: Sequence[int] = (1,),
) -> list[Choice]:
    """All ways on all grids of so many ranks, the fastest first. Local.

    What was measured of the config as it is, on this network, takes the place of its forecast. Ways
    with tangents are also looked at with these numbers of ranks that share them.
    """
    found = []
    for way in ways:
        for layout in _layouts(n_ranks, way, basis_ranks):
            fitting = _with_enough_slices(way, layout.n_time)
            if fitting is not None:
                found.append(_choose(fitting, layout, network, measured))
    return sorted(found, key=lambda choice: choice.step_s)


def model_errors(
    ways: Sequence[Way], network: Network, measured: Mapping[Layout, Trial]
) -> dict[Layout, float]:
    """How far simulations of several ranks are from what was measured, relative. Local.

    By the sweeps that were counted there: round-off may decide whether a step sweeps once more.
    """
    found = {}
    for layout, trial in measured.items():
        way = ways[0]._replace(sweeps=ways[0].recorder.sweeps(trial.sweeps))
        found[layout] = _simulate(way, layout, network).step_s / trial.seconds - 1
    return found


def limits(choice: Choice, network: Network) -> list[tuple[str, float]]:
    """How many times as fast a step would be without each thing that costs, largest first."""
    way, layout = choice.way, choice.layout
    without = {
        "the walk from slice to slice by coarse steps": ("coarse_s", "copulled_s"),
        "the coarse problem in coordinates": ("recurrence_s", "compose_s"),
        "the encoder": ("encoder_s",),
        "decoder and loss": ("loss_s",),
        "small factorizations of the basis": ("factor_s",),
        "the update": ("update_s",),
        "what else all ranks do alike": ("other_s",),
    }
    now = choice.simulated.step_s
    gains = {
        name: now / _simulate(_without(way, costs), layout, network).step_s
        for name, costs in without.items()
    }
    basis = way.config.time.basis
    if basis is not None and basis.recurrence != "auto":
        chosen = way._replace(recorder=way.recorder.changed('time.basis.recurrence="auto"'))
        gain = now / _simulate(chosen, layout, network).step_s
        gains[f'`recurrence = "{basis.recurrence}"` instead of "auto"'] = gain
    at_once = Network(0.0, math.inf)
    gains["messages"] = now / _simulate(way, layout, at_once).step_s
    return sorted(gains.items(), key=lambda item: -item[1])


def efficiency(choice: Choice) -> float:
    """Of the same way on one rank, whose trial is known. Local."""
    alone = choice.way.trial.seconds
    return alone / (choice.layout.n_ranks * choice.step_s)


def undivided_s(choice: Choice) -> float:
    """Seconds of a step that its ranks do not divide. Local.

    The s of the efficiency 1 / (1 + P s / T), with a step of T seconds on one rank.
    """
    return choice.step_s - choice.way.trial.seconds / choice.layout.n_ranks


def why_slow(choice: Choice, serial_s: float) -> str:
    """In a few words, what makes a step of ours slower than plain diffrax's. Local."""
    way, shares = choice.way, choice.simulated.shares
    counts = way.trial.counts
    assert counts is not None
    passes = (math.fsum(counts["fine"]["ranks"]) + math.fsum(counts["fine_pulled"]["ranks"])) / (
        2 * way.n_slices
    )
    alone = way.trial.seconds / serial_s
    if passes > 1.2:
        return (
            f"a step does {passes:.1f} times the fine solves of a serial one, "
            f"which {choice.layout.n_ranks} ranks have to make up for"
        )
    words = {
        COARSE: "coarse steps, which are walked through one after the other",
        MESSAGES: "messages",
        WAIT: "waiting for other ranks",
        OTHER: "what all ranks do alike (encoder, loss, update)",
    }
    part = max(words, key=lambda name: shares[name])
    if shares[part] > 0.15:
        return f"{shares[part]:.0%} of a step goes into {words[part]}"
    return (
        f"one rank of ours takes {alone:.2g} of plain diffrax's time, and {shares[FINE]:.0%} of "
        "a step are fine solves"
    )


def _without(way: Way, names: Sequence[str]) -> Way:
    """The same way, if some costs were none."""
    nothing = dict.fromkeys(names, 0.0)
    half = None if way.half is None else way.half._replace(**nothing)
    return way._replace(costs=way.costs._replace(**nothing), half=half)


def _layouts(n_ranks: int, way: Way, basis_ranks: Sequence[int]) -> Iterator[Layout]:
    """Grids whose lines can share the samples of a step evenly, if it is known what that saves, and
    whose ranks can share the tangents."""
    for n_basis in (n for n in basis_ranks if n == 1 or n <= way.recorder.n_directions):
        for n_data in range(1, n_ranks // n_basis + 1 if way.half is not None else 2):
            if n_ranks % (n_data * n_basis) == 0 and way.info["batch_size"] % n_data == 0:
                yield Layout(n_ranks // (n_data * n_basis), n_data, n_basis)


def _with_enough_slices(way: Way, n_time: int) -> Way | None:
    """The way itself, or with so many slices more that every rank has one, if steps allow it."""
    n_slices, n_steps = way.n_slices, way.config.time.fine.n_steps
    if n_time <= n_slices:
        return way
    if n_steps is None or way.config.time.edges is not None:
        return None
    total = n_slices * n_steps
    fitting = (n for n in range(n_time, total + 1) if total % n == 0)
    enough = next((n for n in fitting if noise_fits(way.config, total // n)), None)
    if enough is None:
        return None
    ratio = n_slices / enough
    half = None if way.half is None else with_slices(way.half, ratio)
    finer = f"time.n_slices={enough}", f"time.fine.n_steps={total // enough}"
    kept = (w for w in way.settings if not w.startswith(("time.n_slices", "time.fine.")))
    recorder = way.recorder.changed(*finer)
    return way._replace(
        settings=(*kept, *finer),
        recorder=recorder,
        sweeps=recorder.sweeps(way.trial.sweeps),
        costs=with_slices(way.costs, ratio),
        half=half,
        slices_tried=False,
    )


def _choose(way: Way, layout: Layout, network: Network, measured: Mapping[Layout, Trial]) -> Choice:
    simulated, trial = _simulate(way, layout, network), None
    if way.slices_tried and layout == Layout(1):
        trial = way.trial
    elif way.slices_tried and not way.settings:
        trial = measured.get(layout)
    step_s = simulated.step_s if trial is None else trial.seconds
    memory = forecast_memory(way.info, way.trial.peak_bytes, layout)
    return Choice(way, layout, simulated, step_s, trial is not None, memory)


def _simulate(way: Way, layout: Layout, network: Network) -> Simulated:
    costs = way.costs
    if layout.n_data > 1:
        assert way.half is not None  # else there is no such layout
        costs = for_share(costs, way.half, 1 / layout.n_data)
    return simulate_step(way.recorder.line(layout), costs, way.sweeps, network)


def forecast_memory(info: Mapping[str, Any], peak_bytes: int, layout: Layout) -> float:
    """What a rank would hold at most: as measured on one, but for what the ranks divide. Local.

    Ranks along time and groups divide what belongs to slices and samples; groups alone, what all
    ranks of a line have of their samples. Ranks that share tangents divide nothing of it.

    Args:
        info: The plan for one rank.
        peak_bytes: What that one held at most.
        layout: The ranks.
    """
    kinds = ("interface", "adjoint", "tracks", "inputs")
    divided = sum(info.get(f"{kind}_bytes_per_rank", 0) for kind in kinds)
    shared = info.get("samples_bytes_per_rank", 0)
    return (
        peak_bytes
        - divided * (1 - layout.n_basis / layout.n_ranks)
        - shared * (1 - 1 / layout.n_data)
    )
