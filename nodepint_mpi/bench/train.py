"""`nodepint bench train`: our step beside plain diffrax and optax, to the same final loss.

Every contestant runs in a process or job of its own, one after the other, again and again, so that
whatever else the machine does meets all of them. Importing this module loads neither MPI nor JAX.
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from nodepint_mpi.bench.contest import Contestant, run_contestant, step_seconds
from nodepint_mpi.bench.contestant import COMPILED_STEPS
from nodepint_mpi.bench.peers import can_torchdiffeq
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.ranks.child import cores_for
from nodepint_mpi.ranks.launcher import in_job


def run_bench_train(
    config: Config,
    *,
    ranks: Sequence[int],
    data_ranks: Sequence[int] = (),
    basis_ranks: Sequence[int] = (),
    n_steps: int,
    repeats: int,
    timeout_s: float,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train with every contestant and compare medians. Outside of MPI jobs.

    Every repeat has a seed of its own. The target is the loss that plain diffrax ends with: the
    mean of its last tenth of steps. Compilation is left out of all times.

    Args:
        config: The experiment; `[growth]` is left out.
        ranks: Numbers of ranks along time to run ours on, each rank on a core of its own.
        data_ranks: Numbers of ranks along samples to run ours on, besides.
        basis_ranks: Numbers of ranks that share tangents to run ours on, besides.
        n_steps: Optimizer steps of each contestant.
        repeats: How often each of them trains.
        timeout_s: Time each of them may take once.
        report: Told about each as it ends.

    Raises:
        ConfigError: inside a job, or for more ranks than cores.
        NodepintError: if a contestant fails.
    """
    if in_job():
        raise ConfigError("`nodepint bench train` starts its own jobs: run it without mpirun.")
    cores = cores_for(max(*ranks, *data_ranks, *basis_ranks, 0))
    contestants = [
        Contestant("plain diffrax, one core", "plain"),
        Contestant("plain diffrax, all cores", "plain", pinned=False),
        *(Contestant(f"nodepint_mpi, ranks: {n}", "ours", n) for n in ranks),
        *(
            Contestant(f"nodepint_mpi, data ranks: {n}", "ours", n, data_ranks=n)
            for n in data_ranks
        ),
        *(
            Contestant(f"nodepint_mpi, basis ranks: {n}", "ours", n, basis_ranks=n)
            for n in basis_ranks
        ),
    ]
    if can_torchdiffeq(config):
        contestants.append(Contestant("torchdiffeq, one core", "torchdiffeq"))
    runs: dict[str, list[dict[str, Any]]] = {one.name: [] for one in contestants}
    for repeat, one in itertools.product(range(repeats), contestants):
        seed = config.run.seed + repeat
        seeded = config.model_copy(
            update={
                "growth": None,
                "run": config.run.model_copy(update={"seed": seed, **one.dealing}),
            }
        )
        run = run_contestant(
            seeded, one, n_steps, cores, timeout_s=timeout_s, n_checks=8, scored=True
        )
        runs[one.name].append(run)
        seconds = step_seconds(runs[one.name][-1])
        report(f"{repeat + 1} of {repeats}: {one.name}: {seconds * 1e3:.2f} ms a step")
    return judge(config.run.name, n_steps, contestants, runs)


