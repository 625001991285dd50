"""`nodepint bench table`."""

import signal
from pathlib import Path
from typing import Any

import click

from nodepint_mpi.cli.common import check_file, json_option, parse_ranks, write_json
from nodepint_mpi.config.table import read_table_list
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.ranks.launcher import in_job

LIST = "configs/table/problems.toml"


def _check_page(context: Any, option: Any, page: Path | None) -> Path | None:
    """Refuse, before the work is done, a page that the table could not be put into."""
    from nodepint_mpi.bench.studies.table.page import read_page

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
@click.option("--dry-run", is_flag=True, help="Show what exists and what would be run.")
@click.option(
    "--write", "page", metavar="README.md", type=click.Path(path_type=Path), callback=_check_page,
    help="Insert the table between the marks of this page instead of printing it.",
)  # fmt: skip
@click.option(
    "--launcher", metavar="WORDS",
    help="Launcher, such as 'srun -n {ranks} -c {cores}' [mpirun, one core per rank].",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", default=1800.0, show_default=True, type=click.FloatRange(1),
    help="Time limit of one training, in seconds.",
)  # fmt: skip
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
    from nodepint_mpi.bench.studies.series.launch import make_launch, sole_use
    from nodepint_mpi.bench.studies.table.cells import plan_cells
    from nodepint_mpi.bench.studies.table.page import format_table, write_page
    from nodepint_mpi.bench.studies.table.rows import read_rows, write_rows
    from nodepint_mpi.bench.studies.table.work import do_cells

    if in_job():
        raise ConfigError("`nodepint bench table` starts its own jobs: run it without mpirun.")
    cells = plan_cells(read_table_list(list_file), out, only=only, ranks=ranks)
    chosen = [cell for cell in cells if cell.chosen]
    launch = make_launch(
        launcher, n_ranks=max(c.n_ranks for c in chosen), n_cores=max(c.n_cores for c in chosen)
    )
    rows = read_rows(cells)  # says now what is damaged
    if dry_run:
        done = ("finished", "left out")
        for cell, row in zip(cells, rows, strict=True):
            to_do = cell.chosen and row["state"] not in done
            reason = f" ({row['reason']})" if row["reason"] else ""
            click.echo(f"{cell.label}: {row['state']}{reason}{', to be done' if to_do else ''}")
        return write_json(rows, json_file)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a child must not be left behind
        signal.signal(number, signal.default_int_handler)
    with sole_use(out) as held:
        n_failed = do_cells(
            cells, launch, held=held, timeout_s=timeout_s, report=click.echo,
            after_each=lambda: write_rows(out, read_rows(cells)),
        )  # fmt: skip
        rows = read_rows(cells)
        write_rows(out, rows)
    if page is None:
        click.echo("\n" + format_table(rows, Path.cwd()))
    else:
        write_page(page, format_table(rows, page.absolute().parent))
        click.echo(f"{page} has the table")
    write_json(rows, json_file)
    if n_failed:
        raise SystemExit(1)
