"""`nodepint scaling`, `sweep` and `bench table`: studies that start their own jobs."""

import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nodepint_mpi.cli.common import (
    check_file,
    json_option,
    parse_network,
    parse_ranks,
    write_json,
)
from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.config.scaling import read_scaling
from nodepint_mpi.config.sweep import read_sweep
from nodepint_mpi.config.table import read_table_list
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.ranks.launcher import in_job

LIST = "configs/table/problems.toml"
MOST_COMPARED = 6
"""Maximum number of trials in the comparison of the best ones."""

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Show what exists and what would be run."
)
launcher_option = click.option(
    "--launcher",
    metavar="WORDS",
    help="Launcher, such as 'srun -n {ranks} -c {cores}' [mpirun, one core per rank].",
)


def timeout_option(what: str) -> Callable[[Any], Any]:
    """How long one point, or one training, may take."""
    return click.option(
        "--timeout", "timeout_s", default=1800.0, show_default=True, type=click.FloatRange(1),
        help=f"Time limit of one {what}, in seconds.",
    )  # fmt: skip


@click.command()
@click.argument("study_file", metavar="STUDY", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Folder for points, points.jsonl and the page [runs/scaling/NAME].",
)  # fmt: skip
@click.option("--only", multiple=True, metavar="NAME", help="Only this study; may be repeated.")
@click.option(
    "--only-ranks", default="", metavar="N,...", callback=parse_ranks,
    help="Only the points on these numbers of ranks, without a report.",
)  # fmt: skip
@dry_run_option
@click.option("--report", "only_report", is_flag=True, help="Only report on finished points.")
@launcher_option
@click.option("--submit", is_flag=True, help="Submit a SLURM job for each number of ranks.")
@click.option(
    "--template", default="jobs/scaling.sbatch", show_default=True,
    type=click.Path(path_type=Path), help="Template of these jobs.",
)  # fmt: skip
@timeout_option("point")
@click.option(
    "--network", metavar="SECONDS,BYTES", callback=parse_network,
    help="Latency in s and bandwidth in bytes/s of the model [as measured].",
)  # fmt: skip
@json_option
def scaling(
    study_file: Path,
    out: Path | None,
    only: tuple[str, ...],
    only_ranks: tuple[int, ...],
    dry_run: bool,
    only_report: bool,
    launcher: str | None,
    submit: bool,
    template: Path,
    timeout_s: float,
    network: tuple[float, float] | None,
    json_file: Path | None,
) -> None:
    """Run the scaling studies of the file STUDY and report.

    Starts its own jobs: run it without mpirun, on an otherwise idle machine, in one allocation
    (`--launcher`), or let it submit jobs (`--submit`). Finished points are skipped. Exits with 1 if
    a point failed; the other points are still run.
    """
    if in_job():
        raise ConfigError("`nodepint scaling` starts its own jobs: run it without mpirun.")
    if only_report and (submit or dry_run):
        raise ConfigError("`--report` cannot be combined with `--submit` or `--dry-run`.")
    from nodepint_mpi.bench.studies.launch import make_launch
    from nodepint_mpi.bench.studies.rows import read_rows, write_rows
    from nodepint_mpi.bench.studies.scaling import SCALING, plan_points
    from nodepint_mpi.bench.studies.work import at_work, do_runs

    studies = read_scaling(study_file)
    out = Path("runs/scaling") / study_file.stem if out is None else out
    points = plan_points(studies, str(study_file), out, only=only, only_ranks=only_ranks)
    rows = read_rows(SCALING, points)  # says now what is damaged
    if submit:
        from nodepint_mpi.bench.studies.submit import submit_jobs, write_jobs

        options = [word for name in only for word in ("--only", name)]
        options += ["--timeout", f"{timeout_s:g}"]
        files = write_jobs(points, study_file, out, template, options)
        if dry_run:
            click.echo("\n".join(map(str, files.values())))
        else:
            submit_jobs(files, click.echo)
        return write_json({"points": rows}, json_file)
    if dry_run:
        _say_states(points, rows)
        return write_json({"points": rows}, json_file)
    n_failed = 0
    if not only_report:
        chosen = [point for point in points if point.chosen]
        launch = make_launch(
            launcher, n_ranks=max(p.n_ranks for p in chosen), n_cores=chosen[0].n_cores,
            crowded=True,
        )  # fmt: skip
        _end_with_children()
        with at_work(SCALING, out, points) as held:
            n_failed = do_runs(
                SCALING, points, launch, out, held=held, timeout_s=timeout_s, report=click.echo
            )
    rows = write_rows(SCALING, out, points)
    if only_ranks and not only_report:
        write_json({"points": rows}, json_file)
    else:
        import mpi4py

        mpi4py.rc.initialize = False  # this process sends no messages: it may be a batch shell
        from nodepint_mpi.bench.planning.network import Network
        from nodepint_mpi.bench.studies.model import make_model
        from nodepint_mpi.bench.studies.report import make_report
        from nodepint_mpi.training.start import set_precision

        set_precision(read_config(studies.config))
        given = None if network is None else Network(*network)
        report = make_report(
            studies, str(study_file), rows, out, lambda curve: make_model(curve, given)
        )
        click.echo(f"\n{report['text']}\n\n{report['page']}: {len(report['figures'])} figures")
        write_json({"points": rows, "curves": report["curves"]}, json_file)
    if n_failed:
        raise SystemExit(1)


