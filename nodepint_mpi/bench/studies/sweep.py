"""Sweeps over hyper-parameters: their trials, which is the best, and the page that compares them.

A trial is a run directory, OUT/N, with its resolved config, N.toml, and a note, N.json, beside it.
All trials are known beforehand, from the file alone: tasks of a SLURM array need not talk to each
other, and a trial that is done is not done again. Importing this module loads neither MPI nor JAX.
"""

import functools
import itertools
import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from scipy.stats import qmc

from nodepint_mpi.bench.studies.kept import check_run
from nodepint_mpi.bench.studies.rows import training_time
from nodepint_mpi.bench.studies.runs import NOTHING_TO_DO, Row, Run, Series
from nodepint_mpi.bench.studies.scaling import describe
from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.config.sweep import Range, Sweep
from nodepint_mpi.errors import ConfigError, DataError, NodepintError
from nodepint_mpi.io.directory import DONE, write_text
from nodepint_mpi.names import hint
from nodepint_mpi.pages.page import check_page, write_page
from nodepint_mpi.pages.parts import Picture, Section, Table, number

PAGE = "sweep.html"
OPTIONS = "options.txt"
TEMPLATE = "jobs/array.sbatch"
DIGITS = 4
"""Significant digits of a number drawn from a range."""
N_COLUMNS = 3
ASKING_S = 60.0


def series_of(sweep: Sweep) -> Series:
    """What its trials have in common. Local."""
    return Series(
        results="trials.jsonl",
        lock=".lock",
        rows_lock=".lock-trials",
        resumes=True,
        begins="training",
        changed="its config or its cores have changed",
        numbers=functools.partial(_read_result, sweep.metric),
        noted=("machine", "date", "commit", "n_starts"),
    )


def draw_settings(sweep: Sweep) -> list[dict[str, Any]]:
    """The values of the searched keys of each trial, in order; the same at every call. Local.

    Sobol sequence: Owen (1998), J. Complexity 14, as SciPy has it. Trials that come out equal, as
    they may where only lists and whole numbers are searched, are taken once.
    """
    if sweep.n_trials is None:
        lists = [values for values in sweep.search.values() if isinstance(values, list)]
        chosen = itertools.product(*lists)
        return [dict(zip(sweep.search, values, strict=True)) for values in chosen]
    sequence = qmc.Sobol(len(sweep.search), rng=np.random.default_rng(sweep.seed))
    points = sequence.random_base2(max(0, math.ceil(math.log2(sweep.n_trials))))
    settings = []
    for point in points[: sweep.n_trials]:
        values = [_value(*pair) for pair in zip(sweep.search.values(), point, strict=True)]
        settings.append(dict(zip(sweep.search, values, strict=True)))
    return [one for i, one in enumerate(settings) if one not in settings[:i]]


def _value(choice: list[Any] | Range, share: float) -> Any:
    """What lies at this share, in [0, 1), of a list or of a range."""
    if isinstance(choice, list):
        return choice[int(share * len(choice))]
    low, high = choice.low, choice.high
    if choice.whole:
        low, high = low - 0.5, high + 0.5  # as much room for the ends as for the others
    if choice.log:
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    else:
        value = low + share * (high - low)
    value = min(max(value, choice.low), choice.high)
    return round(value) if choice.whole else float(f"{value:.{DIGITS}g}")


def plan_trials(sweep: Sweep, source: str, out: Path, *, only: Sequence[int] = ()) -> list[Run]:
    """All trials; those to be done are `chosen`. Local; writes nothing.

    Args:
        sweep: The sweep.
        source: Its file, for messages.
        out: Where the trials are.
        only: Numbers of the trials to do, from 1; all if there are none.

    Raises:
        NodepintError: for numbers that are not there, configs that cannot be, a metric that no run
            would have, and data that are not prepared.
    """
    settings, trials = draw_settings(sweep), []
    for trial in only:
        if not 1 <= trial <= len(settings):
            raise ConfigError(f"`--trials {trial}`: {source} has trials 1 to {len(settings)}.")
    for i, searched in enumerate(settings, 1):
        try:
            config = read_config(sweep.config, sweep.set | searched)
            _check_metric(config, sweep.metric)
            check_run(config, sweep.ranks, sweep.config)
        except NodepintError as error:
            raise type(error)(f"{source}, trial {i}: {error}") from error
        facts = {
            "trial": i, "settings": searched, "n_ranks": sweep.ranks, "n_cores": sweep.cores,
            "run": str(out / str(i)),
        }  # fmt: skip
        label = f"trial {i}, {', '.join(describe(searched))}"
        trial = Run(label, out / str(i), config, sweep.ranks, sweep.cores, facts)
        trials.append(trial._replace(chosen=not only or i in only))
    return trials


