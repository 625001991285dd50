"""`nodepint report` and `nodepint compare`: pages to look at."""

from pathlib import Path

import click

from nodepint_mpi.cli.common import (
    checkpoint_option,
    json_option,
    start_ranks,
    start_run,
    trust_option,
    write_json,
)
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.ranks.launcher import in_job

page_option = click.option(
    "--out", "page", metavar="FILE.html", type=click.Path(path_type=Path),
    help="The page to write; its figures go to FILE_figures.",
)  # fmt: skip


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@page_option
@click.option(
    "--rom", "rom_file", metavar="FILE", type=click.Path(path_type=Path),
    help="A reduced model of this run, to compare with the full one.",
)  # fmt: skip
@click.option(
    "--model/--no-model", "with_model", default=True,
    help="Load a checkpoint and predict the test split (the default; needs the data).",
)  # fmt: skip
@checkpoint_option
@trust_option
@json_option
def report(
    run_dir: Path,
    page: Path | None,
    rom_file: Path | None,
    with_model: bool,
    checkpoint: str | None,
    trust: bool,
    json_file: Path | None,
) -> None:
    """Report on RUN_DIR in one HTML page, RUN_DIR/report.html, with figures also as PNG files.

    The page embeds all figures. The run may be unfinished.
    """
    from nodepint_mpi.io.directory import read_run

    if rom_file is not None and not with_model:
        raise ConfigError("`--rom` compares with the full model: remove `--no-model`.")
    if checkpoint is not None and not with_model:
        raise ConfigError("`--checkpoint` names the model to look at: remove `--no-model`.")
    if with_model:
        comms, _ = start_run(lambda: read_run(run_dir))
        _require_one(comms.control.size, "report")
    else:
        comms = None
        _require_alone("report")
    from nodepint_mpi.report.sections import make_report

    result = make_report(
        run_dir, comms, page=page, rom_file=rom_file, checkpoint=checkpoint, trust=trust
    )
    click.echo(f"{result['page']}: {len(result['figures'])} figures")
    write_json(result, json_file)


@click.command()
@click.argument(
    "run_dirs", metavar="RUN_DIR RUN_DIR ...", nargs=-1, type=click.Path(path_type=Path)
)
@page_option
@json_option
def compare(run_dirs: tuple[Path, ...], page: Path | None, json_file: Path | None) -> None:
    """Compare runs: config keys that differ, final numbers, times, ranks.

    Prints tables; `--out` writes a page with these and with the losses against steps and seconds.
    """
    _require_alone("compare")
    from nodepint_mpi.report.compare import compare_runs, format_comparison

    result = compare_runs(run_dirs, page)
    click.echo(format_comparison(result))
    write_json(result, json_file)


def _require_alone(command: str) -> None:
    """Refuse more than one rank, without starting MPI where there is no job."""
    if in_job():
        _require_one(start_ranks().control.size, command)


def _require_one(n_ranks: int, command: str) -> None:
    if n_ranks > 1:
        raise ConfigError(
            f"`nodepint {command}` got {n_ranks} ranks and needs one: start it without mpirun."
        )
