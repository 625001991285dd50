"""What happens when something goes wrong on one rank: everybody learns of it, and nobody waits.

Steps that all ranks take together raise on all of them or on none (`ranks.agreement.together`);
whatever escapes on one rank alone ends the whole job in `run_guarded`.

Importing this file does not start MPI: `nodepint --help` runs through `run_guarded` too.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from nodepint_mpi.errors import NodepintError

if TYPE_CHECKING:
    import mpi4py.MPI

logger = logging.getLogger(__name__)

FAILED = 1
EXPLAINED = 2
INTERRUPTED = 130
MEETING_S = 5.0  # how long a rank that leaves with an explanation waits for the others to do so
ABORT_S = 3.0  # how long an abort by MPI may take before the process just exits

_before_abort: list[Callable[[], None]] = []


def before_abort(callback: Callable[[], None]) -> Callable[[], None]:
    """Call something just before this rank aborts. Local. Returns what takes it back."""
    _before_abort.append(callback)
    return lambda: _before_abort.remove(callback) if callback in _before_abort else None


def abort(
    reason: str, *, rank: int | None = None, host: str | None = None, code: int = FAILED
) -> NoReturn:
    """Print one message and end the whole job at once, with exit code `code`. Local.

    From any thread. Nothing is cleaned up, on any rank: open files stay as they are.

    Args:
        reason: What went wrong, for the user.
        rank: Whose fault it is; this rank if left out.
        host: The host of that rank.
        code: The exit code of the job.
    """
    world = _world()
    for callback in list(_before_abort):
        with contextlib.suppress(Exception):  # a courtesy; the abort must happen
            callback()
    rank = (world.Get_rank() if world is not None else 0) if rank is None else rank
    _print_error(f"nodepint: rank {rank} on {host or socket.gethostname()}: {reason}")
    if world is not None and world.Get_size() > 1:
        backstop = threading.Timer(ABORT_S, os._exit, args=(code,))
        backstop.daemon = True
        backstop.start()
        if _is_safe_from_this_thread():
            world.Abort(code)
    os._exit(code)


def run_guarded(main: Callable[[], int]) -> int:
    """Run the program and return its exit code. Collective if `main` has started MPI.

    An error with an explanation, raised by all ranks, is printed once and gives 2 on all ranks.
    Anything else on one rank is printed with its traceback and ends the whole job: returning would
    leave this rank waiting in MPI_Finalize for ranks that wait for it in another call.
    """
    try:
        return main()
    except NodepintError as error:
        if _meet():
            if _rank() == 0:
                _print_error(f"nodepint: {error}")
            return EXPLAINED
        abort(str(error), code=EXPLAINED)
    except KeyboardInterrupt:
        if _is_alone():
            _print_error("nodepint: interrupted")
            return INTERRUPTED
        abort("interrupted", code=INTERRUPTED)
    except SystemExit as leaving:
        if leaving.code in (None, 0) or _meet():
            raise
        abort(f"left with exit code {leaving.code}")
    except BaseException as error:
        _print_error(traceback.format_exc().rstrip())
        reason = f"{type(error).__name__}: {error}".strip()  # without the notes that JAX adds
        if _is_alone():
            _print_error(f"nodepint: rank 0 on {socket.gethostname()}: {reason}")
            return FAILED
        abort(reason)


def _world() -> "mpi4py.MPI.Intracomm | None":
    """All ranks, if this process has started MPI (an import would start it). Local."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return None
    from nodepint_mpi.parallel.comms import world

    return world()


def _rank() -> int:
    world = _world()
    return world.Get_rank() if world is not None else 0


def _is_alone() -> bool:
    world = _world()
    return world is None or world.Get_size() == 1


def _meet() -> bool:
    """Whether all ranks come here within a few seconds, so that they can leave together.

    Collective over the world. An error that should have been everybody's may be one rank's only.
    """
    world = _world()
    if world is None:
        return True
    request = world.Ibarrier()
    deadline = time.monotonic() + MEETING_S
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_safe_from_this_thread() -> bool:
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE or MPI.Is_thread_main()


def _print_error(message: str) -> None:
    """Print in one write, so that lines of several ranks do not mix."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or a full disk behind it
            stream.flush()
    with contextlib.suppress(Exception):
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
