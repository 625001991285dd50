"""Load a reduced model from its file. Imports no MPI."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from nodepint_mpi.config import Config, UserNetwork, parse_config
from nodepint_mpi.core.rom import Origin, ReducedModel, Stepper, make_stepper, reduce_model
from nodepint_mpi.errors import NodepintError, ReducedModelError
from nodepint_mpi.io.leaves import LeafSpec, describe_leaves, fill_leaves, list_differences
from nodepint_mpi.io.rom_file import PARTS, RomFile, read_rom
from nodepint_mpi.run.build_model import build_edges, build_integrator, build_model


def load_rom(path: str | os.PathLike[str]) -> ReducedModel:
    """Load what `nodepint rom export` wrote. Local; needs no MPI.

    In double precision if the run was and JAX's `jax_enable_x64` is on, else in single. A network
    of the user's own must be importable by the import path in the run's config.

    Raises:
        ReducedModelError: if the file is missing, damaged, no reduced model, or holds a model that
            cannot be built here.
    """
    path = Path(path)
    stored = read_rom(path)
    try:
        return _fill(_build(stored, source=str(path)), stored)
    except NodepintError as error:
        raise ReducedModelError(f"Cannot build the reduced model {path}: {error}") from error


def _build(stored: RomFile, source: str) -> ReducedModel:
    """The model of the config on a basis of zeros: its structure, with fresh weights."""
    config, meta = parse_config(stored.meta["config"], source=source), stored.meta
    shape = tuple(meta["input_shape"])
    try:
        size, step = meta["output_size"], meta["step"] - 1
        model = build_model(config, input_shape=shape, output_size=size, step=step)
    except NodepintError as error:
        if not isinstance(config.network, UserNetwork):
            raise
        raise ReducedModelError(
            f"{error} The network is the user's own: `{config.network.name}` must be importable "
            f"here, as seen from the working directory {Path.cwd()}."
        ) from error
    stepper, origin = stepper_of(config), origin_of(config, meta)
    basis, energies = jnp.zeros(stored.basis.shape), jnp.zeros(stored.energies.shape)
    return reduce_model(model, basis, energies, stepper=stepper, origin=origin)


def _fill(blank: ReducedModel, stored: RomFile) -> ReducedModel:
    """The stored arrays in their places, in their own precision."""
    parts = {name: getattr(blank, name) for name in PARTS}
    expected = describe_leaves(parts)
    found = {
        name: LeafSpec(leaf.shape, expected[name].dtype if name in expected else leaf.dtype)
        for name, leaf in stored.leaves.items()
    }
    differences = list_differences(found, expected)
    if differences:
        raise ReducedModelError(f"its config gives another model than is stored: {differences}.")
    arrays = {"basis": jnp.array(stored.basis), "energies": jnp.array(stored.energies)}
    return dataclasses.replace(blank, **fill_leaves(parts, stored.leaves), **arrays)


def stepper_of(config: Config) -> Stepper:
    """The fine steps of a run, over its whole horizon. Local."""
    integrator = build_integrator(config.time.fine, "time.fine")
    return make_stepper(integrator, build_edges(config.time))


def origin_of(config: Config, meta: Mapping[str, Any]) -> Origin:
    """What a reduced model was made from. Local."""
    return Origin(
        name=config.run.name,
        fingerprint=meta["fingerprint"],
        optimiser_step=meta["step"],
        horizon=(config.time.horizon[0], config.time.horizon[1]),
        times=tuple(meta["times"]),
        energy=meta["energy"],
        versions=tuple(meta["versions"].items()),
    )
