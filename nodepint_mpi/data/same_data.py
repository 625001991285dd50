"""Whether all ranks have opened the same data, compared before anything is computed."""

import zlib
from collections.abc import Iterable

import numpy as np
from mpi4py import MPI

from nodepint_mpi.data.datasets import Split
from nodepint_mpi.errors import AgreementError
from nodepint_mpi.ranks.agreement import find_difference, together

WHOLE_BYTES = 16 * 2**20
"""A column up to this size is compared whole, of a larger one so much in evenly spread rows."""


def require_same_data(
    control: MPI.Intracomm, source: str, name: str, split: Split, columns: Iterable[str]
) -> None:
    """Make sure that all ranks have opened the same data. Collective over `control`.

    Raises:
        AgreementError: on all ranks, with who has what.
    """
    held: dict[str, str] = {}
    with together(control):
        specs = {one: split.column(one) for one in dict.fromkeys(columns)}
        held["the number of rows"] = str(split.n_rows)
        held |= {f"the rows of {one!r}": f"{c.dtype}{list(c.shape)}" for one, c in specs.items()}
        held |= {f"the values of {one!r}": f"CRC {_digest(split, one):08x}" for one in specs}
    difference = find_difference(control, held)
    if difference is not None:
        odd = difference.odd
        raise AgreementError(
            f"The data of split {name!r} of {source} differ between ranks: {difference.name}: "
            f"{odd.value} on {odd.who}, {odd.usual} on {odd.usual_who}. All ranks must read "
            "the same data: prepare them once, on a file system that all machines see, and give "
            "its path as `data.source`."
        )


def _digest(split: Split, name: str) -> int:
    """CRC-32 of a column, or of rows spread over it."""
    column, crc = split.column(name), 0
    row_bytes = max(1, int(np.prod(column.shape, dtype=np.int64)) * column.dtype.itemsize)
    n_rows = min(split.n_rows, max(1, WHOLE_BYTES // row_bytes))
    rows = np.linspace(0, split.n_rows - 1, n_rows).astype(np.int64)
    for some in np.array_split(rows, -(-n_rows * row_bytes // 2**22)):
        crc = zlib.crc32(split.take(name, some).tobytes(), crc)
    return crc
