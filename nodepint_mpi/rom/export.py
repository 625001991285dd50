"""From a trained run to the file of a reduced model."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nodepint_mpi.build.sections import JUMP_TOL
from nodepint_mpi.core.basis import rank_for_energy
from nodepint_mpi.core.batch import as_numbers
from nodepint_mpi.core.by_name import asked_for
from nodepint_mpi.core.stopping import JumpTolerance
from nodepint_mpi.data.samples import count_outputs
from nodepint_mpi.errors import ConfigError, NonFiniteError
from nodepint_mpi.io.directory import Which, commit, config_text, versions
from nodepint_mpi.io.leaves import take_leaves
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.differentiate import solve_block
from nodepint_mpi.parallel.directions import leading_directions
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.rom.file import PARTS, RomFile
from nodepint_mpi.rom.load import origin_of, stepper_of
from nodepint_mpi.rom.model import reduce_model
from nodepint_mpi.rom.save import check_target, save_rom
from nodepint_mpi.training.batch_model import ENCODER_TAKES
from nodepint_mpi.training.evaluate import BATCH, open_run
from nodepint_mpi.training.setup import Experiment

ENERGY = 0.999999
FIRST_RANK = 32

_log = logging.getLogger(__name__)


class Snapshots(NamedTuple):
    """States on this rank's slices, with their numbers among those of all ranks."""

    states: np.ndarray
    numbers: np.ndarray


