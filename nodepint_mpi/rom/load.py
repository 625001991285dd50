"""Load a reduced model from its file. Imports no MPI."""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from nodepint_mpi.build.imports import named_code
from nodepint_mpi.build.model import build_edges, build_integrator, build_model
from nodepint_mpi.config.experiment import Config, parse_config
from nodepint_mpi.config.network import DenseNetwork, UserNetwork
from nodepint_mpi.errors import NodepintError, ReducedModelError
from nodepint_mpi.io.leaves import LeafSpec, describe_leaves, fill_leaves, list_differences
from nodepint_mpi.rom.file import PARTS, RomFile, read_rom
from nodepint_mpi.rom.model import Origin, ReducedModel, Stepper, make_stepper, reduce_model

MOST_SLICES, MOST_STAGES = 10**6, 1000
"""What the config in a file may ask for: building more takes longer than a file is worth."""


def load_rom(
    path: str | os.PathLike[str],
    *,
    network: Callable[..., Any] | None = None,
    allow: Collection[str] = (),
) -> ReducedModel:
    """Load what `nodepint rom export` wrote. Local; needs no MPI.

    In double precision if the run was and JAX's `jax_enable_x64` is on, else in single. Nothing is
    imported because the file names it: a network or solver of the user's own has to be given.

    Args:
        path: The file.
        network: Makes the user's own network, as `network.name` of the run's config did: called
            with a key, `input_shape`, `output_size` and the options in the config.
        allow: Import paths that the file may name, such as "own_field.py:make"; these are imported.

    Raises:
        ReducedModelError: if the file is missing, damaged, no reduced model, names code that is
            not given, or holds a model that cannot be built here.
    """
    path = Path(path)
    stored = read_rom(path)
    try:
        config = parse_config(stored.meta["config"], source=str(path))
        _check_code(config, network, allow)
        _check_sizes(config, stored)
        return _fill(_build(config, stored, network), stored)
    except ReducedModelError as error:
        raise ReducedModelError(f"Cannot build the reduced model {path}: {error}") from error
    except (
        NodepintError, ValueError, TypeError, OverflowError, MemoryError, RuntimeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise ReducedModelError(f"Cannot build the reduced model {path}: {reason}") from error


def _check_code(config: Config, network: Callable[..., Any] | None, allow: Collection[str]) -> None:
    """Refuse code that the file names and the user did not."""
    used = {
        key: path
        for key, path in named_code(config).items()
        if key == "time.fine.solver" or (key == "network.name" and network is None)
    }
    if network is not None and not isinstance(config.network, UserNetwork):
        raise ReducedModelError("`network` was given, but the file's network is a built-in one.")
    for key, name in used.items():
        if name not in allow:
            by = "`network=` the function that makes it, or " if key == "network.name" else ""
            raise ReducedModelError(
                f'the file asks to import `{key} = "{name}"`, which is not built in. Look at that '
                f'code, then give {by}`allow=["{name}"]`.'
            )


def _check_sizes(config: Config, stored: RomFile) -> None:
    """Refuse a config that asks for far more than the file holds."""
    network, n_stages = config.network, config.time.fine.n_stages or 0
    if config.time.n_slices > MOST_SLICES or n_stages > MOST_STAGES:
        raise ReducedModelError(
            f"its config has {config.time.n_slices} slices and {n_stages} stages; expected at "
            f"most {MOST_SLICES} and {MOST_STAGES}."
        )
    if isinstance(network, DenseNetwork) and network.depth > len(stored.leaves):
        raise ReducedModelError(
            f"its config has a network of depth {network.depth}, but the file holds "
            f"{len(stored.leaves)} arrays."
        )


def _build(config: Config, stored: RomFile, make: Callable[..., Any] | None) -> ReducedModel:
    """The model of the config on a basis of zeros: its structure, with fresh weights.

    First in shapes alone: a config may ask for more memory than its arrays in the file take.
    """
    meta = stored.meta
    shape, size, step = tuple(meta["input_shape"]), meta["output_size"], meta["step"] - 1
    stepper, origin = stepper_of(config), origin_of(config, meta)

    def build() -> ReducedModel:
        try:
            model = build_model(config, input_shape=shape, output_size=size, step=step, make=make)
        except NodepintError as error:
            if not isinstance(config.network, UserNetwork):
                raise
            raise ReducedModelError(
                f"{error} The network is the user's own: `{config.network.name}` must be "
                f"importable here, as seen from the working directory {Path.cwd()}."
            ) from error
        basis, energies = jnp.zeros(stored.basis.shape), jnp.zeros(stored.energies.shape)
        return reduce_model(model, basis, energies, stepper=stepper, origin=origin)

    if not isinstance(config.network, UserNetwork):
        shapes = eqx.filter_eval_shape(lambda: _parts(build()))
        _check_leaves(describe_leaves(shapes), stored)
    return build()


def _parts(rom: ReducedModel) -> dict[str, Any]:
    return {name: getattr(rom, name) for name in PARTS}


def _check_leaves(expected: Mapping[str, LeafSpec], stored: RomFile) -> None:
    """Compare names and shapes of the stored arrays with those of the model; numbers may differ
    in precision, not in kind."""
    found = {}
    for name, leaf in stored.leaves.items():
        dtype = expected[name].dtype if name in expected else leaf.dtype
        same_kind = leaf.dtype.kind == dtype.kind
        found[name] = LeafSpec(leaf.shape, dtype if same_kind else leaf.dtype)
    differences = list_differences(found, expected)
    if differences:
        raise ReducedModelError(f"its config gives another model than is stored: {differences}.")


def _fill(blank: ReducedModel, stored: RomFile) -> ReducedModel:
    """The stored arrays in their places, in their own precision."""
    parts = _parts(blank)
    _check_leaves(describe_leaves(parts), stored)
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
        optimizer_step=meta["step"],
        horizon=(config.time.horizon[0], config.time.horizon[1]),
        times=tuple(meta["times"]),
        energy=meta["energy"],
        versions=tuple(meta["versions"].items()),
    )