@click.command()
@click.argument("sweep_file", metavar="SWEEP", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Folder for trials, trials.jsonl and the page [runs/sweep/NAME].",
)  # fmt: skip
@click.option(
    "--trials", default="", metavar="N,...", callback=parse_ranks, help="Only these trials."
)
@dry_run_option
@click.option("--report", "only_report", is_flag=True, help="Only report on finished trials.")
@launcher_option
@click.option("--submit", is_flag=True, help="Submit the trials as one SLURM array.")
@click.option(
    "--at-once", type=click.IntRange(1), help="Trials of the array that may run at a time."
)
@timeout_option("trial")
@json_option
def sweep(
    sweep_file: Path,
    out: Path | None,
    trials: tuple[int, ...],
    dry_run: bool,
    only_report: bool,
    launcher: str | None,
    submit: bool,
    at_once: int | None,
    timeout_s: float,
    json_file: Path | None,
) -> None:
    """Train the trials of the file SWEEP and compare them.

    Starts its own jobs, one after the other: run it without mpirun, in one allocation
    (`--launcher`), or let it submit an array (`--submit`) and report later (`--report`). Finished
    trials are skipped, interrupted ones resumed. Exits with 1 if a trial failed; the others are
    still trained.
    """
    if in_job():
        raise ConfigError("`nodepint sweep` starts its own jobs: run it without mpirun.")
    if only_report and (submit or dry_run):
        raise ConfigError("`--report` cannot be combined with `--submit` or `--dry-run`.")
    from nodepint_mpi.bench.studies.launch import make_launch
    from nodepint_mpi.bench.studies.report import format_markdown
    from nodepint_mpi.bench.studies.rows import read_rows, write_rows
    from nodepint_mpi.bench.studies.sweep import (
        array_command,
        make_report,
        plan_trials,
        ranked,
        series_of,
        submit_array,
    )
    from nodepint_mpi.bench.studies.work import at_work, do_runs

    plan = read_sweep(sweep_file)
    out = Path("runs/sweep") / sweep_file.stem if out is None else out
    runs, series = plan_trials(plan, str(sweep_file), out, only=trials), series_of(plan)
    rows = read_rows(series, runs)  # says now what is damaged
    if dry_run:
        _say_states(runs, rows)
        if submit:
            click.echo(shlex.join(array_command(plan, runs, out, at_once)))
        return write_json({"trials": rows}, json_file)
    if submit:
        submit_array(plan, runs, out, at_once, click.echo)
        return write_json({"trials": rows}, json_file)
    n_failed = 0
    if not only_report:
        launch = make_launch(launcher, n_ranks=plan.ranks, n_cores=plan.cores, crowded=True)
        _end_with_children()
        if trials:  # others may do the others
            series = series._replace(lock=f".lock-{min(trials)}")
        with at_work(series, out, runs) as held:
            n_failed = do_runs(
                series, runs, launch, out, held=held, timeout_s=timeout_s, report=click.echo
            )
    rows = write_rows(series, out, runs)
    report = make_report(plan, str(sweep_file), rows, out)
    click.echo(f"\n{format_markdown(report['table'])}\n\n{report['page']}")
    best = ranked(plan, rows)[:MOST_COMPARED]
    if len(best) > 1:
        from nodepint_mpi.report.compare import compare_runs

        compared = compare_runs([Path(row["run"]) for row in best], out / "compare.html")
        click.echo(f"{compared['page']}: the best {len(best)} beside each other")
    write_json({"trials": rows, "best": report["best"]}, json_file)
    if n_failed:
        raise SystemExit(1)


