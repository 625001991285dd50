"""`nodepint plan`: trials on this machine, a forecast for others, and what to do."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nodepint_mpi.bench.planning.forecast import (
    LEAST_ERROR,
    Choice,
    choices_for,
    efficiency,
    limits,
    model_errors,
    undivided_s,
    ways_of,
    why_slow,
)
from nodepint_mpi.bench.planning.lines import Layout
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.trials import Trial, Trials, make_trials
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import ConfigError, DataError
from nodepint_mpi.ranks.devices import own_cores
from nodepint_mpi.ranks.launcher import in_job
from nodepint_mpi.ranks.machine import describe_machine
from nodepint_mpi.training.info import make_plan

ASSUMED = Network(latency_s=1e-5, bandwidth=1e9)
"""Where nothing was measured: of one core, or by a config of one slice."""


class Advice(NamedTuple):
    """Trials, the best choice for each number of ranks, and which of them to take.

    `serial` is the faster trial of plain diffrax, None if it has no such loss. `taken` is the
    choice with the fastest step, None if plain diffrax is faster. `error` is how far the forecast
    may be off, relative; `model_errors` how far it was on grids of two ranks that were measured.
    """

    trials: Trials
    network: Network
    network_from: str
    serial: Trial | None
    choices: dict[int, Choice]
    taken: Choice | None
    error: float
    model_errors: dict[Layout, float]
    machine: str
    reason: str


def advise(
    config: Config,
    *,
    ranks: Sequence[int] = (),
    basis_ranks: Sequence[int] = (1,),
    network: Network | None = None,
    budget_s: float = 60.0,
    timeout_s: float = 300.0,
    report: Callable[[str], None] = lambda line: None,
) -> Advice:
    """Try CONFIG on this machine and say how to train it. Local; starts jobs of its own.

    Args:
        config: The experiment.
        ranks: Numbers of ranks to say it for; those that this machine has cores for if empty.
        basis_ranks: Numbers of ranks to share the tangents among, where the method has any.
        network: Of the machine to say it for; that of this one if None.
        budget_s: Variants are tried for so long.
        timeout_s: How long a trial may take.
        report: Told of every trial.

    Raises:
        NodepintError: inside a job, for a config that cannot run, and if a trial fails.
    """
    if in_job():
        raise ConfigError("`nodepint plan` starts its own jobs: run it without mpirun.")
    if config.time.method == "serial":
        raise ConfigError(
            "`time.method` is 'serial': there is nothing to plan. Choose an iterative method, and "
            "the plan says whether it pays."
        )
    alone = config.model_copy(
        update={
            "run": config.run.model_copy(update={"data_ranks": 1, "basis_ranks": 1}),
            "growth": None,
        }
    )
    info = make_plan(alone, 1)
    if "batch_size" not in info:
        raise ConfigError("The config trains nothing: it has no section `[network]`.")
    cores = sorted(own_cores()) or [0]
    ranks = ranks or range(1, len(cores) + 1)
    trials = make_trials(
        alone, cores, info["batch_size"], budget_s=budget_s, timeout_s=timeout_s, report=report
    )
    for one in trials.all():
        if one not in trials.plain and one.shares is None:
            raise DataError(f"{one.name}: no step could be profiled. {_why_none(one)}")
    pairs = {Layout(2): trials.along_time, Layout(1, 2): trials.along_samples}
    measured = {layout: trial for layout, trial in pairs.items() if trial is not None}
    timed = None if trials.along_time is None else trials.along_time.network
    here = ASSUMED if timed is None else Network(*timed)
    ways = ways_of(alone, trials)
    off = model_errors(ways, here, measured)
    elsewhere = network is not None
    network = here if network is None else network
    known = {} if elsewhere else measured
    found = {n: choices_for(ways, n, network, known, basis_ranks) for n in sorted(set(ranks))}
    choices = {n: some[0] for n, some in found.items() if some}
    if not choices:
        raise ConfigError(
            f"No way was found to put {config.time.n_slices} slices on {min(ranks)} ranks: give "
            "more `time.n_slices`, or `time.fine.n_steps` that more slices can share."
        )
    best = min(choices.values(), key=lambda choice: choice.step_s)
    serial = min(trials.plain, key=lambda trial: trial.seconds, default=None)
    spreads = [trial.spread for trial in (*trials.plain, best.way.trial)]
    error = max(LEAST_ERROR, *spreads, *map(abs, off.values()))
    pays = serial is None or best.step_s < serial.seconds
    return Advice(
        trials=trials,
        network=network,
        network_from="given" if elsewhere else "assumed" if timed is None else "measured here",
        serial=serial,
        choices=choices,
        taken=best if pays else None,
        error=error,
        model_errors=off,
        machine=describe_machine(),
        reason=_reason(best, serial, error) + _of_fresh_paths(best),
    )


def _why_none(trial: Trial) -> str:
    """Why no step of it was profiled, and what to do."""
    if trial.serial_steps < 2:
        return "Is another profiler on?"
    return (
        f"{trial.serial_steps} of its steps took the serial gradient, since tracking could not "
        "keep `time.tracking.bound`: finer coarse steps, or more directions, may."
    )


def settings_of(advice: Advice) -> tuple[int, list[str]]:
    """Ranks and settings of the config that follow the advice; no ranks: plain diffrax. Local."""
    if advice.taken is None:
        return 0, []
    layout, way = advice.taken.layout, advice.taken.way
    grid = [f"run.data_ranks={layout.n_data}", f"run.basis_ranks={layout.n_basis}"]
    return layout.n_ranks, [*way.settings, *grid]


def format_advice(advice: Advice) -> str:
    """Trials, forecast and advice, as text with tables in Markdown. Local."""
    lines = [f"Tried on {advice.machine}:", "", "| trial | ms a step | sweeps |", "|---|---|---|"]
    for trial in advice.trials.all():
        spread = f"{trial.seconds * 1e3:.3g} (+- {trial.spread:.0%})"
        sweeps = "-" if trial.shares is None else "{:.3g} + {:.3g}".format(*trial.sweeps)
        lines.append(f"| {trial.name} | {spread} | {sweeps} |")
    network = advice.network
    lines += [
        "",
        f"Network, {advice.network_from}: a message takes {network.latency_s * 1e6:.3g} us and "
        f"1 s for {network.bandwidth / 1e9:.3g} GB.",
    ]
    if advice.model_errors:
        errors = [f"{off:+.1%} on {_grid(layout)}" for layout, off in advice.model_errors.items()]
        lines.append(f"The model's error on what was measured: {', '.join(errors)}.")
    lines += [
        "",
        "| ranks | time x data (x basis) | slices | method | ms a step | to plain diffrax "
        "| efficiency | coarse | messages and waiting | memory of a rank, MB "
        "| what limits it most |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(choice, advice) for choice in advice.choices.values()]
    lines += _undivided_table(advice)
    lines += ["", advice.reason]
    return "\n".join(lines)


def _undivided_table(advice: Advice) -> list[str]:
    """What a step takes beyond its share of a step on one rank, and what would be saved without
    each thing that costs."""
    rows = [(choice, _costs_s(choice, advice)) for choice in advice.choices.values()]
    names = list(rows[0][1])
    head = " | ".join(names)
    return [
        "",
        "Milliseconds of a step that the ranks do not divide (s of the efficiency "
        "1 / (1 + P s / T)), and what a step would save without:",
        "",
        f"| ranks | not divided | {head} |",
        f"|---|---|{'---|' * len(names)}",
        *(
            f"| {choice.layout.n_ranks} | {undivided_s(choice) * 1e3:.3g} | "
            f"{' | '.join(f'{1e3 * saved.get(name, 0.0):.3g}' for name in names)} |"
            for choice, saved in rows
        ),
    ]


def _costs_s(choice: Choice, advice: Advice) -> dict[str, float]:
    """Seconds that a simulated step would save without each thing, in one order."""
    gains = dict(limits(choice, advice.network))
    return {name: choice.simulated.step_s * (1 - 1 / gains[name]) for name in sorted(gains)}


def advice_as_data(advice: Advice) -> dict[str, Any]:
    """The same as data. Local."""
    n_ranks, settings = settings_of(advice)
    return {
        "machine": advice.machine,
        "network": advice.network._asdict() | {"from": advice.network_from},
        "trials": [
            {"name": trial.name, "settings": trial.settings, "step_s": trial.seconds,
             "spread": trial.spread, "sweeps": trial.sweeps, "peak_bytes": trial.peak_bytes}
            for trial in advice.trials.all()
        ],
        "model_errors": {_grid(layout): off for layout, off in advice.model_errors.items()},
        "error": advice.error,
        "choices": [_choice_as_data(choice, advice) for choice in advice.choices.values()],
        "serial": advice.taken is None,
        "n_ranks": n_ranks,
        "settings": settings,
        "reason": advice.reason,
    }  # fmt: skip


def _grid(layout: Layout) -> str:
    basis = f" x {layout.n_basis}" if layout.n_basis > 1 else ""
    return f"{layout.n_time} x {layout.n_data}{basis}"


def _choice_as_data(choice: Choice, advice: Advice) -> dict[str, Any]:
    way, serial = choice.way, advice.serial
    return {
        "n_ranks": choice.layout.n_ranks,
        "n_time": choice.layout.n_time,
        "n_data": choice.layout.n_data,
        "n_basis": choice.layout.n_basis,
        "n_slices": way.n_slices,
        "method": way.config.time.method,
        "settings": list(way.settings),
        "tried": way.slices_tried,
        "step_s": choice.step_s,
        "measured": choice.measured,
        "simulated_s": choice.simulated.step_s,
        "speed_up": None if serial is None else serial.seconds / choice.step_s,
        "efficiency": efficiency(choice),
        "shares": choice.simulated.shares,
        "sweeps": way.trial.sweeps,
        "memory_bytes": choice.memory_bytes,
        "limits": dict(limits(choice, advice.network)),
        "undivided_s": undivided_s(choice),
        "saved_s": _costs_s(choice, advice),
    }


def _line(choice: Choice, advice: Advice) -> str:
    way, layout, shares = choice.way, choice.layout, choice.simulated.shares
    serial = advice.serial
    (limit, gain), *_ = limits(choice, advice.network)
    cells = [
        str(layout.n_ranks), _grid(layout),
        f"{way.n_slices}{'' if way.slices_tried else ' (not tried)'}", way.config.time.method,
        f"{choice.step_s * 1e3:.3g}{'' if choice.measured else ' (forecast)'}",
        "-" if serial is None else f"{choice.step_s / serial.seconds:.2f}",
        f"{efficiency(choice):.2f}", f"{shares['coarse']:.0%}",
        f"{shares['messages'] + shares['wait']:.0%}", f"{choice.memory_bytes / 1e6:.0f}",
        f"{limit}: {gain:.2f} times as fast without",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _reason(best: Choice, serial: Trial | None, error: float) -> str:
    """What to do and why, in a sentence or two."""
    way, layout = best.way, best.layout
    n_ranks = f"{layout.n_ranks} {'rank' if layout.n_ranks == 1 else 'ranks'}"
    shared = f" x {layout.n_basis} along the basis" if layout.n_basis > 1 else ""
    how = (
        f"{n_ranks} ({layout.n_time} along time x {layout.n_data} along samples{shared}), "
        f"{way.n_slices} slices by {way.config.time.method}"
    )
    rank = None if way.config.time.basis is None else way.config.time.basis.rank
    if way.config.time.method in ("tangent", "reduced") and rank is not None:
        how += f" on a basis of {rank}"
    forward, back = way.trial.sweeps
    how += f", {forward:.3g} + {back:.3g} sweeps a step"
    memory = f"about {best.memory_bytes / 1e6:.0f} MB a rank"
    if serial is None:
        return f"Use {how}: plain diffrax has no such loss; {memory}."
    gain = serial.seconds / best.step_s
    low, high = gain / (1 + error), gain * (1 + error)
    range_ = f"{low:.2f} to {high:.2f} times as fast as {serial.name}"
    close = " That is too close to call." if low < 1 < high else ""
    if gain > 1:
        return f"Use {how}: {range_}, {memory}.{close}"
    return (
        f"Train serially, by {serial.name}: the best parallel run, {how}, would be {range_}, as "
        + (f"{why_slow(best, serial.seconds)}.{close}")
    )


def _of_fresh_paths(best: Choice) -> str:
    """What paths of its own for each step mean for the sweeps; nothing for a config without."""
    noise = best.way.config.noise
    if noise is None or noise.paths != "fresh":
        return ""
    forward, back = best.way.trial.sweeps
    return (
        f" Paths are fresh, so that every step is solved anew: {forward:.3g} + {back:.3g} sweeps "
        "in these first steps, and often more later, when the field is less smooth. Fewer ranks "
        'along time than sweeps cannot gain: `noise.paths = "common"` with `[time.tracking]` does '
        "one sweep a step."
    )
