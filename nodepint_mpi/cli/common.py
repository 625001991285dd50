"""What the commands of the command line share: options, the start of ranks, and the result."""

import json
import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import OutputError
from nodepint_mpi.ranks.agreement import together


def check_file(context: Any, option: Any, file: Path | None) -> Path | None:
    """Refuse, before the work is done, a file that its result could not be written to."""
    if file is not None:
        folder = file.absolute().parent
        target = file if file.exists() else folder
        if not folder.is_dir():
            raise OutputError(f"Cannot write {file}: there is no folder {folder}.")
        if file.is_dir() or not os.access(target, os.W_OK):
            raise OutputError(f"Cannot write {file}: it is a folder, or write-protected.")
    return file


def parse_ranks(context: Any, option: Any, text: str) -> tuple[int, ...]:
    """Numbers of ranks, separated by commas; none if none is what there is by default."""
    if not text and not option.default:
        return ()
    try:
        ranks = tuple(int(word) for word in text.split(","))
    except ValueError:
        ranks = ()
    if not ranks or min(ranks) < 1:
        raise click.BadParameter(f"expected comma-separated integers such as 1,2, got '{text}'")
    return ranks


def parse_network(context: Any, option: Any, text: str | None) -> tuple[float, float] | None:
    """Latency in seconds and bandwidth in bytes a second, separated by a comma."""
    if text is None:
        return None
    try:
        latency_s, bandwidth = map(float, text.split(","))
    except ValueError:
        latency_s = bandwidth = -1.0
    if not 0 <= latency_s < 1 or not bandwidth > 0:
        raise click.BadParameter(
            f"expected latency in seconds and bandwidth in bytes per second, such as 2e-6,1e10, "
            f"got '{text}'"
        )
    return latency_s, bandwidth


json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    callback=check_file,
    help="Write the result as JSON.",
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config."
)
trust_option = click.option(
    "--trust", is_flag=True, help="Import the code that the run's config names."
)
checkpoint_option = click.option(
    "--checkpoint", metavar="best|last|STEP|FILE",
    help="The checkpoint to take [the best one if the run keeps it apart, else the newest].",
)  # fmt: skip
config_argument = click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))


def start_ranks() -> Any:
    """Start MPI, give each rank its GPU or cores, make the communicators of a command."""
    from nodepint_mpi.parallel.comms import make_comms
    from nodepint_mpi.ranks.devices import settle

    ranks = _connect()
    settle(ranks)
    return make_comms(ranks)


def start_run(
    read: Callable[[], Config], *, in_groups: bool = False, on_basis: bool = False
) -> tuple[Any, Config]:
    """The same for a command with a config, which is shared and says what ranks may take.

    If `in_groups`, as many groups of ranks share the samples of a step as the config says; if
    `on_basis`, as many ranks the tangents.
    """
    from nodepint_mpi.parallel.comms import make_comms
    from nodepint_mpi.training.start import begin

    ranks = _connect()
    config = begin(ranks, read)
    n_groups = config.run.data_ranks if in_groups else 1
    n_basis = config.run.basis_ranks if on_basis else 1
    return make_comms(ranks, n_groups=n_groups, n_basis=n_basis), config


def _connect() -> Any:
    """Start MPI: all ranks, started with the same options. Those but 0 only speak to warn."""
    from nodepint_mpi.parallel.comms import world

    ranks = world()
    rank = ranks.Get_rank()
    if rank > 0:
        logger = logging.getLogger("nodepint_mpi")
        logger.setLevel(max(logger.level, logging.WARNING))
        logger.handlers[0].setFormatter(logging.Formatter(f"r{rank:03d} %(message)s"))
    _require_same_options(ranks)
    return ranks


def _require_same_options(control: Any) -> None:
    """Make sure that all ranks were started with the same options. Collective over `control`."""
    from nodepint_mpi.training.start import require_same_options

    context = click.get_current_context()
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = {names.get(name, name): repr(value) for name, value in context.params.items()}
    shown = {name: re.sub(r"PosixPath\((.*?)\)", r"\1", value) for name, value in given.items()}
    require_same_options(control, {"the command": repr(context.command_path)} | shown)


def set_float64() -> None:
    import jax

    jax.config.update("jax_enable_x64", True)


def say(control: Any, text: str) -> None:
    if control.rank == 0:
        click.echo(text)


def finish(control: Any, result: Any, json_file: Path | None) -> None:
    """Rank 0 writes the result; a failure to do so is everybody's. Collective over `control`."""
    with together(control):
        if control.rank == 0:
            write_json(result, json_file)


def write_json(result: Any, json_file: Path | None) -> None:
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


def numbers_option(name: str, default: str, told: str) -> Callable[[Any], Any]:
    """An option that takes integers, separated by commas."""
    return click.option(
        name, default=default, show_default=True, metavar="N,...", callback=parse_ranks, help=told
    )
