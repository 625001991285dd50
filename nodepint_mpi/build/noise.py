"""The section `[noise]` to the noise of a training run."""

from nodepint_mpi.build.model import build_integrator
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.sample_noise import SampleNoise
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.parallel.noise import Noise, check_steps


def build_noise(config: Config) -> SampleNoise | None:
    """The noise of a run, or None. Local.

    Raises:
        ConfigError: with the solver or the number of steps that does not fit, and what would.
    """
    section, time = config.noise, config.time
    if section is None:
        return None
    seed = config.run.seed if section.seed is None else section.seed
    of_kind = {"kind": section.kind, "n_dims": section.n_dims}
    stated = Noise(seed, **of_kind, calculus=section.calculus, additive=section.additive)
    named = {"fine": time.fine, "coarse": time.coarse, "tangents": time.tangents}
    steps = {
        name: build_integrator(part, f"time.{name}")
        for name, part in named.items()
        if part is not None
    }
    try:
        n_fine, levy = check_steps(stated, steps)
    except ProblemError as error:
        raise ConfigError(f"`[noise]` and `[time]`: {error}") from error
    return SampleNoise(
        seed, **of_kind, n_paths=section.n_paths, fresh=section.paths == "fresh",
        n_fine=n_fine, levy=levy,
    )  # fmt: skip
