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


def _check_file(context: Any, option: Any, file: Path | None) -> Path | None:
    """Refuse, before the work is done, a file that its result could not be written to."""
    if file is not None:
        folder = file.absolute().parent
        target = file if file.exists() else folder
        if not folder.is_dir():
            raise OutputError(f"Cannot write {file}: there is no folder {folder}.")
        if file.is_dir() or not os.access(target, os.W_OK):
            raise OutputError(f"Cannot write {file}: it is a folder, or write-protected.")
    return file


def _parse_ranks(context: Any, option: Any, text: str) -> tuple[int, ...]:
    """Numbers of ranks, separated by commas."""
    try:
        ranks = tuple(int(word) for word in text.split(","))
    except ValueError:
        ranks = ()
    if not ranks or min(ranks) < 1:
        raise click.BadParameter(f"'{text}' is no list of numbers such as 1,2")
    return ranks


_json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    callback=_check_file,
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
@click.option(
    "--forecast/--no-forecast",
    default=True,
    help="First say how errors grow and how many sweeps to expect (the default).",
)
@_json_option
def solve(
    config_file: Path,
    overrides: tuple[str, ...],
    error: bool,
    forecast: bool,
    json_file: Path | None,
) -> None:
    """Solve the initial-value problem of CONFIG, without training."""
    comms = _start_ranks()
    config = _share_config(comms.control, lambda: read_config(config_file, overrides))
    _set_precision(config)
    from nodepint_mpi.run.solve import format_solution, solve_problem

    result = solve_problem(config, comms, with_error=error, with_forecast=forecast)
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
def rom() -> None:
    """Reduced models: one small file out of a trained run."""


@rom.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--rank", type=click.IntRange(1), help="Directions to keep.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Or keep as many as hold this share of the trajectories [0.999999].",
)
@_json_option
def export(
    run_dir: Path, out: Path, rank: int | None, energy: float | None, json_file: Path | None
) -> None:
    """Write a reduced model of the newest checkpoint of RUN_DIR."""
    if rank is not None and energy is not None:
        raise ConfigError("`--rank` and `--energy` are two ways to say the same: give one.")
    comms = _start_ranks()
    from nodepint_mpi.run.directory import read_run

    _set_precision(_share_config(comms.control, lambda: read_run(run_dir)))
    from nodepint_mpi.run.rom_export import export_rom

    result = export_rom(run_dir, out, comms, rank=rank, energy=energy)
    _say(
        comms.control,
        "{file}: {rank} of {state_size} directions, energy {energy:.9f}, {file_bytes} bytes".format(
            **result
        ),
    )
    _finish(comms.control, result, json_file)


@rom.command("evaluate")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("run_dir", type=click.Path(path_type=Path))
@_json_option
def evaluate_reduced(file: Path, run_dir: Path, json_file: Path | None) -> None:
    """Compare the reduced model in FILE with RUN_DIR on the test split: error, speed, size."""
    comms = _start_ranks()
    from nodepint_mpi.run.directory import read_run

    _set_precision(_share_config(comms.control, lambda: read_run(run_dir)))
    from nodepint_mpi.run.rom_evaluate import evaluate_rom, format_comparison

    result = evaluate_rom(file, run_dir, comms)
    _say(comms.control, format_comparison(result))
    _finish(comms.control, result, json_file)


@cli.group()
def bench() -> None:
    """Measure, and compare with published or serial numbers."""


@bench.command()
@click.argument("names", nargs=-1)
@click.option(
    "--method", default="parareal", show_default=True, type=click.Choice(["parareal", "tangent"]),
    help="As published, or our own with the same fine solves and stopping rule.",
)  # fmt: skip
@_json_option
def published(names: tuple[str, ...], method: str, json_file: Path | None) -> None:
    """Count the sweeps of published parareal runs (all, or those named).

    Exits with 1 if parareal's counts are not the published ones.
    """
    comms = _start_ranks()
    _set_float64()
    from nodepint_mpi.run.bench_published import format_published, run_published

    result = run_published(
        comms, names, method=method, report=lambda line: _say(comms.control, line)
    )
    _say(comms.control, format_published(result))
    _finish(comms.control, result, json_file)
    if method == "parareal" and not all(row["sweeps"] == row["published"] for row in result):
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


