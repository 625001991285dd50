"""Whether a person watches: the terminal that a rank writes to, or its launcher for it.

Under mpirun a rank writes to a pipe, and the launcher copies what comes to its own terminal. All
functions are local. Importing this module loads neither MPI nor JAX.
"""

import os
from pathlib import Path
from typing import IO

_LAUNCHERS = {
    "mpirun", "mpiexec", "orterun", "prterun", "orted", "prted", "hydra_pmi_proxy", "mpiexec.hydra",
}  # fmt: skip
_MAX_ANCESTORS = 4
_USUAL_WIDTH = 80


def terminal_width(
    stream: IO[str], *, pid: int | None = None, proc: Path = Path("/proc")
) -> int | None:
    """Columns of the terminal that shows what is written to a stream; None if there is none. Local.

    Args:
        stream: Standard output or standard error.
        pid: The process that is asked about; this one unless given.
        proc: Where the system describes its processes; without it only `stream` is looked at.
    """
    if stream.isatty():
        return _width(stream.fileno())
    parent = _parent(proc, os.getpid() if pid is None else pid)
    for _ in range(_MAX_ANCESTORS):
        if parent is None or _name(proc, parent) not in _LAUNCHERS:
            return None
        width = _width_of_file(proc / str(parent) / "fd" / str(_STANDARD_ERROR))
        if width is not None:
            return width
        parent = _parent(proc, parent)
    return None


_STANDARD_ERROR = 2


def _width_of_file(path: Path) -> int | None:
    """Columns, if the file is a terminal that may be opened."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _width(file) if os.isatty(file) else None
    finally:
        os.close(file)


def _width(file: int) -> int:
    try:
        return os.get_terminal_size(file).columns or _USUAL_WIDTH
    except OSError:
        return _USUAL_WIDTH


def _name(proc: Path, pid: int) -> str | None:
    """What a process is called, as far as the system says."""
    try:
        return (proc / str(pid) / "comm").read_text().strip()
    except (OSError, ValueError):
        return None


def _parent(proc: Path, pid: int) -> int | None:
    """The process that started another one; None if nothing is said of it."""
    try:
        words = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return int(words[1])
    except (OSError, ValueError, IndexError):
        return None
