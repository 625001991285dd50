"""`nodepint bench control time`: how long until a control is within 1 % of the least cost.

Starts processes and jobs of its own; importing this module loads neither MPI nor JAX.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nodepint_mpi.bench.control_contestant import TimedCase
from nodepint_mpi.errors import ConfigError, NodepintError
from nodepint_mpi.ranks.child import cores_for, find_mpirun, run_for_json
from nodepint_mpi.ranks.launcher import in_job

WITHIN = 1.01
N_ROUNDS, N_RANKS = 5, 2
TIMEOUT_S = 300.0


class Way(NamedTuple):
    """Who finds the control, by which optimizer, and for how many steps at most. `n_ranks` are
    pinned to a core each; 0 is one process with all cores."""

    kind: str
    optimizer: str
    n_ranks: int
    steps: int

    @property
    def name(self) -> str:
        """In words."""
        how = {"lbfgs": "L-BFGS", "adam": "Adam", "quasi-newton": "quasi-Newton"}[self.optimizer]
        if self.kind == "diffrax":
            return f"diffrax, {how}, one process"
        tracking = "" if self.optimizer == "lbfgs" else " with tracking"
        return f"ours, {how}{tracking}, {self.n_ranks} rank{'s' * (self.n_ranks > 1)}"


WAYS = (
    Way("diffrax", "lbfgs", 0, 20),
    Way("diffrax", "quasi-newton", 0, 20),
    Way("diffrax", "adam", 0, 80),
    Way("ours", "lbfgs", N_RANKS, 20),
    Way("ours", "adam", N_RANKS, 80),
    Way("ours", "quasi-newton", N_RANKS, 20),
)


def run_control_time(
    case: TimedCase,
    *,
    report: Callable[[str], None],
    ways: Sequence[Way] = WAYS,
    n_rounds: int = N_ROUNDS,
) -> list[dict[str, Any]]:
    """All ways once, then the best serial and the best parallel one in turns. Local.

    Args:
        case: The problem.
        report: Told about each run as it ends.
        ways: Who takes part.
        n_rounds: How often the best two are run.

    Raises:
        NodepintError: inside a job, with fewer cores than ranks, or if a run fails.
    """
    if in_job():
        raise ConfigError("`bench control time` starts its own jobs: run it without mpirun.")
    runs: dict[Way, list[dict[str, Any]]] = {way: [] for way in ways}

    def take(way: Way) -> None:
        found = run_way(case, way)
        runs[way].append(found)
        report(f"time, {way.name}: cost {min(found['costs']):.6g} in {found['seconds'][-1]:.3g} s")

    for way in ways:
        take(way)
    goal = WITHIN * min(min(run["costs"]) for found in runs.values() for run in found)
    kinds = {way.kind for way in ways}
    best = [
        min((way for way in ways if way.kind == kind), key=lambda w: _seconds_to(goal, runs[w][0]))
        for kind in sorted(kinds)
    ]
    for _ in range(n_rounds - 1):
        for way in best:
            take(way)
    rows = []
    for way, found in runs.items():
        times = [_seconds_to(goal, run) for run in found]
        rows.append(
            {
                "name": way.name, "kind": way.kind, "ranks": way.n_ranks, "seconds": times,
                "evaluations": _evaluations_to(goal, found[0]), "best_cost": min(found[0]["costs"]),
                "sweeps": statistics.mean(found[0]["sweeps"]), "goal": goal,
                "step_s": min(_least_step_s(run) for run in found),
                "compiled_s": statistics.median(run["compiled_s"] for run in found),
            }
        )  # fmt: skip
    return rows


def run_way(case: TimedCase, way: Way) -> dict[str, Any]:
    """One run in a process or job of its own: what `control_contestant.contend` returns. Local.

    Raises:
        NodepintError: if it fails.
    """
    request = {"kind": way.kind, "optimizer": way.optimizer, "steps": way.steps}
    return ask(case, request, way.n_ranks, way.name)


def ask(case: TimedCase, request: dict[str, Any], n_ranks: int, name: str) -> dict[str, Any]:
    """The same of any request. Local."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request | {"case": case._asdict()}))
        command = [sys.executable, "-m", "nodepint_mpi.bench.control_contestant", str(file)]
        if n_ranks:
            command.append(",".join(map(str, cores_for(n_ranks)[:n_ranks])))
        if n_ranks > 1:
            command = [find_mpirun(), "-n", str(n_ranks), *command]
        found, why = run_for_json(command, TIMEOUT_S)
    if found is None:
        raise NodepintError(f"{name} failed: {why}")
    return found


def ratios(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of the best parallel way in those of the best serial one, of each round. Local."""
    most = max(len(row["seconds"]) for row in rows)
    again = {row["kind"]: row for row in rows if len(row["seconds"]) == most}
    if most == 1:
        again = {}
        for row in sorted(rows, key=lambda row: row["seconds"][0], reverse=True):
            again[row["kind"]] = row
    pairs = zip(again["ours"]["seconds"], again["diffrax"]["seconds"], strict=True)
    return [ours / serial for ours, serial in pairs]


def _evaluations_to(goal: float, run: dict[str, Any]) -> int | None:
    """How many evaluations it took, None if it did not get there."""
    return next((i + 1 for i, cost in enumerate(run["costs"]) if cost <= goal), None)


def _seconds_to(goal: float, run: dict[str, Any]) -> float:
    n = _evaluations_to(goal, run)
    return float("inf") if n is None else run["seconds"][n - 1]


def _least_step_s(run: dict[str, Any]) -> float:
    ends = run["seconds"]
    return min(right - left for left, right in zip(ends[:-1], ends[1:], strict=True))


def format_control_time(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown. Local."""
    lines = [
        "| optimizer | evaluations to 1 % | sweeps each | s (median) | least s an evaluation "
        "| compiling, s | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        n = "not reached" if row["evaluations"] is None else row["evaluations"]
        sweeps = "" if row["kind"] == "diffrax" else f"{row['sweeps']:.2g}"
        lines.append(
            f"| {row['name']} | {n} | {sweeps} | {statistics.median(row['seconds']):.3g} | "
            f"{row['step_s']:.3g} | {row['compiled_s']:.3g} | {len(row['seconds'])} |"
        )
    found = ratios(rows)
    lines += [
        "",
        f"Best parallel over best serial: median {statistics.median(found):.2f} of "
        f"{', '.join(f'{ratio:.2f}' for ratio in found)}.",
    ]
    return "\n".join(lines)
