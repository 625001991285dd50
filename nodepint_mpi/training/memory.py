"""The memory that a config needs, before it is allocated, and what the machine has."""

import math
import os
import resource
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from nodepint_mpi.build.model import build_model
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.network import UserNetwork
from nodepint_mpi.config.time import StepsSection, Time
from nodepint_mpi.data.samples import Samples
from nodepint_mpi.errors import ConfigError, NodepintError
from nodepint_mpi.training.update import Update

_MEMINFO = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of a container or a batch job, in the two versions of control groups."""


def show_bytes(n_bytes: int) -> str:
    """In words, such as `1.5 GiB`. Local."""
    if n_bytes < 1024:
        return f"{n_bytes} B"
    power = min(3, (n_bytes.bit_length() - 1) // 10)
    return f"{n_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def tree_bytes(tree: Any) -> int:
    """Of all arrays in a tree, or of their shapes. Local."""
    leaves = jax.tree.leaves(eqx.filter(tree, lambda leaf: hasattr(leaf, "dtype")))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def kept_states(steps: StepsSection) -> int:
    """States per slice and sample that the pull-back keeps. Local."""
    if steps.checkpoints is not None:
        return steps.checkpoints
    if steps.n_steps is not None:
        return steps.n_steps
    return int(np.ceil(np.sqrt(2 * steps.max_steps)))


def plan_parameters(params: PyTree, update: Update | None = None) -> dict[str, int]:
    """Bytes of a rank that do not depend on the samples: parameters, gradient, moments. Local.

    Args:
        params: Trainable arrays, or their shapes.
        update: Says what ranks have of the optimizer's state, on average; without, that is left
            out.
    """
    needed = {"parameters and gradient": 2 * tree_bytes(params)}
    if update is not None:
        moments = tree_bytes(update.shapes()["opt_state"])
        n_sharing = 1 if update.is_on_every_rank else update.comm.n_grid
        needed["the optimizer"] = moments // n_sharing
    return needed


def plan_slices(section: Time, state: jax.ShapeDtypeStruct, n_owned: int) -> dict[str, int]:
    """The least bytes of a rank that its slices take. Local.

    Args:
        section: The section `[time]`.
        state: Of this rank's samples.
        n_owned: How many slices it has.
    """
    each = math.prod(state.shape) * state.dtype.itemsize
    at_once = 1 if section.method == "serial" else min(n_owned, section.slices_at_once or n_owned)
    kept = 1 if section.adjoint.kind == "continuous" else kept_states(section.fine)
    grids = [s.n_steps or 0 for s in (section.fine, section.coarse, section.tangents) if s]
    return {
        "interface states": n_owned * 2 * each,
        "states for the gradient": at_once * kept * each,
        "the times of all steps": 2 * at_once * max(grids) * state.dtype.itemsize,
    }


def plan_samples(samples: Samples, n_samples: int) -> dict[str, int]:
    """Bytes of a rank that the samples of a step take. Local.

    Observations, masks, weights and times are on all ranks of a group; inputs, and where samples
    with times of their own are read, on the rank that owns the slices.

    Args:
        samples: A split, cut for this rank.
        n_samples: Of a step, those of this rank's group.
    """
    one = jax.tree.map(jnp.asarray, samples.take(np.array([0])))  # all are of the same size
    parts = {
        "the samples of a step": one._replace(signal=None, reads=None),
        "inputs and reading times in its slices": (one.signal, one.reads),
    }
    return {what: n_samples * tree_bytes(part) for what, part in parts.items()}


def require_network_fits(
    config: Config, *, input_shape: tuple[int, ...], output_size: int, step: int, n_here: int
) -> None:
    """Check the parameters of a network of this package before they are made. Local.

    A network of the user's own is made as it is: its code may look at values.

    Raises:
        ConfigError: if they take more memory than there is.
    """
    if isinstance(config.network, UserNetwork) or config.network is None:
        return
    try:
        shapes = eqx.filter_eval_shape(
            build_model, config, input_shape=input_shape, output_size=output_size, step=step
        )
    except NodepintError:
        return  # making it says the same, in words that JAX has not added to
    require_memory(plan_parameters(shapes), n_here)


def require_memory(needed: dict[str, int], n_here: int) -> None:
    """Refuse what cannot fit. Local.

    Args:
        needed: The least bytes of one rank, by what they are for.
        n_here: Ranks that share this machine's memory.

    Raises:
        ConfigError: with the numbers.
    """
    total, device = sum(needed.values()), _device_bytes()
    here, all_here = (device, total) if device is not None else (machine_bytes(), total * n_here)
    if here is None or all_here <= here:
        return
    parts = ", ".join(
        f"{show_bytes(n)} for {what}" for what, n in needed.items() if n > total / 100
    )
    whole = (
        f" and {show_bytes(all_here)} for the {n_here} ranks of this machine"
        if (n_here > 1 and device is None)
        else ""
    )
    raise ConfigError(
        f"The run needs at least {show_bytes(total)} a rank{whole} ({parts}), but "
        f"{'its GPU' if device is not None else 'the machine'} has {show_bytes(here)}. Use a "
        "smaller `[network]`, a smaller `data.batch_size`, fewer `n_steps` or "
        "`time.fine.checkpoints`, or more machines; `nodepint info` shows all sizes."
    )


def machine_bytes() -> int | None:
    """Memory that processes of this machine may take, as far as the system says. Local."""
    found = [soft for soft, _ in [resource.getrlimit(resource.RLIMIT_AS)] if soft >= 0]
    try:
        words = _MEMINFO.read_text().split("MemTotal:")[1].split()
        found.append(int(words[0]) * 1024)
    except (OSError, IndexError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _LIMITS:
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(found, default=None)


def _device_bytes() -> int | None:
    """Memory of this rank's GPU; None on CPUs, which use the machine's."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    return (device.memory_stats() or {}).get("bytes_limit")


def _inexact(tree: PyTree) -> PyTree:
    """Trainable leaves: arrays, or shapes, of real or complex numbers."""
    return eqx.filter(
        tree, lambda leaf: hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, np.inexact)
    )
