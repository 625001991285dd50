"""Some steps of training, by us or by others, in processes or jobs of their own.

Importing this module loads neither MPI nor JAX.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nodepint_mpi.bench.contestant import COMPILED_STEPS
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import NodepintError
from nodepint_mpi.io.directory import config_text
from nodepint_mpi.ranks.child import find_mpirun, run_for_json


class Contestant(NamedTuple):
    """Who trains ("ours", "plain" or "torchdiffeq"), on how many ranks, each pinned to a core.

    They form `data_ranks` groups that share the samples; in each of them `basis_ranks` ranks have
    the same time slices and share the tangents.
    """

    name: str
    kind: str
    n_ranks: int = 1
    pinned: bool = True
    data_ranks: int = 1
    basis_ranks: int = 1

    @property
    def dealing(self) -> dict[str, int]:
        """The keys of `[run]` that say so."""
        return {"data_ranks": self.data_ranks, "basis_ranks": self.basis_ranks}


def run_contestant(
    config: Config,
    one: Contestant,
    n_steps: int,
    cores: Sequence[int],
    *,
    timeout_s: float,
    n_checks: int = 0,
    scored: bool = False,
    network: bool = False,
) -> dict[str, Any]:
    """Let one contestant train in a process or job of its own: what `contestant.contend` returns.

    Local.

    Args:
        config: The experiment; its grid of ranks is that of the contestant.
        one: Who trains.
        n_steps: Optimizer steps.
        cores: Those of this process; a pinned rank has one.
        timeout_s: How long it may take.
        n_checks: How often our gradient is compared with the serial one.
        scored: Whether the model is scored at the end.
        network: Whether several ranks time their messages.

    Raises:
        NodepintError: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.json"
        request = {
            "config": config_text(config), "kind": one.kind, "n_steps": n_steps,
            "n_checks": n_checks, "scored": scored, "network": network,
        }  # fmt: skip
        file.write_text(json.dumps(request))
        command = [sys.executable, "-m", "nodepint_mpi.bench.contestant", str(file)]
        if one.pinned:
            command.append(",".join(map(str, cores[: one.n_ranks])))
        if one.n_ranks > 1:
            command = [find_mpirun(), "-n", str(one.n_ranks), *command]
        result, why = run_for_json(command, timeout_s)
    if result is None:
        raise NodepintError(f"{one.name} failed: {why}")
    return result


def step_seconds(run: dict[str, Any]) -> float:
    """The median step of those that compile nothing. Local."""
    seconds = run["seconds"]
    return statistics.median(seconds[min(COMPILED_STEPS, len(seconds) - 1) :])
