"""One table of all ranks of a job: where each runs and with what, and what differs.

`nodepint doctor --mpi` prints it. Importing this module loads neither MPI nor JAX.
"""

import os
import platform
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from nodepint_mpi import __version__
from nodepint_mpi.io.directory import commit
from nodepint_mpi.ranks.placement import Placement

_SHOWN = ("MPI", "HDF5", "python", "jax", "mpi4jax", "mpi4py", "h5py")
_VARIABLES = (  # that change the program JAX makes, or its numbers
    "XLA_FLAGS",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "MPI4JAX_USE_CUDA_MPI",
)


class RankFacts(NamedTuple):
    """What one rank has. `place` may differ, `alike` should not, `same` must not."""

    host: str
    place: dict[str, str]
    alike: dict[str, str]
    same: dict[str, str]


class Finding(NamedTuple):
    """Something that differs between ranks: what, how, and whether it must not."""

    name: str
    found: str
    matters: bool


def describe_rank(
    placement: Placement | None, facts: dict[str, Any], versions: dict[str, str]
) -> RankFacts:
    """What this rank has. Local.

    Args:
        placement: The GPU and cores it takes, if that could be settled.
        facts: What the parts of the stack say (`probe.facts`).
        versions: Of the packages.
    """
    gpu = placement.gpu if placement is not None else None
    shared = f" (shared by {placement.n_sharing})" if placement and placement.n_sharing > 1 else ""
    cores = placement.cores if placement is not None else ()
    place = {
        "local": "?" if placement is None else str(placement.local_rank),
        "cores": format_cores(cores) or "?",
        "GPU": "-" if gpu is None else f"{gpu.ordinal}: {gpu.identity[:12]}{shared}",
    }
    alike = {"the processor": _processor(), "the number of cores": str(len(cores))}
    same = {
        "MPI": facts["mpi4py"].get("library", "?"),
        "HDF5": facts["h5py"].get("hdf5", "?"),
        "python": platform.python_version(),
        **versions,
        "nodepint_mpi": f"{__version__} ({commit() or 'no commit'})",
        "the backend": facts["jax"].get("backend", "?"),
        **{name: os.environ.get(name, "not set") for name in _VARIABLES},
    }
    return RankFacts(platform.node(), place, alike, same)


def find_findings(ranks: Sequence[RankFacts]) -> list[Finding]:
    """All that differs between ranks. Local."""
    from nodepint_mpi.ranks.agreement import name_odd

    hosts, findings = [rank.host for rank in ranks], []
    for kind, matters in (("same", True), ("alike", False)):
        tables: list[dict[str, str]] = [getattr(rank, kind) for rank in ranks]
        for name in tables[0]:
            values = [table.get(name, "?") for table in tables]
            if len(set(values)) > 1:
                odd = name_odd(values, hosts)
                found = f"{odd.value} on {odd.who}, {odd.usual} on {odd.usual_who}"
                findings.append(Finding(name, found, matters))
    return findings


def format_table(ranks: Sequence[RankFacts]) -> str:
    """A line per rank; what is not as on most ranks is marked with `!`. Local."""
    head = ["rank", "host", *ranks[0].place, *_SHOWN]
    usual = {name: _most_common([rank.same.get(name, "?") for rank in ranks]) for name in _SHOWN}
    rows = [head]
    for number, rank in enumerate(ranks):
        values = {name: rank.same.get(name, "?") for name in _SHOWN}
        marked = [f"{v}!" if v != usual[name] else v for name, v in values.items()]
        rows.append([str(number), rank.host, *rank.place.values(), *marked])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def format_cores(cores: Sequence[int]) -> str:
    """Core numbers as ranges: `0-3,8`. Local."""
    runs = groupby(enumerate(sorted(cores)), key=lambda pair: pair[1] - pair[0])
    ends = [[core for _, core in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)


def _most_common(values: list[str]) -> str:
    return max(dict.fromkeys(values), key=values.count)


def _processor() -> str:
    """The model of the processor: two models may round differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
