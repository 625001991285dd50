"""What a run is, in words: what its log begins and ends with."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from nodepint_mpi.build.imports import named_code
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.training.batch_model import split_model
from nodepint_mpi.training.memory import show_bytes
from nodepint_mpi.training.setup import Experiment, needed_memory


def describe_layout(config: Config, comms: Comms, folder: Path, *, plain: bool) -> str:
    """Method, ranks, slices and folder: what is known before anything is set up. Local."""
    section, line = config.time, comms.time
    if plain:
        how = "plain diffrax and optax in one process"
    else:
        n_ranks, n_along = comms.control.size, line.size
        grid = {"time": n_along, "samples": line.n_groups, "tangents": line.n_basis}
        shown = " x ".join(f"{n} along {what}" for what, n in grid.items() if n < n_ranks > 1 < n)
        owned = {len(owned_range(section.n_slices, n_along, rank)) for rank in range(n_along)}
        each = "-".join(map(str, sorted(owned)))
        how = (
            f"{section.method} on {_count(n_ranks, 'rank')}{f' ({shown})' if shown else ''}, "
            f"{_count(section.n_slices, 'slice')} of the horizon, {each} a rank"
        )
    return f"{config.run.name}: {how}\nfolder: {folder}"


def _describe_size(experiment: Experiment) -> str:
    """Parameters, precision and the memory they take on this rank. Local."""
    params, _ = split_model(experiment.model)
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    n_bytes, state = sum(needed_memory(experiment).values()), experiment.state
    return (
        f"{n_parameters:,} parameters, a state of {int(np.prod(state.shape[1:])):,} numbers, "
        f"{experiment.config.run.precision}; arrays take at least {show_bytes(n_bytes)} a rank"
    )


def describe_end(config: Config, folder: Path, scores: Mapping[str, float], seconds: float) -> str:
    """Scores on the test split, where everything is, and what to type next. Local."""
    trust = " --trust" if named_code(config) else ""
    lines = [
        *(f"test {name}: {value:.6g}" for name, value in scores.items()),
        f"finished in {seconds:.0f} s; everything is in {folder}",
        f"next: nodepint report {folder}{trust}",
    ]
    return "\n".join(lines)


def describe_start(experiment: Experiment) -> str:
    """Rows, batches, epochs and steps, how often the run is validated, and its size. Local."""
    train, config, n_steps = experiment.train, experiment.config, experiment.n_steps
    n_rows, size = train.n_rows, train.section.batch_size or train.n_rows
    batches = "all of them in every step"
    if size < n_rows:
        batches = (
            f"{_count(train.epoch_steps, 'batch', 'batches')} of {size} in an epoch, which leaves "
            f"out {_count(train.n_left_out, 'row')}"
        )
    epochs = f"{n_steps / train.epoch_steps:.4g} epochs"
    lines = [f"training on {_count(n_rows, 'row')}: {batches}; {_count(n_steps, 'step')}, {epochs}"]
    if experiment.valid is not None:
        every = config.run.validate_every or config.output.log_every
        where = "held out of the training split"
        if train.section.valid_split is not None:
            where = f"of the split {train.section.valid_split!r}"
        rows = _count(experiment.valid.n_rows, "row")
        lines.append(f"validating on {rows} {where}, every {_count(every, 'step')}")
    return "\n".join([*lines, _describe_size(experiment)])


def _count(number: int, one: str, many: str | None = None) -> str:
    """Such as "1 row" and "2 rows"."""
    return f"{number} {one}" if number == 1 else f"{number} {many or f'{one}s'}"
