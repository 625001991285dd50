"""The MPI library that is loaded into this process, asked without MPI.

Importing this module loads neither MPI nor JAX.
"""

import ctypes
import os
import re
from pathlib import Path

_LIBMPI = re.compile(r"lib(mpi|mpich|mpi_(?!cxx|mpif|usempi|java)\w+)\.so")


def loaded_libmpi() -> list[str]:
    """The MPI libraries that are loaded into this process, without aliases. Local."""
    maps = Path("/proc/self/maps")
    if not maps.exists():  # not Linux
        return []
    words = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    paths = {word[5] for word in words if len(word) == 6 and word[5].startswith("/")}
    return sorted(path for path in paths if _LIBMPI.match(os.path.basename(path)))


def is_cuda_aware() -> bool | None:
    """Whether the loaded MPI takes GPU memory, in its own words; None if it cannot say. Local.

    Open MPI and MPICH have had this function since 2.0 and 4.0; it may be called at any time.
    """
    for path in loaded_libmpi():
        try:
            return bool(ctypes.CDLL(path).MPIX_Query_cuda_support())
        except (OSError, AttributeError):
            continue
    return None
