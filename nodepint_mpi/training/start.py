"""How ranks begin with a config: one of them reads it, and it says what they compute on.

Importing this module does not load JAX, which must not start before `begin`.
"""

from collections.abc import Callable, Mapping

from mpi4py import MPI

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.ranks.agreement import find_difference, together
from nodepint_mpi.ranks.devices import settle


def begin(control: MPI.Intracomm, read: Callable[[], Config], *, placed: bool = False) -> Config:
    """The config that rank 0 reads, with devices and precision as it says. Collective.

    Args:
        control: The ranks.
        read: Called on rank 0 alone.
        placed: Whether ranks have their GPU or cores: once JAX has started it is too late.

    Returns:
        The same on all ranks.

    Raises:
        NodepintError: on all ranks.
    """
    config = None
    with together(control):
        if control.rank == 0:
            config = read()
    config = control.bcast(config)
    assert config is not None  # rank 0 has read it
    if not placed:
        settle(control, share_gpus=config.run.share_gpus, cuda_mpi=config.run.cuda_mpi)
    set_precision(config)
    # Here, as it loads JAX.
    from nodepint_mpi.ranks.compile_cache import keep_programs

    keep_programs(config.run.compile_cache, prune=control.rank == 0)
    return config


def require_same_options(control: MPI.Intracomm, held: Mapping[str, str]) -> None:
    """Make sure that all ranks were started with the same options. Collective over `control`.

    Args:
        control: The ranks.
        held: Names of options and what was given, as text.

    Raises:
        ConfigError: on all ranks, with who was given what.
    """
    difference = find_difference(control, held)
    if difference is not None:
        odd = difference.odd
        raise ConfigError(
            f"The ranks were started with different options: {difference.name} is {odd.value} on "
            f"{odd.who}, {odd.usual} on {odd.usual_who}. Give all ranks of a job the same command."
        )


def set_precision(config: Config) -> None:
    """JAX's, for all that follows. Local."""
    if config.run.precision == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
