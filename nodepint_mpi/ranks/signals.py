"""A signal asks the run to stop; it is a flag, and the ranks agree on it at a step boundary.

Install it first thing, before JAX is imported (that takes seconds, in which a forwarded signal
would kill the rank). Nothing here imports JAX, and MPI only when ranks agree.
"""

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mpi4py.MPI

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopFlag:
    """Remembers that this process was asked to stop, by a signal or by the program itself.

    A Python signal handler runs between two bytecodes of the main thread, so not during a jitted
    call: a step must be short against the time the scheduler grants.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._asked = False

    def ask(self) -> None:
        """Stop, for a reason of the program's own. Local."""
        self._asked = True

    def install(self) -> "StopFlag":
        """Handle the stop signals from now on. Local; main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        return self

    def ignore(self) -> None:
        """Ignore the stop signals from now on: the work is done, only the exit is left. Local."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def requested_anywhere(self, control: "mpi4py.MPI.Intracomm") -> bool:
        """Whether any rank was asked to stop. Collective over `control`; equal on all ranks."""
        from mpi4py import MPI

        asked = self._asked or self.received is not None
        return bool(control.allreduce(int(asked), op=MPI.MAX))

    def _remember(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
