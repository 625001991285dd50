"""`nodepint bench ...`: the commands that measure."""

from pathlib import Path

import click

from nodepint_mpi.cli.basis import basis
from nodepint_mpi.cli.bench_problems import control, sampling, sde
from nodepint_mpi.cli.common import (
    check_file,
    config_argument,
    finish,
    json_option,
    numbers_option,
    parse_ranks,
    say,
    set_float64,
    set_option,
    start_ranks,
    write_json,
)
from nodepint_mpi.cli.random_basis import random_basis
from nodepint_mpi.cli.studies import table
from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.ranks.agreement import together


@click.group()
def bench() -> None:
    """Measure, and compare with published or serial numbers."""


@bench.command()
@click.argument("names", nargs=-1)
@click.option(
    "--method", default="parareal", show_default=True, type=click.Choice(["parareal", "tangent"]),
    help="parareal as published, or tangent with the same fine solves and stopping rule.",
)  # fmt: skip
@json_option
def published(names: tuple[str, ...], method: str, json_file: Path | None) -> None:
    """Count the sweeps of published parareal runs (all, or those named).

    Exits with 1 if parareal's counts differ from the published ones.
    """
    comms = start_ranks()
    set_float64()
    from nodepint_mpi.bench.accuracy import format_published, run_published

    result = run_published(
        comms, names, method=method, report=lambda line: say(comms.control, line)
    )
    say(comms.control, format_published(result))
    finish(comms.control, result, json_file)
    if method == "parareal" and not all(row["sweeps"] == row["published"] for row in result):
        raise SystemExit(1)


@bench.command()
@json_option
def gradients(json_file: Path | None) -> None:
    """Compare the training gradient with `jax.grad` of serial diffrax."""
    comms = start_ranks()
    set_float64()
    from nodepint_mpi.bench.accuracy import format_gradients, run_gradients

    result = run_gradients(comms)
    say(comms.control, format_gradients(result))
    finish(comms.control, result, json_file)


@bench.command()
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(3))
@json_option
def overhead(repeats: int, json_file: Path | None) -> None:
    """Time a step of one slice on one rank against plain diffrax and optax."""
    comms = start_ranks()
    from nodepint_mpi.bench.overhead import format_overhead, run_overhead

    result = run_overhead(comms, repeats)
    say(comms.control, format_overhead(result))
    finish(comms.control, result, json_file)


@bench.command()
@numbers_option("--slices", "1024", "Numbers of slices.")
@numbers_option("--basis-rank", "16", "Numbers of directions of the basis.")
@numbers_option("--samples", "32", "Numbers of samples.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(3))
@json_option
def coarse(
    slices: tuple[int, ...],
    basis_rank: tuple[int, ...],
    samples: tuple[int, ...],
    repeats: int,
    json_file: Path | None,
) -> None:
    """Time the coarse problem alone, for every value of `time.basis.recurrence`.

    Runs on the ranks it is started on, one core each, and compares with the fine solves of a sweep.
    """
    comms = start_ranks()
    from nodepint_mpi.bench.coarse import format_coarse, run_coarse

    result = run_coarse(comms, slices, basis_rank, samples, repeats)
    say(comms.control, format_coarse(result))
    finish(comms.control, result, json_file)


@bench.command()
@click.option("--megabytes", default=1000.0, show_default=True, type=click.FloatRange(0.01))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--dir", "folder", default=".", show_default=True, type=click.Path(path_type=Path),
    help="Folder for the temporary files.",
)  # fmt: skip
@json_option
def checkpoint(megabytes: float, repeats: int, folder: Path, json_file: Path | None) -> None:
    """Time writing and reading a checkpoint, compared with parallel h5py and numpy.save."""
    comms = start_ranks()
    from nodepint_mpi.bench.checkpoint import format_checkpoint, run_checkpoint

    result = run_checkpoint(
        comms.control, megabytes=megabytes, repeats=repeats, folder=folder.absolute()
    )
    say(comms.control, format_checkpoint(result))
    finish(comms.control, result, json_file)


