"""The config by which plain serial training does what a config asks for, as far as it can.

Importing this module loads neither MPI nor JAX.
"""

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.time import PlainSection
from nodepint_mpi.errors import ConfigError


def plain_config(config: Config) -> Config:
    """The same without what one serial solve has no use for: sweeps, tracks, relaxation. Local.

    Raises:
        ConfigError: if the slices are never to join: no serial solve has such a loss.
    """
    relaxation = config.time.relaxation
    if relaxation is not None:
        # How many steps its epochs have only the data can say.
        n_steps = relaxation.steps if config.run.n_steps is None else config.run.n_steps
        if relaxation.weight_at(n_steps) < 1:
            raise ConfigError(
                "no serial training has this loss: by `time.relaxation` the slices do not join "
                "before the last step"
            )
    unused = {"method": "serial", "tracking": None, "relaxation": None}
    time = PlainSection.model_validate(dict(config.time) | unused)
    run = config.run.model_copy(update={"data_ranks": 1, "basis_ranks": 1})
    return config.model_copy(update={"time": time, "run": run})
