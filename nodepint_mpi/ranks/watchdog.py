"""Ends the job when a rank hangs, is stopped or is silently gone, and says which one and where.

A thread on every rank exchanges a small heartbeat over TCP each second. Rank 0 judges all others,
these judge rank 0. What counts as stuck is in `ranks.activity`: a rank that computes is not, and
`ranks.busy` sees whether it does. The last act is the same in all cases: every rank that
still can dumps its Python stack, one message names the rank, the job aborts.

The thread makes no MPI call but that abort.
"""

import logging
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from nodepint_mpi.ranks import guard
from nodepint_mpi.ranks.activity import Finding, Phase, PhaseClock, Report, find_stuck
from nodepint_mpi.ranks.busy import Sampler
from nodepint_mpi.ranks.heartbeat import Message, Peers, connect

if TYPE_CHECKING:
    import mpi4py.MPI

logger = logging.getLogger(__name__)

BEAT_S = 1.0
POLL_S = 0.25
SAMPLE_S = 0.3  # of a rank that may be stuck, once in each beat
STARVED_S = 3.0  # this thread itself did not run for so long: it cannot accuse others of silence
DUMP_S = 0.7  # for the stacks to be written before the job is killed
TURN_S = 2.0  # rank 1 speaks first about rank 0; the others only if rank 1 does not
GONE_S = 2.0  # a closed connection may be a rank that leaves in order: its farewell can be lost
LAST_S = 6.0  # a rank told that the job ends exits by itself if it does not