@bench.command()
@click.option(
    "--parameters", "n_parameters", default=10_000_000, show_default=True,
    type=click.IntRange(4), help="Size of the network, about.",
)  # fmt: skip
@click.option("--repeats", default=9, show_default=True, type=click.IntRange(1))
@json_option
def update(n_parameters: int, repeats: int, json_file: Path | None) -> None:
    """Memory, messages and time of the optimizer's step, sharded and on the first rank."""
    comms = start_ranks()
    from nodepint_mpi.bench.update import format_update, run_update

    result = run_update(comms, n_parameters=n_parameters, repeats=repeats)
    say(comms.control, format_update(result))
    finish(comms.control, result, json_file)


@bench.command(name="train")
@config_argument
@set_option
@click.option(
    "--ranks", default="1,2", show_default=True, metavar="N,...", callback=parse_ranks,
    help="Numbers of ranks along time, one core each.",
)  # fmt: skip
@click.option(
    "--data-ranks", default="", metavar="N,...", callback=parse_ranks,
    help="Also numbers of ranks that share the samples instead of time.",
)  # fmt: skip
@click.option(
    "--basis-ranks", default="", metavar="N,...", callback=parse_ranks,
    help="Also numbers of ranks that share the tangents instead of time.",
)  # fmt: skip
@click.option("--steps", default=300, show_default=True, type=click.IntRange(10))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--quick", is_flag=True, help="40 steps, once: takes minutes, with less reliable numbers."
)
@click.option(
    "--timeout", "timeout_s", default=1200.0, show_default=True, type=click.FloatRange(1),
    help="Time limit of one training, in seconds.",
)  # fmt: skip
@click.option(
    "--out", metavar="FIGURE.png", type=click.Path(path_type=Path), callback=check_file,
    help="Draw a figure.",
)  # fmt: skip
@json_option
def compare_training(
    config_file: Path,
    overrides: tuple[str, ...],
    ranks: tuple[int, ...],
    data_ranks: tuple[int, ...],
    basis_ranks: tuple[int, ...],
    steps: int,
    repeats: int,
    quick: bool,
    timeout_s: float,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Train CONFIG by plain diffrax and optax and by nodepint_mpi, in turn, to the same loss.

    Starts its own jobs: run it without mpirun, on a machine that does nothing else. Plain diffrax
    has one core, then all; ours one core for each rank; torchdiffeq one core, where it is
    installed and knows how (a perceptron, RK4, trajectories). Every repeat has another seed.
    Prints a table in Markdown; "in messages" is the share of a step that ranks spend waiting and
    sending, on average, "coarse" the share of the coarse steps of all slices.
    """
    from nodepint_mpi.bench.train import format_bench_train, run_bench_train

    result = run_bench_train(
        read_config(config_file, overrides), ranks=ranks, data_ranks=data_ranks,
        basis_ranks=basis_ranks, n_steps=40 if quick else steps, repeats=1 if quick else repeats,
        timeout_s=timeout_s, report=click.echo,
    )  # fmt: skip
    click.echo(format_bench_train(result))
    if out is not None:
        from nodepint_mpi.pages.figures import plot_contest

        plot_contest(out, result)
    write_json(result, json_file)


@bench.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG...", type=Path)
@click.option(
    "--ranks", default="1,2", show_default=True, metavar="N,...", callback=parse_ranks,
    help="Numbers of ranks, one core each.",
)  # fmt: skip
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@json_option
def startup(
    configs: tuple[Path, ...], ranks: tuple[int, ...], repeats: int, json_file: Path | None
) -> None:
    """Time the first step of each CONFIG, with no compiled programs and with those of a run before.

    Starts its own jobs: run it without mpirun, on a machine that does nothing else.
    """
    from nodepint_mpi.bench.startup import format_bench_startup, run_bench_startup

    rows = run_bench_startup(
        [read_config(path, ()) for path in configs], ranks=ranks, repeats=repeats,
        timeout_s=600.0, report=click.echo,
    )  # fmt: skip
    click.echo("\n" + format_bench_startup(rows))
    write_json(rows, json_file)


@bench.command(name="methods")
@click.argument("problems", nargs=-1)
@click.option(
    "--method", "methods", multiple=True, metavar="NAME", help="Only this method; may be repeated."
)
@json_option
def compare_methods(
    problems: tuple[str, ...], methods: tuple[str, ...], json_file: Path | None
) -> None:
    """Check every method against the serial solution and gradient of PROBLEMS [all].

    Exits with 1 if an error exceeds 1e-8.
    """
    comms = start_ranks()
    set_float64()
    from nodepint_mpi.bench.accuracy import format_methods, run_methods

    result = run_methods(
        comms, problems, methods=methods, report=lambda line: say(comms.control, line)
    )
    say(comms.control, format_methods(result))
    finish(comms.control, result, json_file)
    if not all(row["ok"] for row in result):
        raise SystemExit(1)


@bench.command()
@json_option
def model(json_file: Path | None) -> None:
    """Compare the model of `nodepint plan` with published parareal times on 32 to 512 cores."""
    from nodepint_mpi.bench.planning.validation import format_validation, validate

    rows = validate()
    click.echo(format_validation(rows))
    write_json(rows, json_file)


@bench.command()
@json_option
def network(json_file: Path | None) -> None:
    """Measure latency and bandwidth between ranks, as used by `nodepint plan --network`.

    Start it on at least two ranks; put them on two nodes to measure the network.
    """
    comms = start_ranks()
    from nodepint_mpi.bench.planning.network import measure_network

    found = measure_network(comms)
    say(
        comms.control,
        f"a message takes {found.latency_s * 1e6:.3g} us and 1 s for "
        f"{found.bandwidth / 1e9:.3g} GB: "
        f"--network {found.latency_s:.2e},{found.bandwidth:.2e}",
    )
    finish(comms.control, found._asdict(), json_file)


@bench.command()
@click.argument("problem", default="burgers")
@click.option(
    "--tol", default=1e-6, show_default=True, type=click.FloatRange(0, min_open=True),
    help="Relative error at which a problem counts as solved.",
)  # fmt: skip
@click.option(
    "--method", "methods", multiple=True, metavar="NAME", help="Only this method; may be repeated."
)
@click.option(
    "--out", metavar="FIGURE.png", type=click.Path(path_type=Path), callback=check_file,
    help="Draw a figure.",
)  # fmt: skip
@json_option
def sweeps(
    problem: str, tol: float, methods: tuple[str, ...], out: Path | None, json_file: Path | None
) -> None:
    """Compare methods on PROBLEM: error against sweeps and work, forward and adjoint.

    Work is counted in fine-solve equivalents: field evaluations per slice over those of one fine
    solve of a slice. A sweep costs a fine solve of every unfinished slice, a pass for every
    direction propagated and one for every 8 of them, and its coarse passes, those from slice to
    slice for unfinished slices only; an implicit solver is counted by measured time. A serial solve
    has 1. The path is the same along the longest chain of passes with a rank for every slice; a
    serial solve has the number of slices.
    """
    comms = start_ranks()
    set_float64()
    from nodepint_mpi.bench.sweeps import format_sweeps, run_sweeps

    result = run_sweeps(
        comms, problem, tol, methods=methods, report=lambda line: say(comms.control, line)
    )
    say(comms.control, format_sweeps(result))
    if out is not None:
        from nodepint_mpi.pages.figures import plot_sweeps

        with together(comms.control):
            if comms.control.rank == 0:
                plot_sweeps(out, result)
    finish(comms.control, result, json_file)


for command in (basis, random_basis, table, sde, sampling, control):
    bench.add_command(command)
