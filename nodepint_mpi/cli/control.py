"""`nodepint control`: optimal control of a field that is known, learned, or to be learned."""

from pathlib import Path

import click

from nodepint_mpi.cli.common import (
    config_argument,
    finish,
    json_option,
    say,
    set_option,
    start_run,
    trust_option,
)
from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.ranks.signals import StopFlag


@click.command()
@config_argument
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [runs/NAME].")
@click.option("--resume", metavar="auto|PATH", help="Resume from the newest or a named checkpoint.")
@trust_option
@json_option
def control(
    config_file: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: str | None,
    trust: bool,
    json_file: Path | None,
) -> None:
    """Steer the field of CONFIG, so that a cost of its trajectory becomes small.

    The sections `[problem]` and `[control]` say which field, which control and which cost.
    """
    flag = StopFlag().install()
    comms, config = start_run(lambda: read_config(config_file, overrides))
    folder = out if out is not None else Path(config.output.dir) / config.run.name
    from nodepint_mpi.optimal_control.run import steer_run

    result = steer_run(config, folder, comms, flag, resume=resume, trust=trust)
    flag.ignore()
    say(comms.control, f"{result['status']}: cost {result['cost']:.9g}, {result['meaning']}")
    finish(comms.control, result, json_file)
