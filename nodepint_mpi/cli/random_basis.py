"""`nodepint bench random-basis`: learning along random directions of the parameters."""

from pathlib import Path
from typing import Any

import click

from nodepint_mpi.cli.common import (
    finish,
    json_option,
    say,
    set_option,
    start_ranks,
    start_run,
)
from nodepint_mpi.errors import ConfigError


@click.command(name="random-basis")
@click.argument("what", metavar="digits|mnist|CONFIG", default="digits")
@set_option
@click.option(
    "--dims", type=click.IntRange(1), help="Directions [digits 64, mnist 250, CONFIG 20]."
)
@click.option("--steps", type=click.IntRange(1), help="Steps [digits 1500, mnist 18750].")
@click.option(
    "--learning-rate", "rate", type=click.FloatRange(0, min_open=True),
    help="Of the unbiased projection on these directions [digits 0.2, mnist 0.03].",
)  # fmt: skip
@click.option(
    "--times", default=4, show_default=True, type=click.IntRange(1),
    help="How many ranks' directions the last way takes.",
)  # fmt: skip
@click.option(
    "--directions", "kind", default="hadamard", show_default=True,
    type=click.Choice(["hadamard", "signs", "normal"]),
)  # fmt: skip
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Runs of each.")
@json_option
def random_basis(
    what: str,
    overrides: tuple[str, ...],
    dims: int | None,
    steps: int | None,
    rate: float | None,
    times: int,
    kind: Any,
    seeds: int,
    json_file: Path | None,
) -> None:
    """Train with the gradient, and with its projection on fixed and on redrawn directions.

    A perceptron on the digits of scikit-learn or on MNIST, prepared by `nodepint data prepare`, or
    the network of CONFIG by its own optimizer. Under mpirun the ranks share the directions of
    images, or are dealt as CONFIG says. Prints a table in Markdown.
    """
    images = what in ("digits", "mnist")
    if images and overrides:
        raise ConfigError("`--set` changes a CONFIG; for images there are the other options.")
    if not images and (steps is not None or rate is not None or seeds > 1):
        raise ConfigError(
            "`--steps`, `--learning-rate` and `--seeds` are for images: with a CONFIG take "
            "`--set run.n_steps=...`, `--set optim.learning_rate=...`, `--set run.seed=...`."
        )
    if images:
        comms = start_ranks()
        from nodepint_mpi.bench.random_basis import compare_on_images, format_random_basis
        from nodepint_mpi.parallel.comms import make_comms, world

        grid = make_comms(world(), n_basis=comms.control.size)
        rows = compare_on_images(
            grid, what, dims=dims, steps=steps, rate=rate, times=times, kind=kind, seeds=seeds,
            report=lambda line: say(comms.control, line),
        )  # fmt: skip
    else:
        from nodepint_mpi.config.experiment import read_config

        comms, config = start_run(
            lambda: read_config(what, overrides), in_groups=True, on_basis=True
        )
        from nodepint_mpi.bench.random_basis import compare_on_config, format_random_basis

        rows = compare_on_config(
            comms, config, dims=dims or 20, times=times, kind=kind,
            report=lambda line: say(comms.control, line),
        )  # fmt: skip
    say(comms.control, format_random_basis(rows, comms.control.size))
    finish(comms.control, rows, json_file)
