"""Whether this process computes or only waits, seen from where its processor time is spent.

A rank that waits in Open MPI polls, and uses as much processor time as one that computes. What
differs is the code that runs: the C library samples the instruction pointer (`profil`, profil(3)),
and each sample falls into a file that is mapped there, or into code that XLA has compiled.
"""

import contextlib
import ctypes
import functools
import math
import mmap
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAPS = Path("/proc/self/maps")
ARITHMETIC = ("jaxlib", "nvidia", "libcuda", "libm.so", "libmvec", "scipy", "numpy")
"""Parts of the paths of libraries that compute; MPI and the interpreter are elsewhere."""

_PAGE = 4096
_SCALE = 65536 * 2 // _PAGE  # one counter for each page
_REACH = 2**40  # below the highest library; memory and compiled code are mapped downward from there
_SAMPLE_FALLS_DUE_S = 0.02  # two ticks of the sampling clock
_NO_RESERVE = 0x4000  # MAP_NORESERVE: counters that are never touched take no memory


class _Counters(NamedTuple):
    """A counter for each page of code from the address `first` on."""

    first: int
    counts: np.ndarray


@functools.cache
def _counters() -> _Counters:
    """Those of this process, kept until it ends: the C library writes to them."""
    top = max(end for _, end, name in _code() if name.startswith("/"))
    first = max(0, top - _REACH) // _PAGE * _PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, 2 * ((top - first) // _PAGE), flags=flags)
    return _Counters(first, np.frombuffer(memory, np.uint16))


class Sampler:
    """Samples where this process spends its processor time. Costs nothing between samples."""

    def __init__(self) -> None:
        """Local; from any thread."""
        self._counters: _Counters | None = None
        with contextlib.suppress(OSError, AttributeError, ValueError):
            self._libc = ctypes.CDLL(None)
            self._libc.profil.argtypes = [
                ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint
            ]  # fmt: skip
            self._libc.signal.restype = ctypes.c_void_p
            self._libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
            self._counters = _counters()

    @property
    def works(self) -> bool:
        """Whether it can be known here what this process does. Local."""
        return self._counters is not None

    def computes(self, seconds: float) -> bool | None:
        """Whether any of this process computes. Local; takes `seconds`, from any thread.

        Returns:
            False if it waits in MPI, sleeps or runs Python code; None if that cannot be known here:
            no glibc, no `/proc`, or a profiler that uses the same signal.
        """
        if self._counters is None:
            return None
        # A sample that falls due after the end must find a handler: the default one is fatal.
        old = self._libc.signal(signal.SIGPROF, int(signal.SIG_IGN))
        if old not in (None, int(signal.SIG_DFL), int(signal.SIG_IGN)):
            self._libc.signal(signal.SIGPROF, old)
            return None
        before = self._read(self._counters)
        first, counts = self._counters
        if self._libc.profil(counts.ctypes.data, counts.nbytes, first, _SCALE) != 0:
            return None
        try:
            time.sleep(seconds)
        finally:
            # Not by `profil(NULL)`: it forgets the counters while its handler is still there, and
            # a sample in another thread then writes to address 0 (glibc 2.36: one segmentation
            # fault in some thousand starts and stops, six busy threads on two cores).
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            time.sleep(_SAMPLE_FALLS_DUE_S)
            self._libc.signal(signal.SIGPROF, int(signal.SIG_IGN))
        after = self._read(self._counters)
        return any(count != before.get(place, 0) for place, count in after.items())

    @staticmethod
    def _read(counters: _Counters) -> dict[int, int]:
        """What has been counted in code that computes, by where it begins."""
        found = {}
        for start, end, name in _code():
            if start < counters.first or not _is_arithmetic(name):
                continue
            pages = slice(
                (start - counters.first) // _PAGE, math.ceil((end - counters.first) / _PAGE)
            )
            count = int(counters.counts[pages].sum(dtype=np.int64))
            if count:
                found[start] = count
        return found


def _is_arithmetic(name: str) -> bool:
    """Whether code at a place of this name computes; what XLA has compiled has no name."""
    return not name or any(part in name for part in ARITHMETIC)


def _code() -> list[tuple[int, int, str]]:
    """Begin, end and file of all code in this process."""
    found = []
    for line in MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if "x" in fields[1]:
            start, end = (int(number, 16) for number in fields[0].split("-"))
            found.append((start, end, fields[5] if len(fields) > 5 else ""))
    return found