def _check_metric(config: Config, metric: str) -> None:
    """Refuse, before hours are spent, a score on a validation set that there is not."""
    assert config.data is not None or metric  # `check_run` explains
    validated = config.data is not None and config.data.is_validated
    if "valid_" in metric and not validated:
        raise ConfigError(
            f"`metric = {metric!r}` is of the validation set, and the config has none: set "
            "`data.valid_split` or `data.valid_fraction`."
        )
    if metric.startswith("best_") and metric != f"best_{config.output.best}":
        raise ConfigError(
            f"`metric = {metric!r}` needs `output.best = {metric.removeprefix('best_')!r}`, which "
            f"is {config.output.best!r}."
        )


def _read_result(metric: str, run: Run) -> Row:
    """Of a finished trial: what it is compared by, and what it took."""
    done = json.loads((run.folder / DONE).read_text(encoding="utf-8"))
    known = [n for n, value in done.items() if isinstance(value, int | float)]
    if metric not in known:
        raise DataError(f"the run {run.folder} has no number {metric!r}{hint(metric, known)}")
    return {"metric": done[metric], "step": done["step"], "training_s": training_time(run)}


def write_options(sweep: Sweep, trials: Sequence[Run], out: Path) -> Path:
    """The options of all trials, a line each, as `jobs/array.sbatch` reads them. Local.

    Raises:
        ConfigError: for a value that has blanks in it, at which that script splits lines.
    """
    lines = []
    for trial in trials:
        words = []
        for key, value in (sweep.set | trial.facts["settings"]).items():
            text = json.dumps(value, separators=(",", ":"))
            if isinstance(value, dict) or any(letter.isspace() for letter in text):
                raise ConfigError(
                    f"`{key} = {text}` cannot go through an array of jobs, whose options are split "
                    "at blanks: write it into a config file of its own."
                )
            words += ["--set", f"{key}={text}"]
        lines.append(" ".join(words) + "\n")
    write_text(out / OPTIONS, "".join(lines))
    return out / OPTIONS


def array_command(sweep: Sweep, trials: Sequence[Run], out: Path, at_once: int | None) -> list[str]:
    """What submits the chosen trials that are not finished as one array of jobs. Local.

    Raises:
        ConfigError: if there is none.
    """
    numbers = [str(t.facts["trial"]) for t in trials if t.chosen and t.state() not in NOTHING_TO_DO]
    if not numbers:
        raise ConfigError("All trials are finished: nothing is to be submitted.")
    most = "" if at_once is None else f"%{at_once}"
    return [
        "sbatch", "--parsable", f"--array={','.join(numbers)}{most}", f"--ntasks={sweep.ranks}",
        f"--cpus-per-task={sweep.cores}", TEMPLATE, sweep.config, str(out / OPTIONS), str(out),
    ]  # fmt: skip


def submit_array(
    sweep: Sweep,
    trials: Sequence[Run],
    out: Path,
    at_once: int | None,
    report: Callable[[str], None],
) -> None:
    """Submit the trials that are to be done; what is there of one is resumed. Local.

    Raises:
        ConfigError: if sbatch is not on the PATH or refuses the job, or an option has blanks in it.
    """
    command = array_command(sweep, trials, out, at_once)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the PATH: `--submit` needs SLURM. Add `--dry-run` to only show the "
            "command."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_options(sweep, trials, out)
    for trial in (one for one in trials if one.chosen):
        state = trial.state()
        if state == "stale":
            report(f"{trial.label}: stale, its config or its cores have changed")
            trial.kept.set_aside()
        if state not in NOTHING_TO_DO:
            trial.kept.write_note({"digest": trial.kept.digest, "reason": "", "n_starts": 1})
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ASKING_S
        )
        why = "" if done.returncode == 0 else " ".join(done.stderr.split()) or done.returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"`{shlex.join(command)}` failed: {error}") from error
    if why:
        raise ConfigError(f"sbatch refused the array: {why}.")
    report(f"job {done.stdout.strip().partition(';')[0]}: {shlex.join(command)}")


