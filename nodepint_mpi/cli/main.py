"""The command line. Numerics are imported inside the commands, so that `--help` stays quick."""

import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Literal

import click

from nodepint_mpi import __version__
from nodepint_mpi.cli.bench import bench
from nodepint_mpi.cli.common import (
    checkpoint_option,
    config_argument,
    finish,
    json_option,
    say,
    set_option,
    start_run,
    trust_option,
    write_json,
)
from nodepint_mpi.cli.config import config
from nodepint_mpi.cli.control import control
from nodepint_mpi.cli.plan import plan, train_as_advised
from nodepint_mpi.cli.report import compare, report
from nodepint_mpi.cli.sample import sample
from nodepint_mpi.cli.studies import scaling, sweep
from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.config.plain import plain_config
from nodepint_mpi.errors import ConfigError, NodepintError
from nodepint_mpi.ranks.guard import run_guarded
from nodepint_mpi.ranks.launcher import in_job
from nodepint_mpi.ranks.signals import StopFlag


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nodepint")
@click.option("--log-level", default="INFO", show_default=True, help="DEBUG, INFO, WARNING ...")
def cli(log_level: str) -> None:
    """Train Neural ODEs parallel in time. Start under mpirun or srun for more than one rank."""
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise ConfigError(
            f"Unknown `--log-level {log_level}`: expected DEBUG, INFO, WARNING or ERROR."
        )
    logger = logging.getLogger("nodepint_mpi")
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers[:] = [logging.StreamHandler(sys.stderr)]
    logger.handlers[0].setFormatter(logging.Formatter("%(message)s"))


@cli.command()
@config_argument
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [runs/NAME].")
@click.option("--resume", metavar="auto|PATH", help="Resume from the newest or a named checkpoint.")
@click.option(
    "--plain", is_flag=True,
    help="Train with one diffrax solve, jax.grad and optax on one rank, for comparison.",
)  # fmt: skip
@click.option(
    "--auto", is_flag=True,
    help="Without mpirun: start as `nodepint plan` recommends for the cores of this machine.",
)  # fmt: skip
@json_option
def train(
    config_file: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: str | None,
    plain: bool,
    auto: bool,
    json_file: Path | None,
) -> None:
    """Train the experiment of CONFIG."""
    if auto:
        if plain or resume is not None:
            raise ConfigError(
                "`--auto` chooses how to start a run: remove `--plain`, and resume an existing run "
                "with its own RUN_DIR/config.toml, on any number of ranks."
            )
        train_as_advised(config_file, overrides, out, json_file)
    flag = StopFlag().install()

    def read() -> Config:
        config = read_config(config_file, overrides)
        return plain_config(config) if plain else config

    comms, config = start_run(read, in_groups=True, on_basis=True)
    if plain and comms.control.size > 1:
        raise ConfigError("`--plain` is serial: start it without mpirun; it uses all cores.")
    folder = out if out is not None else Path(config.output.dir) / config.run.name
    from nodepint_mpi.training.train import train as run

    finish(comms.control, run(config, folder, comms, flag, resume=resume, plain=plain), json_file)
    flag.ignore()


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--split", default="test", show_default=True, type=click.Choice(["test", "train", "valid"]),
    help="Samples to evaluate on.",
)  # fmt: skip
@checkpoint_option
@trust_option
@json_option
def evaluate(
    run_dir: Path,
    split: Literal["test", "train", "valid"],
    checkpoint: str | None,
    trust: bool,
    json_file: Path | None,
) -> None:
    """Evaluate a checkpoint of RUN_DIR."""
    from nodepint_mpi.io.directory import read_run

    comms, _ = start_run(lambda: read_run(run_dir))
    from nodepint_mpi.training.evaluate import evaluate_run

    scores = evaluate_run(run_dir, comms, split=split, checkpoint=checkpoint, trust=trust)
    say(comms.control, "\n".join(f"{name}: {value:.6g}" for name, value in scores.items()))
    finish(comms.control, scores, json_file)


@cli.command()
@config_argument
@set_option
@click.option("--error", is_flag=True, help="Also solve serially and print the true error.")
@click.option(
    "--forecast/--no-forecast",
    default=True,
    help="First forecast error growth and sweeps (the default).",
)
@json_option
def solve(
    config_file: Path,
    overrides: tuple[str, ...],
    error: bool,
    forecast: bool,
    json_file: Path | None,
) -> None:
    """Solve the initial-value problem of CONFIG, without training."""
    comms, config = start_run(lambda: read_config(config_file, overrides), on_basis=True)
    from nodepint_mpi.training.initial_value import format_solution, solve_problem

    result = solve_problem(config, comms, with_error=error, with_forecast=forecast)
    say(comms.control, format_solution(result))
    finish(comms.control, result, json_file)


@cli.command()
@config_argument
@set_option
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1))
@json_option
def info(config_file: Path, overrides: tuple[str, ...], ranks: int, json_file: Path | None) -> None:
    """Print what CONFIG would use without running it: slices, messages, memory, checkpoints."""
    config = read_config(config_file, overrides)
    from nodepint_mpi.training.info import format_plan, make_plan
    from nodepint_mpi.training.start import set_precision

    set_precision(config)
    plan = make_plan(config, ranks)
    click.echo(format_plan(plan))
    write_json(plan, json_file)


