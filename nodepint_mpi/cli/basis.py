"""`nodepint bench basis`: ranks that share the tangents of a slice."""

from pathlib import Path

import click

from nodepint_mpi.cli.common import (
    finish,
    json_option,
    parse_ranks,
    say,
    set_float64,
    start_ranks,
    write_json,
)


@click.command()
@click.option(
    "--basis-ranks", default="2,4,8", show_default=True, metavar="N,...", callback=parse_ranks,
    help="Numbers of ranks that share the tangents.",
)  # fmt: skip
@click.option(
    "--repeats", default=0, show_default=True, type=click.IntRange(0),
    help="Also time solves on one core and on one for each of these ranks: number of repeats.",
)  # fmt: skip
@click.option(
    "--grids", default="", metavar="TxDxB,...",
    help="Under mpirun: solve and descend on these grids of ranks, and compare with one rank.",
)  # fmt: skip
@json_option
def basis(basis_ranks: tuple[int, ...], repeats: int, grids: str, json_file: Path | None) -> None:
    """Count, or time, sweeps whose tangents several ranks share.

    Counts are of the operations that the ranks would do, by recording them. With `--repeats` it
    starts its own jobs: run it without mpirun, on an otherwise idle machine. With `--grids` it
    exits with 1 if the numbers of a grid are not those of one rank.
    """
    if grids:
        comms = start_ranks()
        set_float64()
        from nodepint_mpi.bench.basis import compare_grids

        found = compare_grids(grids.split(","), lambda line: say(comms.control, line))
        finish(comms.control, found, json_file)
        if not all(row["same"] for row in found):
            raise SystemExit(1)
        return
    import mpi4py

    mpi4py.rc.initialize = False  # this process sends no messages, and may start jobs
    set_float64()
    from nodepint_mpi.bench.basis import count_sweeps, format_basis, time_sweeps

    counted = count_sweeps(basis_ranks)
    timed = time_sweeps(basis_ranks, repeats) if repeats else []
    click.echo(format_basis(counted, timed))
    write_json({"counted": counted, "timed": timed}, json_file)