def ranked(sweep: Sweep, rows: Sequence[Row]) -> list[Row]:
    """Finished trials, the best first and those with a NaN or infinite metric last. Local."""
    sign = 1 if sweep.mode == "min" else -1

    def place(row: Row) -> tuple[bool, float]:
        value = row["metric"]
        return not math.isfinite(value), sign * value

    return sorted((row for row in rows if row["state"] == "finished"), key=place)


def make_report(sweep: Sweep, source: str, rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """The table of trials as text, and the page OUT/sweep.html. Local.

    Raises:
        OutputError: if the page cannot be written.
    """
    best = ranked(sweep, rows)
    others = [row for row in rows if row["state"] != "finished"]
    head = ("trial", *sweep.search, sweep.metric, "step", "training, s", "state")
    table = Table(head, [_line(sweep, row) for row in [*best, *others]])
    page = out / PAGE
    check_page(page)
    sections = [Section("Trials", [table])]
    if best:
        sections.insert(0, Section("The best", [_advice(sweep, best[0])]))
        caption = f"{sweep.metric} against each key; the best trial has a ring."
        sections.append(Section("Search", [Picture("search", draw_search(sweep, best), caption)]))
    subtitle = f"{source}: {sweep.config}, {len(best)} of {len(rows)} trials finished"
    write_page(page, sections, title=f"Sweep: {Path(source).stem}", subtitle=subtitle)
    return {"page": str(page), "table": table, "best": best[0] if best else None}


def draw_search(sweep: Sweep, rows: Sequence[Row]) -> Figure:
    """The metric of finished trials, the best first, against each key: a panel a key. Local."""
    n_columns = min(N_COLUMNS, len(sweep.search))
    n_rows = -(-len(sweep.search) // n_columns)
    figure = Figure(figsize=(3.3 * n_columns + 0.6, 2.9 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for panel in panels.ravel()[len(sweep.search) :]:
        panel.axis("off")
    values = np.array([row["metric"] for row in rows], float)
    for panel, (key, choice) in zip(panels.ravel(), sweep.search.items(), strict=False):
        found = [row["settings"][key] for row in rows]
        if isinstance(choice, list):
            places = np.array([choice.index(value) for value in found], float)
            panel.set_xticks(range(len(choice)), [number(value) for value in choice])
        else:
            places = np.array(found, float)
            _range_axis(panel, choice)
        panel.plot(places, values, "o", color="0.3", markersize=4)
        panel.plot(
            places[:1], values[:1], "o", markersize=10, markerfacecolor="none", color="black"
        )
        panel.set_xlabel(key)
        panel.grid(alpha=0.3)
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min():
        panels[0, 0].set_yscale("log")
    for panel in panels[:, 0]:
        panel.set_ylabel(sweep.metric)
    return figure


def _range_axis(panel: Axes, choice: Range) -> None:
    """The whole range with a little room, whether all of it was tried or not."""
    if choice.log:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
        room = (choice.high / choice.low) ** 0.05
        panel.set_xlim(choice.low / room, choice.high * room)
        return
    room = 0.05 * (choice.high - choice.low)
    panel.set_xlim(choice.low - room, choice.high + room)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=choice.whole))


def _line(sweep: Sweep, row: Row) -> tuple[str, ...]:
    state = row["state"] + (f": {row['reason']}" if row["reason"] else "")
    searched = [number(row["settings"][key]) for key in sweep.search]
    found: Mapping[str, Any] = row if row["state"] == "finished" else {}
    shown = [number(found.get(name)) or "-" for name in ("metric", "step", "training_s")]
    return (str(row["trial"]), *searched, *shown, state)


def _advice(sweep: Sweep, row: Row) -> str:
    words = [w for key, v in row["settings"].items() for w in ("--set", f"{key}={json.dumps(v)}")]
    return (
        f"Trial {row['trial']}, in {row['run']}: {sweep.metric} = {number(row['metric'])} with "
        f"{shlex.join(words)}"
    )