@cli.command()
@click.option(
    "--mpi", is_flag=True, help="In a job: one table of all ranks, with differences marked."
)
@json_option
def doctor(mpi: bool, json_file: Path | None) -> None:
    """Check MPI, HDF5, mpi4jax, JAX and cores; report what is wrong and how to fix it.

    Under mpirun or srun the ranks of that job are checked as they are.
    """
    from nodepint_mpi.doctor.check import format_checks
    from nodepint_mpi.doctor.findings import diagnose, how_to_start
    from nodepint_mpi.doctor.table import format_table

    if mpi and not in_job():
        raise ConfigError(how_to_start())
    diagnosis = diagnose()
    if _is_first_rank():
        checks = [vars(check) for check in diagnosis.checks]
        if mpi and diagnosis.ranks:
            click.echo(format_table(diagnosis.ranks) + "\n")
        click.echo(format_checks(diagnosis.checks))
        ranks = [rank._asdict() for rank in diagnosis.ranks]
        write_json({"checks": checks, "ranks": ranks} if mpi else checks, json_file)
    if not diagnosis.healthy:
        raise SystemExit(1)


@cli.group()
def data() -> None:
    """Prepare datasets."""


@data.command()
@click.argument("name")
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="Option of the recipe.")
@click.option("--force", is_flag=True, help="Prepare again, replacing existing data.")
@json_option
def prepare(name: str, options: tuple[str, ...], force: bool, json_file: Path | None) -> None:
    """Prepare the dataset NAME, or that of a recipe file of your own."""
    from nodepint_mpi.data.prepare import prepare_dataset

    pairs = [option.partition("=") for option in options]
    wrong = [option for option in options if "=" not in option]
    if wrong:
        raise ConfigError(f"`--set {wrong[0]}` is not of the form KEY=VALUE.")
    folder = prepare_dataset(name, options={key: value for key, _, value in pairs}, force=force)
    click.echo(f"{name} is in {folder}")
    write_json(json.loads((folder / "provenance.json").read_text()), json_file)


@cli.group()
def rom() -> None:
    """Reduced models: export a trained run to one small file."""


@rom.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--rank", type=click.IntRange(1), help="Directions to keep.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Or keep enough for this share of the energy [0.999999].",
)
@checkpoint_option
@trust_option
@json_option
def export(
    run_dir: Path,
    out: Path,
    rank: int | None,
    energy: float | None,
    checkpoint: str | None,
    trust: bool,
    json_file: Path | None,
) -> None:
    """Export a reduced model of a checkpoint of RUN_DIR."""
    if rank is not None and energy is not None:
        raise ConfigError(
            "`--rank` and `--energy` both set the number of directions: give only one."
        )
    from nodepint_mpi.io.directory import read_run

    comms, _ = start_run(lambda: read_run(run_dir))
    from nodepint_mpi.rom.export import export_rom

    result = export_rom(
        run_dir, out, comms, rank=rank, energy=energy, checkpoint=checkpoint, trust=trust
    )
    say(
        comms.control,
        "{file}: {rank} of {state_size} directions, energy {energy:.9f}, {file_bytes} bytes".format(
            **result
        ),
    )
    finish(comms.control, result, json_file)


@rom.command("evaluate")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("run_dir", type=click.Path(path_type=Path))
@checkpoint_option
@trust_option
@json_option
def evaluate_reduced(
    file: Path, run_dir: Path, checkpoint: str | None, trust: bool, json_file: Path | None
) -> None:
    """Compare the reduced model in FILE with RUN_DIR on the test split: error, speed, size."""
    from nodepint_mpi.io.directory import read_run

    comms, _ = start_run(lambda: read_run(run_dir))
    from nodepint_mpi.rom.evaluate import evaluate_rom, format_comparison

    result = evaluate_rom(file, run_dir, comms, checkpoint=checkpoint, trust=trust)
    say(comms.control, format_comparison(result))
    finish(comms.control, result, json_file)


for command in (bench, config, control, plan, sample, scaling, sweep, report, compare):
    cli.add_command(command)


def main() -> None:
    """Run the command line; an error on any rank ends the whole job."""
    sys.exit(run_guarded(_run))


def _run() -> int:
    try:
        return cli(standalone_mode=False) or 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        usage = f"\n{context.get_usage()}" if context else ""
        _join_ranks()
        raise ConfigError(f"{error.format_message()}{usage}") from None
    except NodepintError:
        _join_ranks()
        raise


def _join_ranks() -> None:
    """Start MPI in a rank of a job, if nothing has: an error of all ranks is then printed once."""
    if in_job():
        importlib.import_module("mpi4py.MPI")


def _is_first_rank() -> bool:
    """Whether this is rank 0, without starting MPI where nothing else has."""
    if "mpi4py.MPI" not in sys.modules:
        return True
    from nodepint_mpi.parallel.comms import world

    return world().rank == 0
