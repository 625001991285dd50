"""`nodepint bench startup`: seconds from a command to its first optimizer step.

Whole commands in processes of their own: first with no compiled programs, then with those that the
first one has left, as a job finds them that is started again. Beside them plain diffrax, which
keeps none. Importing this module loads neither MPI nor JAX.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import ConfigError, NodepintError
from nodepint_mpi.io.directory import config_text
from nodepint_mpi.ranks.child import cores_for, find_mpirun, run_child
from nodepint_mpi.ranks.launcher import in_job

N_STEPS = 2
"""Optimizer steps of each command: the first, and one that compiles nothing."""

# The cache of this bench is the one of the config: JAX's own would be used in its place.
_SETTINGS = {"JAX_COMPILATION_CACHE_DIR": "", "MPLBACKEND": "Agg"}


def run_bench_startup(
    configs: Sequence[Config],
    *,
    ranks: Sequence[int],
    repeats: int,
    timeout_s: float,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Start each config plainly and on each number of ranks, cold and warm. Outside of MPI jobs.

    Args:
        configs: The experiments, without growth; each takes `N_STEPS` steps.
        ranks: Numbers of ranks, each on a core of its own.
        repeats: How often each of them starts, cold and warm.
        timeout_s: Time each command may take.
        report: Told about each row as it is complete.

    Returns:
        A row for each case: medians of the seconds from the command to the end of the first step
        and to its own end, the ratio to plain diffrax, and how many programs were compiled.

    Raises:
        ConfigError: inside a job, or for more ranks than cores.
        NodepintError: if a command fails.
    """
    if in_job():
        raise ConfigError("`nodepint bench startup` starts its own jobs: run it without mpirun.")
    cores_for(max(ranks))
    rows = []
    for config in configs:
        plain_s = None
        for n_ranks in (0, *ranks):  # 0: plain
            cold, warm = [], []
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as folder:
                    for runs in (cold, warm) if n_ranks else (cold,):
                        runs.append(_start(config, n_ranks, Path(folder), timeout_s))
            for name, runs in (("cold", cold), ("warm", warm)):
                if not runs:
                    continue
                first_s, command_s, compiled = map(statistics.median, zip(*runs, strict=True))
                plain_s = first_s if plain_s is None else plain_s
                rows.append({
                    "config": config.run.name,
                    "n_ranks": n_ranks or None,
                    "programs": name,
                    "first_step_s": first_s,
                    "command_s": command_s,
                    "ratio_to_plain": first_s / plain_s,
                    "n_compiled": compiled if n_ranks else None,
                })  # fmt: skip
                report(_row(rows[-1]))
    return rows


def format_bench_startup(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown, a line per case. Local."""
    lines = [
        "| config | started | programs | first step after, s | to plain | whole command, s "
        "| compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, rows)])


def _row(row: dict[str, Any]) -> str:
    who = "plain diffrax" if row["n_ranks"] is None else f"ranks: {row['n_ranks']}"
    compiled = "-" if row["n_compiled"] is None else f"{row['n_compiled']:.0f}"
    cells = [
        row["config"], who, row["programs"], f"{row['first_step_s']:.1f}",
        f"{row['ratio_to_plain']:.2f}", f"{row['command_s']:.1f}", compiled,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _start(
    config: Config, n_ranks: int, folder: Path, timeout_s: float
) -> tuple[float, float, int]:
    """Seconds to the first step and of the whole command, and how many programs were added."""
    programs = folder / "programs"
    run = {"n_steps": N_STEPS, "n_epochs": None, "data_ranks": 1}
    run["compile_cache"] = str(programs) if n_ranks else "off"
    update: dict[str, Any] = {"run": config.run.model_copy(update=run)}
    if not n_ranks:  # plain training has no relaxation, and refuses a run that ends during it
        update["time"] = config.time.model_copy(update={"relaxation": None})
    file, result = folder / "config.toml", folder / "result.json"
    file.write_text(config_text(config.model_copy(update=update)))
    command = [sys.executable, "-m", "nodepint_mpi", "train", str(file)]
    with tempfile.TemporaryDirectory() as out:
        command += ["--out", f"{out}/run", "--json", str(result)]
        if n_ranks > 1:
            command = [find_mpirun(), "-n", str(n_ranks), *command]
        before, began = _count(programs), time.time()
        ended = run_child(
            command if n_ranks else [*command, "--plain"], timeout_s, settings=_SETTINGS
        )
        command_s = time.time() - began
    if ended.why:
        raise NodepintError(f"{config.run.name} on {n_ranks or 'plain'} ranks failed: {ended.why}")
    found = json.loads(result.read_text())
    first_s = found["started_at"] + found["first_step_s"] - began
    return first_s, command_s, _count(programs) - before


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*/*.program"))
