"""`nodepint plan`, and what `nodepint train --auto` does with it."""

import os
import sys
from pathlib import Path

import click

from nodepint_mpi.cli.common import (
    config_argument,
    json_option,
    parse_network,
    parse_ranks,
    set_option,
    write_json,
)
from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.ranks.launcher import in_job


@click.command()
@config_argument
@set_option
@click.option(
    "--ranks", default="", metavar="N,...", callback=parse_ranks,
    help="Numbers of ranks to plan for [the number of cores of this machine].",
)  # fmt: skip
@click.option(
    "--basis-ranks", default="1", show_default=True, metavar="N,...", callback=parse_ranks,
    help="Numbers of ranks that may share the tangents of `time.method = \"tangent\"`.",
)  # fmt: skip
@click.option(
    "--network", metavar="SECONDS,BYTES", callback=parse_network,
    help="Latency in s and bandwidth in bytes/s of the target network [measured here].",
)  # fmt: skip
@click.option(
    "--seconds", "budget_s", default=60.0, show_default=True, type=click.FloatRange(0),
    help="Time budget for optional trials, in seconds.",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", default=300.0, show_default=True, type=click.FloatRange(1),
    help="Time limit of one trial, in seconds.",
)  # fmt: skip
@json_option
def plan(
    config_file: Path,
    overrides: tuple[str, ...],
    ranks: tuple[int, ...],
    basis_ranks: tuple[int, ...],
    network: tuple[float, float] | None,
    budget_s: float,
    timeout_s: float,
    json_file: Path | None,
) -> None:
    """Try CONFIG on this machine for a minute and recommend ranks and slices, or serial training.

    Starts its own jobs: run it without mpirun, on an otherwise idle machine. Plain diffrax and
    nodepint_mpi take a few steps each; their measured costs feed a model of other numbers of ranks,
    whose error on two ranks is measured and reported. `--network` plans for another machine.
    """
    config = read_config(config_file, overrides)
    _without_mpi(config)
    from nodepint_mpi.bench.planning.advice import advice_as_data, advise, format_advice
    from nodepint_mpi.bench.planning.network import Network

    advice = advise(
        config, ranks=ranks, basis_ranks=basis_ranks,
        network=None if network is None else Network(*network), budget_s=budget_s,
        timeout_s=timeout_s, report=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    click.echo(format_advice(advice))
    write_json(advice_as_data(advice), json_file)


def _without_mpi(config: Config) -> None:
    """Keep this process from starting MPI, which one that starts jobs must not; set precision."""
    import mpi4py

    mpi4py.rc.initialize = in_job()  # in a job there will be no more than a message
    from nodepint_mpi.training.start import set_precision

    set_precision(config)


def train_as_advised(
    config_file: Path, overrides: tuple[str, ...], out: Path | None, json_file: Path | None
) -> None:
    """Plan, then become the job that the plan advises; returns only by an error. Local."""
    config = read_config(config_file, overrides)
    _without_mpi(config)
    from nodepint_mpi.bench.planning.advice import advise, format_advice, settings_of
    from nodepint_mpi.ranks.child import child_env, find_mpirun

    advice = advise(config, report=lambda line: click.echo(line, err=True))
    click.echo(format_advice(advice))
    n_ranks, settings = settings_of(advice)
    words = [sys.executable, "-m", "nodepint_mpi", "train", str(config_file)]
    chosen = {setting.partition("=")[0] for setting in settings}
    kept = [word for word in overrides if word.partition("=")[0].strip() not in chosen]
    for setting in (*kept, *settings):
        words += ["--set", setting]
    words += [] if n_ranks else ["--plain"]
    words += [] if out is None else ["--out", str(out)]
    words += [] if json_file is None else ["--json", str(json_file)]
    environment = child_env()
    if n_ranks > 1:
        words = [find_mpirun(), "-n", str(n_ranks), *words]
        environment["OMPI_MCA_hwloc_base_binding_policy"] = "core"
    click.echo(" ".join(words), err=True)
    os.execve(words[0], words, environment)
