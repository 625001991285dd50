"""What this process has held, and what the machine it runs on is and does besides.

Importing this module loads neither MPI nor JAX.
"""

import os
import platform
import resource
import time
from collections.abc import Collection
from pathlib import Path

from nodepint_mpi.ranks.devices import own_cores

_CPU_INFO, _STAT = Path("/proc/cpuinfo"), Path("/proc/stat")
_OWN_STAT = Path("/proc/self/stat")
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)
_STARTED = 19  # starttime of proc_pid_stat(5), counted from after the command's name
_LOADED_AT = time.time()
_IDLE = slice(3, 5)  # of a line in _STAT: idle, and waiting for a disk (proc(5))


def peak_bytes() -> int:
    """The most memory this process has held. Local."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def started_at() -> float:
    """When this process started, in seconds since the epoch. Local.

    Where the system does not say, when this module was loaded.
    """
    try:
        ticks = int(_OWN_STAT.read_text().rpartition(")")[2].split()[_STARTED])
    except (OSError, ValueError, IndexError):
        return _LOADED_AT
    if _BOOT_CLOCK is None:
        return _LOADED_AT
    age_s = time.clock_gettime(_BOOT_CLOCK) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s


def describe_machine() -> str:
    """The processor and how many cores of it this process may use. Local."""
    n_cores = len(own_cores()) or os.cpu_count() or 1
    name = platform.processor() or platform.machine()
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = " ".join(value.split())
            break
    return f"{name}, {n_cores} {'core' if n_cores == 1 else 'cores'}"


def busy_share(cores: Collection[int], seconds: float = 1.0) -> float:
    """The share of these cores that something keeps busy, watched for some seconds. Local.

    A load average would count for minutes what this process itself has just ended. It is what is
    returned where cores cannot be watched.
    """
    before = _read_times(cores)
    time.sleep(seconds)
    after = _read_times(cores)
    if not cores or not before.keys() == after.keys() == set(cores):
        return os.getloadavg()[0] / max(1, len(cores))
    idle, total = (sum(now[i] - before[core][i] for core, now in after.items()) for i in (0, 1))
    return 1 - idle / total if total > 0 else 0.0


def _read_times(cores: Collection[int]) -> dict[int, tuple[int, int]]:
    """Ticks that each core has been idle, and all ticks; empty if the system does not say."""
    try:
        lines = _STAT.read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    ticks = {row[0]: [int(n) for n in row[1:9]] for row in rows if row[0].startswith("cpu")}
    named = {core: ticks.get(f"cpu{core}", []) for core in cores}
    return {core: (sum(row[_IDLE]), sum(row)) for core, row in named.items() if row}