def export_rom(
    folder: Path,
    out: Path,
    comms: Comms,
    *,
    rank: int | None = None,
    energy: float | None = None,
    checkpoint: Which = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Build a reduced model of a checkpoint of a run and write it to one file.

    Collective over `comms`. The basis are the leading directions of all training trajectories:
    their states at slice boundaries and at observation times. They stay on the ranks they were
    computed on. Rank 0 writes.

    Args:
        folder: The run directory.
        out: The file; one that is there is replaced if it is a reduced model.
        comms: The run's communicators.
        rank: How many directions. Trajectories with fewer independent ones give fewer.
        energy: Or the share of the trajectories' sum of squares that they must hold.
        checkpoint: Which one, as of `open_run`.
        trust: Import the code that the run's config names.

    Raises:
        NodepintError: on all ranks, if the run or its data cannot be read, it has no good
            checkpoint, the rank is larger than the state, or the file cannot be written.
    """
    control = comms.control
    with together(control):
        if control.rank == 0:
            check_target(out)
    experiment, step, params, _ = open_run(folder, comms, checkpoint=checkpoint, trust=trust)
    _require_autonomous(experiment, params)
    size = math.prod(experiment.state.shape[1:])
    if rank is not None and rank > size:
        raise ConfigError(f"`--rank {rank}` is more than the state's {size} entries: lower it.")
    model = eqx.combine(params, experiment.train_problem.static)
    snapshots = _take_snapshots(comms, experiment, params)
    flat = snapshots.states.reshape(len(snapshots.states), size)
    squares = np.sum(np.square(flat, dtype=np.float64), axis=1)
    total = control.bcast(control.reduce(float(squares[np.isfinite(squares)].sum())))
    if not total > 0:
        raise NonFiniteError(f"No trajectory of {folder} is finite and not zero: no basis.")
    basis, energies = _leading(comms, snapshots, total, rank=rank, energy=energy, size=size)
    if rank is not None and len(basis) < rank and control.rank == 0:
        _log.warning(
            "the trajectories have only %d independent directions: rank %d instead of %d",
            len(basis), len(basis), rank,
        )  # fmt: skip
    meta = _describe(experiment, step, held=float(min(1.0, energies.sum() / total)))
    stepper, origin = stepper_of(experiment.config), origin_of(experiment.config, meta)
    rom = reduce_model(model, basis, energies, stepper=stepper, origin=origin)
    leaves = take_leaves({name: getattr(rom, name) for name in PARTS})
    n_bytes = 0
    with together(control):
        if control.rank == 0:
            arrays = np.asarray(basis), np.asarray(energies)
            n_bytes = save_rom(out, RomFile(*arrays, leaves, meta))
    return {
        "file": str(out),
        "file_bytes": control.bcast(n_bytes),
        "optimizer_step": step,
        "n_snapshots": control.allreduce(len(snapshots.states)),
        "state_size": size,
        "rank": len(basis),
        "energy": meta["energy"],
        "projected_field": rom.is_projected,
        "n_ranks": control.size,
    }


def _require_autonomous(experiment: Experiment, params: EncodeProcessDecode) -> None:
    """Refuse what a reduced model has no place for: noise, and all but a first observation."""
    section = experiment.train.section
    if section.inputs is not None or section.static is not None:
        raise ConfigError(
            "A reduced model takes no `data.inputs` and no `data.static`: its field is one of the "
            "state and of time alone."
        )
    if experiment.config.noise is not None:
        raise ConfigError("A reduced model is of an ordinary equation: it has no `[noise]`.")
    asks = asked_for(params.encoder, 1, ENCODER_TAKES)
    if {"times", "mask", "static"} & set(asks):
        raise ConfigError(
            f"A reduced model starts from one observation, but the encoder takes {asks}."
        )


def _take_snapshots(comms, experiment: Experiment, params: EncodeProcessDecode) -> Snapshots:
    """Initial states on the first rank, and all ranks' ends of slices and states between."""
    problem, train = experiment.train_problem, experiment.train
    # A training step may stop early, since it starts warm; here the states have to be right.
    stopping = JumpTolerance(JUMP_TOL[experiment.config.run.precision])
    solver = dataclasses.replace(problem.solver, stopping=stopping)
    owned, seen = problem.observations.owned, problem.observations
    inside = seen.slots < owned.ts.shape[1]  # the others are ends of slices

    @jax.jit
    def solve(params, inputs):
        encoder = eqx.combine(params, problem.static).encoder
        initial = jax.vmap(encoder)(as_numbers(inputs, experiment.state.dtype))
        result = solve_block(Line(problem.comm, owned, params.processor), solver, initial)
        first = initial[None] if problem.comm.rank == 0 else initial[None][:0]
        return jnp.concatenate([first, result.end, seen.read(result)[inside]])

    places = np.concatenate([
        np.zeros(int(problem.comm.rank == 0), int),
        1 + owned.indices,
        1 + owned.n_slices + seen.indices[inside],
    ])  # fmt: skip
    states, numbers = [], []
    for start in range(0, train.n_rows, BATCH):
        rows = np.arange(start, min(start + BATCH, train.n_rows))
        batch = np.asarray(solve(params, train.take(rows).initial))
        states.append(batch.reshape(-1, *batch.shape[2:]))
        numbers.append((places[:, None] * train.n_rows + rows).ravel())
    return Snapshots(np.concatenate(states), np.concatenate(numbers))


def _leading(comms, snapshots, total, *, rank, energy, size) -> tuple[Array, Array]:
    """The directions asked for, none of them zero, with their energies. Collective."""
    find = jax.jit(
        lambda states, numbers, n: leading_directions(
            comms.time, jax.random.key(0), states, numbers, n
        ),
        static_argnums=2,
    )
    n, dtype = min(FIRST_RANK, size) if rank is None else rank, snapshots.states.dtype
    states = snapshots.states.astype(np.float64)
    while True:
        with jax.enable_x64(True):  # single precision hides directions below 1e-3 of the first
            found = jax.tree.map(np.asarray, find(states, snapshots.numbers, n))
        keep = int(np.sum(found.energies > 0))
        if rank is None:  # what n directions do not hold comes last
            rest = max(0.0, total - found.energies.sum())
            with jax.enable_x64(True):
                energies = jnp.array([*found.energies, rest])
                wanted = int(rank_for_energy(energies, energy or ENERGY))
            if wanted > keep == n < size:
                n = min(2 * n, size)
                continue
            keep = min(keep, wanted)
        return jnp.asarray(found.vectors[:keep], dtype), jnp.asarray(found.energies[:keep], dtype)


def _describe(experiment: Experiment, step: int, held: float) -> dict[str, Any]:
    """All of the file that is not an array, for JSON."""
    config, train = experiment.config, experiment.train
    steps = config.time.fine.n_steps
    return {
        "config": config_text(config),
        "name": config.run.name,
        "fingerprint": config.fingerprint(),
        "step": step,
        "input_shape": train.input_shape,
        "output_size": count_outputs(train),
        "horizon": config.time.horizon,
        "times": train.times.tolist(),
        "integrator": config.time.fine.model_dump(mode="json", exclude_none=True),
        "n_steps": None if steps is None else steps * config.time.n_slices,
        "energy": held,
        "versions": versions(),
        "commit": commit(),
    }
