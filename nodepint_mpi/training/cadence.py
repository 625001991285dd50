"""When a run saves a checkpoint, and what the saving has cost."""

from mpi4py import MPI

from nodepint_mpi.profiling.timers import Seconds

EVERY = 500
"""Steps between checkpoints where the config does not say."""
MOST = 0.03
"""Share of the time for training that saving may then take."""


def is_due(
    control: MPI.Intracomm, every: int | None, step: int, seconds: Seconds, *, usual: int = EVERY
) -> bool:
    """Whether to save after so many steps.

    Collective over `control`; equal on all ranks. As often as the config says. Where it does not,
    every `usual` steps, but only once another checkpoint as long as the last keeps saving at no
    more than `MOST` of the time by rank 0's clock. The first is not put off: its price is unknown.
    What is computed depends on none of this.
    """
    if step % (every or usual) != 0:
        return False
    if every is not None:
        return True
    steps, saving = seconds
    affordable = not saving or sum(saving) + saving[-1] <= MOST * sum(steps)
    return control.bcast(affordable)
