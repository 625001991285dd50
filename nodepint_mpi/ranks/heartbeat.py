"""Small messages between the watchdogs of the ranks, over TCP: MPI may be what is stuck.

A star: rank 0 listens, every other rank connects to it. Addresses and a random token travel over
MPI once, at the start; a connection that does not bring the token is dropped.
"""

import contextlib
import hmac
import json
import secrets
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mpi4py.MPI

CONNECT_S = 3.0
ACCEPT_S = 10.0
LOOPBACK = "127.0.0.1"

Message = list[str | int | float | bool | None]


class Peers:
    """Open connections to other ranks. Messages are lists of JSON values, one a line."""

    def __init__(self, sockets: dict[int, socket.socket]) -> None:
        self._sockets = sockets
        self._unread = dict.fromkeys(sockets, b"")
        self._lock = threading.Lock()
        for connection in sockets.values():
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def ranks(self) -> list[int]:
        """Who is still connected. Local."""
        return list(self._sockets)

    def send(self, message: Message) -> None:
        """Send to all, from any thread. Local; never waits, and losing one does no harm."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for connection in list(self._sockets.values()):
                with contextlib.suppress(OSError):  # its end is noticed where it is read
                    connection.send(line)

    def receive(self, timeout_s: float) -> list[tuple[int, Message | None]]:
        """Wait for messages, at most so long. Local.

        Returns:
            Pairs of rank and message, in order; None for a connection that has ended.
        """
        by_socket = {connection: rank for rank, connection in self._sockets.items()}
        if not by_socket:
            time.sleep(timeout_s)
            return []
        poll = select.poll()  # select.select() knows no more than 1024 files
        by_file = {connection.fileno(): connection for connection in by_socket}
        for file in by_file:
            poll.register(file, select.POLLIN)
        received: list[tuple[int, Message | None]] = []
        for file, _ in poll.poll(timeout_s * 1000):
            connection = by_file[file]
            rank = by_socket[connection]
            try:
                data = connection.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                self._drop(rank)
                received.append((rank, None))
                continue
            *lines, self._unread[rank] = (self._unread[rank] + data).split(b"\n")
            received += [(rank, json.loads(line)) for line in lines]
        return received

    def close(self) -> None:
        """Close all connections. Local."""
        for rank in self.ranks:
            self._drop(rank)

    def _drop(self, rank: int) -> None:
        with self._lock:
            self._sockets.pop(rank).close()


def connect(control: "mpi4py.MPI.Intracomm", hosts: list[str]) -> Peers | None:
    """Connect every rank with rank 0. Collective over `control`.

    Args:
        control: The ranks.
        hosts: The host of each of them, in order.

    Returns:
        Rank 0 gets connections to all others, these get one to rank 0. None on all ranks if any
        of them cannot be connected (a firewall between hosts, say).
    """
    if control.Get_rank() == 0:
        return _listen(control, hosts)
    return _call(control)


def _listen(control: "mpi4py.MPI.Intracomm", hosts: list[str]) -> Peers | None:
    addresses = _addresses(hosts)
    token = secrets.token_hex(32)
    sockets: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            where = addresses[0] if addresses == [LOOPBACK] else ""
            listener = stack.enter_context(socket.create_server((where, 0), backlog=len(hosts)))
            offer = (addresses, listener.getsockname()[1], token)
        except OSError:
            listener, offer = None, None
        control.bcast(offer)
        if all(control.allgather(offer is not None)) and listener is not None:
            deadline = time.monotonic() + ACCEPT_S
            while len(sockets) < len(hosts) - 1 and time.monotonic() < deadline:
                _accept(listener, token, sockets)
    complete = control.bcast(len(sockets) == len(hosts) - 1)
    return _peers(sockets, complete)


def _call(control: "mpi4py.MPI.Intracomm") -> Peers | None:
    offer: tuple[list[str], int, str] | None = control.bcast(None)
    sockets: dict[int, socket.socket] = {}
    addresses, port, token = offer or ([], 0, "")
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_S)
            connection.sendall(f"{token} {control.Get_rank()}\n".encode())
        except OSError:
            continue
        sockets[0] = connection
        break
    control.allgather(bool(sockets))
    return _peers(sockets, control.bcast(None))


def _peers(sockets: dict[int, socket.socket], complete: bool) -> Peers | None:
    if complete:
        return Peers(sockets)
    for connection in sockets.values():
        connection.close()
    return None


def _accept(listener: socket.socket, token: str, sockets: dict[int, socket.socket]) -> None:
    """Take one connection into `sockets` if it brings the token and a rank."""
    listener.settimeout(1.0)
    try:
        connection, _ = listener.accept()
    except OSError:
        return
    connection.settimeout(1.0)
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and len(line) < 100:
            part = connection.recv(1)  # not more: the first message may follow
            if not part:
                break
            line += part
    given, _, rank = line.decode(errors="replace").strip().partition(" ")
    if hmac.compare_digest(given.encode(), token.encode()) and rank.isdigit():
        sockets[int(rank)] = connection
    else:
        connection.close()


def _addresses(hosts: list[str]) -> list[str]:
    """Addresses of this host that the others may reach."""
    other = next((host for host in hosts if host != hosts[0]), None)
    if other is None:
        return [LOOPBACK]
    addresses: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing; tells which of our addresses faces that host
        addresses.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        addresses += socket.gethostbyname_ex(hosts[0])[2]
    return list(dict.fromkeys(a for a in addresses if not a.startswith("127."))) or [LOOPBACK]
