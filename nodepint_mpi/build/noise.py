"""The section `[noise]` to the noise of a training run, or of an initial-value problem."""

from dataclasses import replace

import numpy as np

from nodepint_mpi.build.model import build_integrator
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.noise import NoiseSection
from nodepint_mpi.core.sample_noise import SampleNoise
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.parallel.noise import Noise, check_steps


def build_noise(config: Config) -> SampleNoise | None:
    """The noise of a training run, or None. Local.

    Raises:
        ConfigError: with the solver or the number of steps that does not fit, and what would.
    """
    section = config.noise
    if section is None:
        return None
    stated = _state_noise(config, section)
    n_fine, levy = _check_steps(config, stated)
    return SampleNoise(
        stated.seed, stated.kind, stated.n_dims, n_paths=section.n_paths,
        fresh=section.paths == "fresh", n_fine=n_fine, levy=levy,
    )  # fmt: skip


def build_path_noise(config: Config) -> Noise | None:
    """The noise of an initial-value problem, `n_paths` paths or one, or None. Local.

    Raises:
        ConfigError: as `build_noise`.
    """
    section = config.noise
    if section is None:
        return None
    paths = 0 if section.n_paths is None else np.arange(section.n_paths)
    stated = replace(_state_noise(config, section), paths=paths)
    _check_steps(config, stated)
    return stated


def _state_noise(config: Config, section: NoiseSection) -> Noise:
    seed = config.run.seed if section.seed is None else section.seed
    return Noise(
        seed, kind=section.kind, n_dims=section.n_dims, calculus=section.calculus,
        additive=section.additive,
    )  # fmt: skip


def _check_steps(config: Config, stated: Noise) -> tuple[int, bool]:
    """As `nodepint_mpi.parallel.noise.check_steps`, in the words of the config."""
    time = config.time
    if time.levels is not None and time.levels.number != 1:
        raise ConfigError(
            "`[time.levels]` steps over groups of slices, and `[noise]` has increments for the "
            "steps of a slice: remove `[time.levels]`, or give it `number = 1`."
        )
    named = {"fine": time.fine, "coarse": time.coarse, "tangents": time.tangents}
    steps = {
        name: build_integrator(part, f"time.{name}")
        for name, part in named.items()
        if part is not None
    }
    try:
        return check_steps(stated, steps)
    except ProblemError as error:
        raise ConfigError(f"`[noise]` and `[time]`: {error}") from error
