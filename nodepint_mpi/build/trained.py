"""Load the trained model of a run. Imports no MPI."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from nodepint_mpi.build.imports import require_trust
from nodepint_mpi.build.model import Given, build_model
from nodepint_mpi.build.objects import model_of_run, objects_given
from nodepint_mpi.build.optimizers import averaged_prefix
from nodepint_mpi.core.pieces import Deal
from nodepint_mpi.errors import CheckpointError
from nodepint_mpi.io.checkpoint_file import (
    DamagedError,
    Head,
    read_head,
    read_leaves,
    read_whole_rows,
)
from nodepint_mpi.io.checkpoint_folder import find_checkpoints
from nodepint_mpi.io.directory import Which, find_place, read_run
from nodepint_mpi.io.leaves import (
    LeafSpec,
    describe_leaves,
    fill_leaves,
    list_differences,
    list_nonfinite,
)
from nodepint_mpi.io.seal import FORMAT, Alone, find_damage, read_format
from nodepint_mpi.models.networks import EncodeProcessDecode

PARAMS = "params/"

_log = logging.getLogger(__name__)


def load_model(
    run_directory: str | os.PathLike[str],
    *,
    checkpoint: Which = None,
    averaged: bool = True,
    trust: bool = False,
    model: Any = None,
) -> EncodeProcessDecode:
    """The trained model of a run, an Equinox module to be solved by plain diffrax. Local; no MPI.

    `u(t0) = encoder(x)`, `du/dt = processor(t, u, args)` and predictions `decoder(u)`, each of one
    sample. In double precision if the run was and JAX's `jax_enable_x64` is on, else in single.

    Args:
        run_directory: Of a run with a good checkpoint.
        checkpoint: "best", "last", a step or the path of a file; unless given the best one if the
            run keeps it apart (`output.best`), else the newest good one.
        averaged: Take the moving average of the parameters where the run keeps one
            (`optim.average`); without, those that the last step left.
        trust: Import the code that the run's config names, once a checkpoint has shown that the
            config is the run's own; without, such a run is refused.
        model: The Equinox module, or the function that makes it, which the run was started with, if
            it was given as an object. Its weights do not matter.

    Raises:
        NodepintError: if the run or a checkpoint cannot be read, holds numbers that are not finite
            or another model, or the config names code that is not trusted.
    """
    folder = Path(run_directory)
    config = read_run(folder)
    require_trust(config, folder, trust=trust)
    path, head = _first_good(find_place(folder, config, checkpoint), config.fingerprint())
    shapes: dict[str, Any] = head.meta.get("model") or {}
    try:
        shape = tuple(int(n) for n in shapes["input_shape"])
        size, given = int(shapes["output_size"]), Given(shapes["n_inputs"], shapes["n_static"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not say what its model was made for: it was written by an older version "
            "of nodepint_mpi. Resume the run (`--resume auto --set run.n_steps=...`), which "
            "writes a new checkpoint."
        ) from error
    with objects_given({} if model is None else model_of_run(config, model)):
        fresh = build_model(
            config, input_shape=shape, output_size=size, given=given, step=head.step - 1
        )
    params, static = eqx.partition(fresh, eqx.is_inexact_array)
    expected = describe_leaves({"params": params})
    where = averaged_prefix(config.optim) if averaged else None
    leaves = _read_averages(path, head, where, expected) if where else _read_params(path, head)
    stored = {name: LeafSpec(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    differences = list_differences(_in_precision(stored, expected), expected)
    if differences:
        raise CheckpointError(f"{path} does not fit this model: {differences}")
    wrong = list_nonfinite(leaves)
    if wrong:
        raise CheckpointError(
            f"{path}: the parameters {wrong} hold NaN or infinity; name an older checkpoint"
        )
    leaves = {name: leaf.astype(expected[name].dtype) for name, leaf in leaves.items()}
    filled = fill_leaves({"params": params}, leaves)["params"]
    return eqx.combine(jax.tree.map(jax.numpy.asarray, filled), static)


def _read_params(path: Path, head: Head) -> dict[str, np.ndarray]:
    """The parameters by name, as they are stored."""
    return read_leaves(path, {n: s for n, s in head.replicated.items() if n.startswith(PARAMS)})


def _read_averages(
    path: Path, head: Head, where: str, expected: dict[str, LeafSpec]
) -> dict[str, np.ndarray]:
    """Their averages, which are stored in rows, whole: of the expected shapes where they fit."""
    specs = {n: s for n, s in head.rows.items() if n.startswith(where)}
    found = {}
    for name, rows in read_whole_rows(path, specs).items():
        name = PARAMS + name.removeprefix(where)
        shape = expected[name].shape if name in expected else rows.shape
        size = math.prod(shape)
        fits = rows.shape == (Deal(shape).n_rows, Deal(shape).width)
        found[name] = rows.reshape(-1)[:size].reshape(shape) if fits else rows
    return found


def _first_good(place: Path, fingerprint: str) -> tuple[Path, Head]:
    """A file, or the newest of a folder, that is whole; it must be of this experiment."""
    for path in [place] if place.is_file() else find_checkpoints(place):
        if read_format(path) != FORMAT:
            raise CheckpointError(
                f"{path} has format {read_format(path)}, this program reads format {FORMAT}"
            )
        damage = find_damage(Alone(), path)
        try:
            head = None if damage else read_head(path)
        except DamagedError as error:
            damage = str(error)
            head = None
        if head is None:
            _log.warning("%s is damaged and passed over: %s", path, damage)
            continue
        if head.fingerprint != fingerprint:
            raise CheckpointError(
                f"{path} belongs to another experiment (fingerprint {head.fingerprint}, expected "
                f"{fingerprint})"
            )
        return path, head
    raise CheckpointError(f"no good checkpoint in {place}")


def _in_precision(
    stored: dict[str, LeafSpec], expected: dict[str, LeafSpec]
) -> dict[str, LeafSpec]:
    """Numbers may differ in precision, not in kind."""
    found = {}
    for name, spec in stored.items():
        same = name in expected and spec.dtype.kind == expected[name].dtype.kind
        found[name] = LeafSpec(spec.shape, expected[name].dtype if same else spec.dtype)
    return found
