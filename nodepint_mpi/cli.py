"""The command line. Numerics are imported inside the commands, so that `--help` stays quick."""

import importlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nodepint_mpi import __version__
from nodepint_mpi.config import Config, read_config
from nodepint_mpi.errors import ConfigError, NodepintError, OutputError
from nodepint_mpi.parallel.guard import run_guarded, together
from nodepint_mpi.parallel.signals import StopFlag
from nodepint_mpi.run.doctor import in_job


def _check_json_file(context: Any, option: Any, json_file: Path | None) -> Path | None:
    """Refuse, before the work is done, a file that its result could not be written to."""
    if json_file is not None:
        folder = json_file.absolute().parent
        target = json_file if json_file.exists() else folder
        if not folder.is_dir():
            raise OutputError(f"Cannot write {json_file}: there is no folder {folder}.")
        if json_file.is_dir() or not os.access(target, os.W_OK):
            raise OutputError(f"Cannot write {json_file}: it is a folder, or write-protected.")
    return json_file


_json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    callback=_check_json_file,
    help="Write the result as JSON.",
)
_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config."
)
_config_argument = click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nodepint")
@click.option("--log-level", default="INFO", show_default=True, help="DEBUG, INFO, WARNING ...")
def cli(log_level: str) -> None:
    """Train Neural ODEs parallel in time. Start under mpirun or srun for more than one rank."""
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise ConfigError(f"`--log-level {log_level}` is none of DEBUG, INFO, WARNING, ERROR.")
    logger = logging.getLogger("nodepint_mpi")
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers[:] = [logging.StreamHandler(sys.stderr)]
    logger.handlers[0].setFormatter(logging.Formatter("%(message)s"))


@cli.command()
@_config_argument
@_set_option
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [runs/NAME].")
@click.option("--resume", metavar="auto|PATH", help="Go on from the newest or a named checkpoint.")
@_json_option
def train(
    config_file: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: str | None,
    json_file: Path | None,
) -> None:
    """Train the experiment of CONFIG."""
    flag = StopFlag().install()
    comms = _start_ranks()
    config = _share_config(comms.control, lambda: read_config(config_file, overrides))
    _set_precision(config)
    folder = out if out is not None else Path(config.output.dir) / config.run.name
    from nodepint_mpi.run.train import train as run

    _finish(comms.control, run(config, folder, comms, flag, resume=resume), json_file)
    flag.ignore()


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@_json_option
def evaluate(run_dir: Path, json_file: Path | None) -> None:
    """Score the newest checkpoint of RUN_DIR on the test split."""
    comms = _start_ranks()
    from nodepint_mpi.run.directory import read_run

    _set_precision(_share_config(comms.control, lambda: read_run(run_dir)))
    from nodepint_mpi.run.evaluate import evaluate_run

    scores = evaluate_run(run_dir, comms)
    _say(comms.control, "\n".join(f"{name}: {value:.6g}" for name, value in scores.items()))
    _finish(comms.control, scores, json_file)


@cli.command()
@_config_argument
@_set_option
@click.option("--error", is_flag=True, help="Also solve serially and print the true error.")
@_json_option
def solve(
    config_file: Path, overrides: tuple[str, ...], error: bool, json_file: Path | None
) -> None:
    """Solve the initial-value problem of CONFIG, without training."""
    comms = _start_ranks()
    config = _share_config(comms.control, lambda: read_config(config_file, overrides))
    _set_precision(config)
    from nodepint_mpi.run.solve import format_solution, solve_problem

    result = solve_problem(config, comms, with_error=error)
    _say(comms.control, format_solution(result))
    _finish(comms.control, result, json_file)


@cli.command()
@_config_argument
@_set_option
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1))
@_json_option
def info(config_file: Path, overrides: tuple[str, ...], ranks: int, json_file: Path | None) -> None:
    """Print the plan of CONFIG without running it: slices, messages, memory, checkpoints."""
    config = read_config(config_file, overrides)
    _set_precision(config)
    from nodepint_mpi.run.info import format_plan, make_plan

    plan = make_plan(config, ranks)
    click.echo(format_plan(plan))
    _write_json(plan, json_file)


@cli.command()
@_json_option
def doctor(json_file: Path | None) -> None:
    """Check MPI, HDF5, mpi4jax, JAX and cores; say what is wrong and how to mend it."""
    from nodepint_mpi.run.doctor import format_checks, run_doctor

    checks, healthy = run_doctor()
    if _is_first_rank():
        click.echo(format_checks(checks))
        _write_json([vars(check) for check in checks], json_file)
    if not healthy:
        raise SystemExit(1)