@bench.command()
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(3))
@_json_option
def coarse(repeats: int, json_file: Path | None) -> None:
    """Time the coarse problem of 1024 slices on one rank against a sweep's fine solves."""
    comms = _start_ranks()
    from nodepint_mpi.run.bench_coarse import format_coarse, run_coarse

    result = run_coarse(comms, repeats)
    _say(comms.control, format_coarse(result))
    _finish(comms.control, result, json_file)


@bench.command(name="train")
@_config_argument
@_set_option
@click.option(
    "--ranks", default="1,2", show_default=True, metavar="N,...", callback=_parse_ranks,
    help="Numbers of ranks, a core each.",
)  # fmt: skip
@click.option("--steps", default=300, show_default=True, type=click.IntRange(10))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--timeout", "timeout_s", default=1200.0, show_default=True, type=click.FloatRange(1),
    help="Seconds that one training may take.",
)  # fmt: skip
@click.option(
    "--out", metavar="FIGURE.png", type=click.Path(path_type=Path), callback=_check_file,
    help="Draw a figure.",
)  # fmt: skip
@_json_option
def compare_training(
    config_file: Path,
    overrides: tuple[str, ...],
    ranks: tuple[int, ...],
    steps: int,
    repeats: int,
    timeout_s: float,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Train CONFIG by plain diffrax and optax and by us, in turn, to the same loss.

    Starts its own jobs: run it without mpirun, on a machine that does nothing else. Plain diffrax
    has one core, then all; ours one core for each rank. Prints a table in Markdown.
    """
    from nodepint_mpi.run.bench_train import format_bench_train, run_bench_train

    result = run_bench_train(
        read_config(config_file, overrides), ranks=ranks, n_steps=steps, repeats=repeats,
        timeout_s=timeout_s, report=click.echo,
    )  # fmt: skip
    click.echo(format_bench_train(result))
    if out is not None:
        from nodepint_mpi.run.figures import plot_contest

        plot_contest(out, result)
    _write_json(result, json_file)


@bench.command(name="methods")
@click.argument("problems", nargs=-1)
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Only this one (again).")
@_json_option
def compare_methods(
    problems: tuple[str, ...], methods: tuple[str, ...], json_file: Path | None
) -> None:
    """Bring every method to the serial solution and gradient of PROBLEMS (all, or those named).

    Exits with 1 if one is further than 1e-8 from either.
    """
    comms = _start_ranks()
    _set_float64()
    from nodepint_mpi.run.bench_methods import format_methods, run_methods

    result = run_methods(
        comms, problems, methods=methods, report=lambda line: _say(comms.control, line)
    )
    _say(comms.control, format_methods(result))
    _finish(comms.control, result, json_file)
    if not all(row["ok"] for row in result):
        raise SystemExit(1)


@bench.command()
@click.argument("problem", default="burgers")
@click.option(
    "--tol", default=1e-6, show_default=True, type=click.FloatRange(0, min_open=True),
    help="Relative error that counts as solved.",
)  # fmt: skip
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Only this one (again).")
@click.option(
    "--out", metavar="FIGURE.png", type=click.Path(path_type=Path), callback=_check_file,
    help="Draw a figure.",
)  # fmt: skip
@_json_option
def sweeps(
    problem: str, tol: float, methods: tuple[str, ...], out: Path | None, json_file: Path | None
) -> None:
    """Compare methods on PROBLEM: error against sweeps and work, forward and adjoint.

    Work is counted in fine-solve equivalents: field evaluations per slice over those of one fine
    solve of a slice. A sweep costs a fine solve of every unfinished slice, a pass for every
    direction pushed and one for every 8 of them, and its coarse passes; what an implicit solver
    does is counted by measured time. A serial solve has 1. The path is the same along the longest
    chain of passes with a rank for every slice; a serial solve has the number of slices.
    """
    comms = _start_ranks()
    _set_float64()
    from nodepint_mpi.run.bench_sweeps import format_sweeps, run_sweeps

    result = run_sweeps(
        comms, problem, tol, methods=methods, report=lambda line: _say(comms.control, line)
    )
    _say(comms.control, format_sweeps(result))
    if out is not None:
        from nodepint_mpi.run.figures import plot_sweeps

        with together(comms.control):
            if comms.control.rank == 0:
                plot_sweeps(out, result)
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