def _check_page(context: Any, option: Any, page: Path | None) -> Path | None:
    """Refuse, before the work is done, a page that the table could not be put into."""
    from nodepint_mpi.bench.studies.table import read_page

    if page is not None:
        check_file(context, option, page)
        read_page(page)
    return page


@click.command()
@click.option(
    "--list", "list_file", default=LIST, show_default=True, type=click.Path(path_type=Path),
    help="The list of problems.",
)  # fmt: skip
@click.option("--only", multiple=True, metavar="NAME", help="Only this problem; may be repeated.")
@click.option(
    "--ranks", default="", metavar="N,...", callback=parse_ranks,
    help="Numbers of ranks, instead of those in the list.",
)  # fmt: skip
@click.option(
    "--out", default="runs/table", show_default=True, type=click.Path(path_type=Path),
    help="Folder for the runs, NAME/METHOD, and table.jsonl.",
)  # fmt: skip
@dry_run_option
@click.option(
    "--write", "page", metavar="PAGE.md", type=click.Path(path_type=Path), callback=_check_page,
    help="Insert the table between the marks of this page instead of printing it.",
)  # fmt: skip
@launcher_option
@timeout_option("training")
@json_option
def table(
    list_file: Path,
    only: tuple[str, ...],
    ranks: tuple[int, ...],
    out: Path,
    dry_run: bool,
    page: Path | None,
    launcher: str | None,
    timeout_s: float,
    json_file: Path | None,
) -> None:
    """Train all problems of a list to completion and make a table of times and scores.

    Each problem is trained with plain diffrax and with nodepint_mpi. Starts its own jobs: run it
    without mpirun, on an otherwise idle machine. Finished runs are skipped, interrupted ones are
    resumed, and a problem whose config has changed is trained again. Exits with 1 if a run failed;
    the others are still run.
    """
    from nodepint_mpi.bench.studies.launch import make_launch
    from nodepint_mpi.bench.studies.rows import read_rows, write_rows
    from nodepint_mpi.bench.studies.table import TABLE, format_table, plan_cells, write_page
    from nodepint_mpi.bench.studies.work import at_work, do_runs

    if in_job():
        raise ConfigError("`nodepint bench table` starts its own jobs: run it without mpirun.")
    cells = plan_cells(read_table_list(list_file), out, only=only, ranks=ranks)
    chosen = [cell for cell in cells if cell.chosen]
    launch = make_launch(
        launcher, n_ranks=max(c.n_ranks for c in chosen), n_cores=max(c.n_cores for c in chosen)
    )
    rows = read_rows(TABLE, cells)  # says now what is damaged
    if dry_run:
        _say_states(cells, rows)
        return write_json(rows, json_file)
    _end_with_children()
    with at_work(TABLE, out, cells) as held:
        n_failed = do_runs(
            TABLE, cells, launch, out, held=held, timeout_s=timeout_s, report=click.echo
        )
        rows = write_rows(TABLE, out, cells)
    if page is None:
        click.echo("\n" + format_table(rows, Path.cwd()))
    else:
        write_page(page, format_table(rows, page.absolute().parent))
        click.echo(f"{page} has the table")
    write_json(rows, json_file)
    if n_failed:
        raise SystemExit(1)


def _say_states(runs: Any, rows: Any) -> None:
    """What is there of each run, and whether it is to be done."""
    from nodepint_mpi.bench.studies.runs import NOTHING_TO_DO

    for run, row in zip(runs, rows, strict=True):
        to_do = run.chosen and row["state"] not in NOTHING_TO_DO
        reason = f" ({row['reason']})" if row["reason"] else ""
        click.echo(f"{run.label}: {row['state']}{reason}{', to be done' if to_do else ''}")


def _end_with_children() -> None:
    """When this is ended, a child must not be left behind."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