@cli.group()
def data() -> None:
    """Prepare datasets."""


@data.command()
@click.argument("name")
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="Option of the recipe.")
@click.option("--force", is_flag=True, help="Make it again, replacing what is there.")
@_json_option
def prepare(name: str, options: tuple[str, ...], force: bool, json_file: Path | None) -> None:
    """Prepare the dataset NAME, or that of a recipe file of your own."""
    from nodepint_mpi.io.prepare import prepare_dataset

    pairs = [option.partition("=") for option in options]
    wrong = [option for option in options if "=" not in option]
    if wrong:
        raise ConfigError(f"`--set {wrong[0]}` is not of the form KEY=VALUE.")
    folder = prepare_dataset(name, options={key: value for key, _, value in pairs}, force=force)
    click.echo(f"{name} is in {folder}")
    _write_json(json.loads((folder / "provenance.json").read_text()), json_file)


@cli.group()
def bench() -> None:
    """Measure, and compare with published or serial numbers."""


@bench.command()
@click.argument("names", nargs=-1)
@_json_option
def published(names: tuple[str, ...], json_file: Path | None) -> None:
    """Count the sweeps of published parareal runs (all, or those named)."""
    comms = _start_ranks()
    _set_float64()
    from nodepint_mpi.run.bench_published import format_published, run_published

    result = run_published(comms, names, report=lambda line: _say(comms.control, line))
    _say(comms.control, format_published(result))
    _finish(comms.control, result, json_file)
    if not all(row["sweeps"] == row["published"] for row in result):
        raise SystemExit(1)


@bench.command()
@_json_option
def gradients(json_file: Path | None) -> None:
    """Compare the training gradient with `jax.grad` of serial diffrax."""
    comms = _start_ranks()
    _set_float64()
    from nodepint_mpi.run.bench_gradients import format_gradients, run_gradients

    result = run_gradients(comms)
    _say(comms.control, format_gradients(result))
    _finish(comms.control, result, json_file)


@bench.command()
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(3))
@_json_option
def overhead(repeats: int, json_file: Path | None) -> None:
    """Time a step of one slice on one rank against plain diffrax and optax."""
    comms = _start_ranks()
    from nodepint_mpi.run.bench_overhead import format_overhead, run_overhead

    result = run_overhead(comms, repeats)
    _say(comms.control, format_overhead(result))
    _finish(comms.control, result, json_file)


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


def _start_ranks() -> Any:
    """Start MPI and make the run's communicators; ranks other than 0 only speak to warn."""
    from nodepint_mpi.parallel.comms import make_comms, world

    comms = make_comms(world())
    rank = comms.control.rank
    if rank > 0:
        logger = logging.getLogger("nodepint_mpi")
        logger.setLevel(max(logger.level, logging.WARNING))
        logger.handlers[0].setFormatter(logging.Formatter(f"r{rank:03d} %(message)s"))
    return comms


def _share_config(control: Any, read: Callable[[], Config]) -> Config:
    """Rank 0 reads the config; all ranks get the same bytes. Collective over `control`."""
    config = failure = None
    if control.rank == 0:
        try:
            config = read()
        except NodepintError as error:
            failure = error
    config, failure = control.bcast((config, failure))
    if failure is not None:
        raise failure
    return config


def _set_precision(config: Config) -> None:
    if config.run.precision == "float64":
        _set_float64()


def _set_float64() -> None:
    import jax

    jax.config.update("jax_enable_x64", True)


def _say(control: Any, text: str) -> None:
    if control.rank == 0:
        click.echo(text)


def _finish(control: Any, result: Any, json_file: Path | None) -> None:
    """Rank 0 writes the result; a failure to do so is everybody's. Collective over `control`."""
    with together(control):
        if control.rank == 0:
            _write_json(result, json_file)


def _write_json(result: Any, json_file: Path | None) -> None:
    if json_file is None:
        return
    try:
        text = json.dumps(_without_infinity(result), indent=1, allow_nan=False)
        json_file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"Cannot write {json_file}: {error.strerror}.") from error


def _without_infinity(result: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not know."""
    match result:
        case dict():
            return {key: _without_infinity(value) for key, value in result.items()}
        case list() | tuple():
            return [_without_infinity(value) for value in result]
        case float() if not math.isfinite(result):
            return None
    return result


def _is_first_rank() -> bool:
    """Whether this is rank 0, without starting MPI where nothing else has."""
    if "mpi4py.MPI" not in sys.modules:
        return True
    from nodepint_mpi.parallel.comms import world

    return world().rank == 0