class Watchdog:
    """Watches the ranks for as long as its `with` statement lasts.

    Collective over `control`, where it is entered and where it is left without an exception. A rank
    that leaves with an exception goes on being watched until all have, or its process ends.

    On one rank, or where the ranks cannot be connected, only `first_limit_s` (or a larger limit of
    the phase) applies, and each rank watches itself.
    """

    def __init__(
        self,
        control: "mpi4py.MPI.Intracomm",
        limit_s: float = 15.0,
        *,
        first_limit_s: float = 900.0,
        quiet_s: float = 10.0,
    ) -> None:
        """Local.

        Args:
            control: The ranks to watch.
            limit_s: How long a rank may stay in a local phase while others wait for it, and the
                least limit of a collective phase in which no rank computes.
            first_limit_s: Limit of a collective phase the first two times (it compiles) unless it
                states its own, of any phase while JAX is compiling, and of phases in which no
                rank waits for another.
            quiet_s: How long a rank may give no sign of life.
        """
        self._control = control
        self._rank = control.Get_rank()
        self._size = control.Get_size()
        self._limit_s = limit_s
        self._patience_s = first_limit_s
        self._quiet_s = quiet_s
        self._hosts = [socket.gethostname()] * self._size
        self._peers: Peers | None = None
        self._reports: dict[int, tuple[float, Report]] = {}
        self._excused: set[int] = set()
        self._gone: dict[int, tuple[float, Report]] = {}
        self._stop = threading.Event()
        self._leaving = False
        self._named: Phase | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._clock = PhaseClock(limit_s, first_limit_s, quiet_s=quiet_s)

    def __enter__(self) -> "Watchdog":
        """Connect the ranks and begin to watch. Collective over `control`."""
        if self._size > 1:
            # The first lowercase allreduce on a communicator waits with the interpreter lock held
            # (mpi4py 4.1.2 duplicates it then; later ones do not): no thread could watch.
            self._control.allreduce(0)
            self._hosts = self._control.allgather(socket.gethostname())
            self._peers = connect(self._control, self._hosts)
            if self._peers is None and self._rank == 0:
                logger.warning("the ranks cannot be connected by TCP: each watches only itself")
        limit_s = self._limit_s if self._peers is not None else self._patience_s
        self._sampler = Sampler()
        self._clock = PhaseClock(
            limit_s,
            self._patience_s,
            quiet_s=self._quiet_s,
            announce=self._announce,
            sees_work=self._sampler.works,
        )
        self._take_back = guard.before_abort(self._excuse)
        now = time.monotonic()
        if self._peers is not None:
            self._reports = {rank: (now, self._clock.report()) for rank in self._peers.ranks}
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Wait for all ranks and end the watch; after an exception, do not wait."""
        if kind is not None:
            Phase(self._clock, f"leaving after {kind.__name__}").__enter__()
            self._leaving = True
            self._excuse()
            return
        with self.phase("end of the run", collective=True, limit_s=self._limit_s):
            self._control.Barrier()
        self._excuse()
        self._stop.set()
        self._thread.join()

    def phase(
        self,
        name: str,
        *,
        collective: bool = False,
        step: int | None = None,
        limit_s: float | None = None,
    ) -> Phase:
        """Note what this rank does in the body of a `with` statement. Local; about 2 us.

        Args:
            name: For the message; the times of a collective phase are kept by name.
            collective: Whether this rank waits for others in it.
            step: For the message.
            limit_s: How long it may take, where the default is too short. The rank may also be
                silent for so long: a phase that holds Python's interpreter lock needs it.
        """
        return Phase(self._clock, name, collective, step, limit_s)

    def spent(self) -> dict[str, float]:
        """Seconds of this rank in the phases that are over, by name. Local."""
        return dict(self._clock.spent)

    def _announce(self) -> None:
        if self._peers is not None:
            self._peers.send(["beat", *self._clock.report()])

    def _excuse(self) -> None:
        """Tell the others that this rank may end its connection: it leaves, or has spoken."""
        if self._peers is not None:
            self._peers.send(["bye"])

    def _watch(self) -> None:
        last = beat = 0.0
        while not self._stop.is_set() and not self._is_over():
            received: list[tuple[int, Message | None]] = []
            if self._peers is not None:
                received = self._peers.receive(POLL_S)
            else:
                self._stop.wait(POLL_S)
            now = time.monotonic()
            if now - last > STARVED_S:
                self._reports = {rank: (now, old) for rank, (_, old) in self._reports.items()}
            last = now
            for rank, message in received:
                self._hear(rank, message, now)
            if now - beat >= BEAT_S:
                self._look_for_work()
                self._announce()
                beat = now
            finding = self._judge(now)
            if finding is not None:
                self._end(finding)
        if self._peers is not None:
            self._peers.close()
        self._take_back()

    def _look_for_work(self) -> None:
        """Notes that this rank computes, where it may be stuck; says once that a phase lasts."""
        if not self._clock.may_wait() or not self._sampler.computes(SAMPLE_S):
            return
        self._clock.note_work()
        phase, seconds = self._clock.now, time.monotonic() - self._clock.now.start
        if phase is not self._named and seconds > self._limit_s:
            self._named = phase
            logger.warning(
                "%s has taken %.0f s and still computes: adaptive steps that became very small do "
                "so, as in a training that diverges", self._clock.report().describe(), seconds,
            )  # fmt: skip

    def _is_over(self) -> bool:
        """Whether this rank and all it knows have left with an exception."""
        return self._leaving and (self._peers is None or self._excused >= set(self._peers.ranks))

    def _hear(self, rank: int, message: Message | None, now: float) -> None:
        match message:
            case ["beat", *report]:
                self._reports[rank] = (now, Report(*report))  # pyright: ignore[reportArgumentType]
            case ["bye"]:
                self._excused.add(rank)
            case ["dump"]:
                self._dump()
                time.sleep(LAST_S)  # rank 0 speaks and aborts
                os._exit(guard.FAILED)
            case None:
                self._gone[rank] = (now, self._reports.pop(rank)[1])
            case _:
                logger.debug("rank %d sent %s", rank, message)

    def _judge(self, now: float) -> Finding | None:
        for rank, (since, report) in self._gone.items():
            if now - since > GONE_S and rank not in self._excused and not self._leaving:
                self._wait_for_turn()
                self._abort(
                    Finding(
                        rank,
                        "is gone (killed, perhaps because memory ran out); last seen in "
                        f"{report.describe()}",
                    )
                )
        for rank, (heard, report) in self._reports.items():
            if now - heard > report.quiet_s:
                return Finding(
                    rank,
                    f"has not responded for {now - heard:.0f} s (stopped, or its host is "
                    f"gone); last seen in {report.describe()}",
                )
        if self._rank != 0 and self._peers is not None:
            return None
        # Silence for longer than a beat or two is judged above: a rank whose watchdog is starved of
        # processor time is not accused of what it has not reported.
        reports = {
            rank: report._replace(seconds=report.seconds + min(now - heard, 2 * BEAT_S))
            for rank, (heard, report) in self._reports.items()
        }
        return find_stuck({self._rank: self._clock.report(), **reports}, self._patience_s)

    def _end(self, finding: Finding) -> NoReturn:
        if self._peers is not None and self._rank == 0:
            self._peers.send(["dump"])
        self._dump()
        time.sleep(DUMP_S)
        self._wait_for_turn()
        self._abort(finding)

    def _abort(self, finding: Finding) -> NoReturn:
        guard.abort(finding.reason, rank=finding.rank, host=self._hosts[finding.rank])

    def _wait_for_turn(self) -> None:
        """So that one rank speaks: rank 0 about the others, the lowest of these about rank 0."""
        time.sleep(min(max(0, self._rank - 1), 3) * TURN_S)

    def _dump(self) -> None:
        """Write the Python stacks of this rank to stderr, in one piece."""
        title = f"nodepint: stacks of rank {self._rank} on {self._hosts[self._rank]}\n"
        os.write(2, f"{title}{thread_stacks()}\n".encode())


def thread_stacks() -> str:
    """Where all other threads are, in the form of `faulthandler`.

    Not by it: made for a process that has crashed, it does not keep to the interpreter's rules, and
    a rank has ended by a segmentation fault at about this point.
    """
    parts = []
    for thread, frame in sys._current_frames().items():
        if thread == threading.get_ident():
            continue
        lines = [f"Thread 0x{thread:016x} (most recent call first):"]
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
            frame = frame.f_back
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
