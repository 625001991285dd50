"""What fails while compiled code runs, in one sentence: no memory, or the user's callback."""

import contextlib
import logging
from collections.abc import Iterator

import jax

from nodepint_mpi.errors import ProblemError
from nodepint_mpi.training.check_model import shorten

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raise an error of compiled code, on this rank, with an explanation. Local.

    Raises:
        ProblemError: for what JAX's runtime reports, and where Python has no memory.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        _log.debug("failed while compiled code ran", exc_info=True)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2] or "no memory is left"
            raise ProblemError(
                f"Out of memory: {reason.splitlines()[0].rstrip('.')}. Use a smaller "
                "`data.batch_size` or `[network]`, fewer steps or `time.fine.checkpoints`, or more "
                "ranks on more machines; `nodepint info` shows what a run needs."
            ) from error
        raise ProblemError(
            f"Compiled code failed: {shorten(error)}. If it calls back into Python code of yours, "
            "look there; `--log-level DEBUG` shows the whole traceback."
        ) from error