def judge(
    name: str,
    n_steps: int,
    contestants: Sequence[Contestant],
    runs: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Medians over the repeats, and their ratios. Local.

    Steps are counted to the loss that the first contestant ends with in the same repeat.
    """
    serial = [one.name for one in contestants if one.kind != "ours"]
    ours_alone = next(
        (one.name for one in contestants if one.kind == "ours" and one.n_ranks == 1), None
    )
    last = max(1, n_steps // 10)
    targets = [statistics.fmean(run["losses"][-last:]) for run in runs[serial[0]]]
    rows = []
    for one in contestants:
        some = runs[one.name]
        reached = [
            _steps_to(run["losses"], target, last)
            for run, target in zip(some, targets, strict=True)
        ]
        finals = [statistics.fmean(run["losses"][-last:]) for run in some]
        step_s = statistics.median(step_seconds(run) for run in some)
        # Of all steps, so that those with a serial gradient or more sweeps have their share.
        mean_s = statistics.median(_mean_seconds(run) for run in some)
        steps = None if None in reached else statistics.median(n for n in reached if n)
        errors = sorted(error for run in some for error in run["gradient_errors"])
        rows.append({
            "name": one.name,
            "n_ranks": one.n_ranks,
            "step_s": step_s,
            "mean_step_s": mean_s,
            "spread_s": [min(map(step_seconds, some)), max(map(step_seconds, some))],
            "final_losses": finals,
            "worst_loss_ratio": max(
                (final / target for final, target in zip(finals, targets, strict=True)),
                key=lambda ratio: abs(ratio - 1),
            ),
            "steps_to_target": steps,
            "time_to_target_s": None if steps is None else steps * mean_s,
            "sweeps": [statistics.fmean(run["sweeps"][i] for run in some) for i in range(2)],
            "serial_steps": statistics.fmean(run["serial_steps"] for run in some),
            "gradient_error": statistics.median(errors) if errors else None,
            "worst_gradient_error": errors[-1] if errors else None,
            "message_share": _median_share(some, "message_share"),
            "coarse_share": _median_share(some, "coarse_share"),
            "scores": {
                name: statistics.median(run["scores"][name] for run in some)
                for name in some[0]["scores"]
            },
            "peak_bytes": max(run["peak_bytes"] for run in some),
            "losses": some[0]["losses"],
        })  # fmt: skip
    by_name = {row["name"]: row for row in rows}
    best = min((by_name[s] for s in serial), key=lambda row: row["step_s"])
    for row in rows:
        row["step_ratio_to_serial"] = row["step_s"] / best["step_s"]
        row["time_ratio_to_serial"] = _ratio(row, best)
        row["time_ratio_to_one_rank"] = _ratio(row, by_name[ours_alone]) if ours_alone else None
    return {"name": name, "n_steps": n_steps, "target_loss": targets[0], "contestants": rows}


def format_bench_train(result: dict[str, Any]) -> str:
    """A table in Markdown, a line per contestant. Local."""
    scores = result["contestants"][0]["scores"]
    score = next((name for name in scores if name != "loss"), "loss")  # accuracy, say
    lines = [
        f"{result['name']}: {result['n_steps']} steps, target loss {result['target_loss']:.5g}",
        "",
        "| contestant | ms a step (mean) | to serial | steps to target | time to target, s "
        f"| to serial | to one rank | loss to serial's, worst | test {score} | sweeps "
        "| gradient error (worst) | in messages | coarse | peak, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["contestants"]:
        sweeps = " + ".join(f"{n:.2f}" for n in row["sweeps"])
        error = "-"
        if row["gradient_error"] is not None:
            error = f"{row['gradient_error']:.1e} ({row['worst_gradient_error']:.1e})"
        cells = [
            row["name"], f"{row['step_s'] * 1e3:.1f} ({row['mean_step_s'] * 1e3:.1f})",
            f"{row['step_ratio_to_serial']:.2f}", _shown(row["steps_to_target"], ".0f"),
            _shown(row["time_to_target_s"], ".1f"),
            _shown(row["time_ratio_to_serial"], ".2f"),
            _shown(row["time_ratio_to_one_rank"], ".2f"),
            f"{row['worst_loss_ratio']:.4f}", f"{row['scores'][score]:.4g}", sweeps, error,
            _shown(row["message_share"], ".1%"), _shown(row["coarse_share"], ".1%"),
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _median_share(runs: list[dict[str, Any]], name: str) -> float | None:
    """Of the runs whose steps could be profiled."""
    known = [run[name] for run in runs if run[name] is not None]
    return statistics.median(known) if known else None


def _mean_seconds(run: dict[str, Any]) -> float:
    seconds = run["seconds"]
    return statistics.fmean(seconds[min(COMPILED_STEPS, len(seconds) - 1) :])


def _steps_to(losses: Sequence[float], target: float, window: int) -> int | None:
    """Steps until the mean loss of a window is within a hundredth of the target."""
    for end in range(window, len(losses) + 1):
        if statistics.fmean(losses[end - window : end]) <= 1.01 * target:
            return end
    return None


def _ratio(row: dict[str, Any], other: dict[str, Any]) -> float | None:
    ours, theirs = row["time_to_target_s"], other["time_to_target_s"]
    return None if ours is None or theirs is None else ours / theirs


def _shown(value: float | int | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
