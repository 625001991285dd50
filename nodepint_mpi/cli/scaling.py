"""`nodepint scaling`."""

import signal
from pathlib import Path
from typing import Any

import click

from nodepint_mpi.cli.common import (
    json_option,
    parse_network,
    parse_ranks,
    write_json,
)
from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.config.scaling import read_scaling
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.ranks.launcher import in_job


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
@click.option("--dry-run", is_flag=True, help="Show what exists and what would be run.")
@click.option("--report", "only_report", is_flag=True, help="Only report on finished points.")
@click.option(
    "--launcher", metavar="WORDS",
    help="Launcher, such as 'srun -n {ranks} -c {cores}' [mpirun, one core per rank].",
)  # fmt: skip
@click.option("--submit", is_flag=True, help="Submit a SLURM job for each number of ranks.")
@click.option(
    "--template", default="jobs/scaling.sbatch", show_default=True,
    type=click.Path(path_type=Path), help="Template of these jobs.",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", default=1800.0, show_default=True, type=click.FloatRange(1),
    help="Time limit of one point, in seconds.",
)  # fmt: skip
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
    from nodepint_mpi.bench.studies.scaling.points import plan_points
    from nodepint_mpi.bench.studies.scaling.rows import read_rows, write_rows

    studies = read_scaling(study_file)
    out = Path("runs/scaling") / study_file.stem if out is None else out
    points = plan_points(studies, str(study_file), out, only=only, only_ranks=only_ranks)
    rows = read_rows(points)  # says now what is damaged
    if submit:
        from nodepint_mpi.bench.studies.scaling.submit import submit_jobs, write_jobs

        options = [word for name in only for word in ("--only", name)]
        options += ["--timeout", f"{timeout_s:g}"]
        files = write_jobs(points, study_file, out, template, options)
        if dry_run:
            click.echo("\n".join(map(str, files.values())))
        else:
            submit_jobs(files, click.echo)
        return write_json({"points": rows}, json_file)
    if dry_run:
        for point, row in zip(points, rows, strict=True):
            to_do = point.chosen and row["state"] != "finished"
            reason = f" ({row['reason']})" if row["reason"] else ""
            click.echo(f"{point.label}: {row['state']}{reason}{', to be done' if to_do else ''}")
        return write_json({"points": rows}, json_file)
    n_failed = 0
    if not only_report:
        n_failed = _run(points, launcher, out, timeout_s)
    rows = write_rows(out, points)
    if only_ranks and not only_report:
        write_json({"points": rows}, json_file)
    else:
        import mpi4py

        mpi4py.rc.initialize = False  # nothing here is sent, and a batch shell is no rank
        from nodepint_mpi.bench.planning.network import Network
        from nodepint_mpi.bench.studies.scaling.model import make_model
        from nodepint_mpi.bench.studies.scaling.report import make_report
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


def _run(points: Any, launcher: str | None, out: Path, timeout_s: float) -> int:
    """Do what is to be done; how many points failed."""
    from nodepint_mpi.bench.studies.scaling.work import do_points
    from nodepint_mpi.bench.studies.series.launch import make_launch

    chosen = [point for point in points if point.chosen]
    launch = make_launch(
        launcher, n_ranks=max(p.n_ranks for p in chosen), n_cores=chosen[0].n_cores, crowded=True
    )
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a child must not be left behind
        signal.signal(number, signal.default_int_handler)
    return do_points(points, launch, out, timeout_s=timeout_s, report=click.echo)
