"""`nodepint bench sde | sampling | control`: kinds of problems, against closed forms."""

from pathlib import Path

import click

from nodepint_mpi.cli.common import (
    finish,
    json_option,
    numbers_option,
    parse_ranks,
    say,
    set_float64,
    start_ranks,
)


@click.command()
@click.argument("tables", nargs=-1, type=click.Choice(["strong", "weak", "sweeps", "time"]))
@click.option(
    "--paths", default=4000, show_default=True, type=click.IntRange(2),
    help="Paths of the strong errors; ten times as many for the weak ones.",
)  # fmt: skip
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(3))
@json_option
def sde(tables: tuple[str, ...], paths: int, repeats: int, json_file: Path | None) -> None:
    """Solve stochastic equations: TABLES of errors, orders, sweeps and time [all].

    Errors are along paths against a closed form, where there is one, with those of derivatives with
    respect to parameters. Sweeps are counted path by path; time is that of a serial solve against a
    loop written out by hand.
    """
    comms = start_ranks()
    set_float64()
    from nodepint_mpi.bench.sde import format_sde, run_sde

    result = run_sde(
        comms, tables, n_paths=paths, repeats=repeats,
        report=lambda line: say(comms.control, line),
    )  # fmt: skip
    say(comms.control, format_sde(result))
    finish(comms.control, result, json_file)


@click.command()
@numbers_option("--steps", "64,256,1024", "Numbers of steps from noise to data.")
@click.option("--n", "n_samples", default=64, show_default=True, type=click.IntRange(1))
@json_option
def sampling(steps: tuple[int, ...], n_samples: int, json_file: Path | None) -> None:
    """Sample diffusion models with an exact score by all methods, against the serial sampler.

    Eight Gaussians on a circle, and ten in a subspace of a larger space, by the probability-flow
    equation and by the stochastic one. Sweeps and evaluations of the field are the same on any
    number of ranks.
    """
    comms = start_ranks()
    set_float64()
    from nodepint_mpi.bench.sampling import format_sampling, run_sampling

    result = run_sampling(
        comms, steps, n_samples=n_samples, report=lambda line: say(comms.control, line)
    )
    say(comms.control, format_sampling(result))
    finish(comms.control, result, json_file)


@click.command()
@click.argument(
    "tables", nargs=-1,
    type=click.Choice(["gradients", "costs", "paraopt", "laplace", "learning", "time"]),
)  # fmt: skip
@click.option(
    "--plan", default="", metavar="RANKS", callback=parse_ranks,
    help="With `time`: forecast these numbers of ranks, such as 2,8,32.",
)  # fmt: skip
@json_option
def control(tables: tuple[str, ...], plan: tuple[int, ...], json_file: Path | None) -> None:
    """Find optimal controls, and compare with known costs and published sweeps.

    TABLES: gradients by DP and by DAL; costs found with nodes and with networks; sweeps of ParaOpt;
    Laplace's equation, controlled at a boundary; and a field that is learned and steered by all
    combinations of DP and DAL. All of these unless named. The table `time`, of seconds to 1 % of
    the least cost on 2,048 steps, is made only if named: it starts jobs of its own.
    """
    comms = start_ranks()
    set_float64()
    from nodepint_mpi.bench.control import format_control, run_control

    result = run_control(comms, tables, plan=plan, report=lambda line: say(comms.control, line))
    say(comms.control, format_control(result))
    finish(comms.control, result, json_file)
