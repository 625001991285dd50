"""Short trials on this machine: plain diffrax and ours, and variants of how time is cut.

Importing this module loads neither MPI nor JAX.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nodepint_mpi.bench.contest import Contestant, run_contestant, step_seconds
from nodepint_mpi.bench.contestant import COMPILED_STEPS
from nodepint_mpi.config.experiment import Config, parse_config
from nodepint_mpi.config.plain import plain_config
from nodepint_mpi.errors import ConfigError, NodepintError
from nodepint_mpi.io.directory import config_text

N_STEPS = 20
"""Optimizer steps of a trial."""


class Trial(NamedTuple):
    """What a short training took.

    `seconds` is the median step, `spread` half of what its quartiles are apart, relative to it.
    `sweeps` are means, forward and back. `shares` and `counts` are of every rank by phase and by
    what was counted, None where no step could be profiled, as of plain diffrax.
    """

    name: str
    settings: tuple[str, ...]
    seconds: float
    spread: float
    sweeps: tuple[float, float]
    serial_steps: int
    shares: list[dict[str, float]] | None
    counts: dict[str, dict[str, Any]] | None
    peak_bytes: int
    network: tuple[float, float] | None


class Trials(NamedTuple):
    """Trials of a config.

    `plain` by plain diffrax, where it has such a loss, on one core and on all; `ours` on one rank,
    as it is and by variants; `along_time` and `along_samples` on two ranks, where there are two
    cores, slices and samples.
    """

    plain: tuple[Trial, ...]
    ours: tuple[Trial, ...]
    along_time: Trial | None = None
    along_samples: Trial | None = None

    def all(self) -> list[Trial]:
        """Every trial that was made. Local."""
        pairs = [one for one in (self.along_time, self.along_samples) if one is not None]
        return [*self.plain, *self.ours, *pairs]


def make_trials(
    config: Config,
    cores: Sequence[int],
    n_samples: int,
    *,
    budget_s: float,
    timeout_s: float,
    report: Callable[[str], None],
) -> Trials:
    """Train a little in every way that a forecast needs. Local; starts jobs of its own.

    Args:
        config: The experiment.
        cores: Those of this process.
        n_samples: Of a step.
        budget_s: Variants are tried as long as so many seconds are not over.
        timeout_s: How long a trial may take.
        report: Told of every trial.

    Raises:
        NodepintError: if a trial fails that is no variant.
    """
    began = time.monotonic()

    def trial(settings: Sequence[str], one: Contestant, network: bool = False) -> Trial:
        changed = parse_config(config_text(config), settings) if settings else config
        where = changed.run.model_copy(update=one.dealing)
        changed = changed.model_copy(update={"run": where})
        run = run_contestant(changed, one, N_STEPS, cores, timeout_s=timeout_s, network=network)
        made = _trial(one.name, tuple(settings), run)
        report(f"{made.name}: {made.seconds * 1e3:.3g} ms a step")
        return made

    try:
        plain_config(config)
        plain = [trial((), Contestant("plain diffrax, one core", "plain"))]
        if len(cores) > 1:
            name = f"plain diffrax, {len(cores)} cores"
            plain.append(trial((), Contestant(name, "plain", pinned=False)))
    except ConfigError as error:
        report(f"plain diffrax: {error}")
        plain = []
    ours = [trial((), Contestant("nodepint_mpi, 1 rank", "ours"))]
    along_time = along_samples = None
    if len(cores) > 1 and config.time.n_slices > 1:
        one = Contestant("nodepint_mpi, 2 ranks along time", "ours", 2)
        along_time = trial((), one, network=True)
    if len(cores) > 1 and n_samples % 2 == 0:
        one = Contestant("nodepint_mpi, 2 ranks along samples", "ours", 2, data_ranks=2)
        along_samples = trial((), one)
    for what, settings in variants(config):
        if time.monotonic() - began > budget_s:
            report(f"{what}: not tried, {budget_s:g} s are over (`--seconds`)")
            continue
        try:
            ours.append(trial(settings, Contestant(f"nodepint_mpi, 1 rank, {what}", "ours")))
        except NodepintError as error:  # it is no more than a suggestion
            report(f"{what}: left out: {error}")
    return Trials(tuple(plain), tuple(ours), along_time, along_samples)


def variants(config: Config) -> list[tuple[str, list[str]]]:
    """Other ways to do the same steps, each with a name and as settings of the config. Local.

    Twice and half as many slices where the fine steps can be dealt out so, and other methods whose
    sections are there.
    """
    section, found = config.time, []
    n_slices, n_steps = section.n_slices, section.fine.n_steps
    if n_steps is not None and section.edges is None and section.method != "serial":
        for other in (n_slices // 2, 2 * n_slices):
            if other > 1 and (n_slices * n_steps) % other == 0:
                steps = n_slices * n_steps // other
                if not noise_fits(config, steps):
                    continue
                settings = [f"time.n_slices={other}", f"time.fine.n_steps={steps}"]
                found.append((f"{other} slices", settings))
    methods = {"parareal": section.coarse is not None, "tangent": section.basis is not None}
    for method, possible in methods.items():
        if possible and method != section.method and section.method != "serial":
            found.append((method, [f'time.method="{method}"']))
    return found


def noise_fits(config: Config, n_fine: int) -> bool:
    """Whether the coarse steps divide this number of fine steps in a slice. Local."""
    section = config.time
    steps = (part.n_steps for part in (section.coarse, section.tangents) if part is not None)
    return config.noise is None or all(n is not None and n_fine % n == 0 for n in steps)


def _trial(name: str, settings: tuple[str, ...], run: dict[str, Any]) -> Trial:
    seconds = step_seconds(run)
    warm = run["seconds"][COMPILED_STEPS:]
    first, _, third = statistics.quantiles(warm, n=4)
    forward, back = run["sweeps"]
    return Trial(
        name,
        settings,
        seconds,
        (third - first) / 2 / seconds,
        (forward, back),
        run["serial_steps"],
        run["shares"],
        run["counts"],
        run["peak_bytes"],
        None if run["network"] is None else tuple(run["network"]),
    )
