"""`nodepint info`: what a config would do, without doing it."""

import functools
from typing import Any

import equinox as eqx
import jax
import numpy as np
from mpi4py import MPI

from nodepint_mpi.build.model import Given, build_model
from nodepint_mpi.build.noise import build_noise
from nodepint_mpi.build.optimizers import parameter_paths
from nodepint_mpi.build.sections import build_loss, build_problem
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.config.network import UserNetwork
from nodepint_mpi.core.levels import choose_grouping, depth
from nodepint_mpi.core.partition import check_layout, line_length, owned_range
from nodepint_mpi.data.datasets import open_split
from nodepint_mpi.data.own import with_own_data
from nodepint_mpi.data.sample_checks import columns_of, series_of
from nodepint_mpi.data.samples import Splits, checked_samples, count_outputs, hold_out
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.io.checkpoint_file import checkpoint_bytes
from nodepint_mpi.models.networks import EncodeProcessDecode
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.dealing import part_of
from nodepint_mpi.parallel.methods.base import ENDS, LEFTS
from nodepint_mpi.parallel.methods.parareal import GROUP_DEFECTS, GROUP_LEFTS
from nodepint_mpi.parallel.recurrence_cost import Sizes, choose_way
from nodepint_mpi.training.batch_model import split_model
from nodepint_mpi.training.check_model import check_model
from nodepint_mpi.training.encoder import deals_encoder
from nodepint_mpi.training.memory import (
    kept_states,
    plan_samples,
    require_network_fits,
    show_bytes,
    tree_bytes,
)
from nodepint_mpi.training.rank_samples import for_rank, share_batch
from nodepint_mpi.training.setup import check_encoded, check_scores, count_steps
from nodepint_mpi.training.update import make_update
from nodepint_mpi.training.warm_starts import bytes_each, count_kept
from nodepint_mpi.training.watch import require_watched


def make_plan(config: Config, n_ranks: int) -> dict[str, Any]:
    """Slices per rank, message bytes, memory and checkpoint size. Local; no MPI.

    Raises:
        NodepintError: for anything that would also stop the run.
    """
    if config.control is not None:
        raise ConfigError(
            "`nodepint info` says what training and solving use; the config has a section "
            "`[control]`, for `nodepint control`."
        )
    section = config.time
    n_groups, n_basis = config.run.data_ranks, config.run.basis_ranks
    n_along = line_length(n_ranks, n_groups, n_basis)
    check_layout(section.n_slices, n_along)
    owned = [len(owned_range(section.n_slices, n_along, rank)) for rank in range(n_along)]
    number_bytes = np.dtype(config.run.precision).itemsize
    plan: dict[str, Any] = {
        "name": config.run.name,
        "fingerprint": config.fingerprint(),
        "n_ranks": n_ranks,
        "data_ranks": n_groups,
        "basis_ranks": n_basis,
        "n_slices": section.n_slices,
        "slices_per_rank": owned,
        "method": section.method,
        "fine_steps": section.fine.n_steps,
        "coarse_steps": section.coarse and section.coarse.n_steps,
        **plan_levels(config),
    }
    if config.network is None and config.problem is not None:
        state = int(np.size(build_problem(config.problem, section.horizon).initial))
        n_paths = (config.noise and config.noise.n_paths) or 1
        return (
            plan
            | plan_recurrence(config, n_along, state, n_paths)
            | {
                "message_bytes": state * number_bytes,
                "interface_bytes_per_rank": max(owned) * 2 * state * number_bytes,
            }
        )
    splits = open_alone(config)
    samples = splits.train
    shape, size = samples.input_shape, count_outputs(samples)
    n_steps = count_steps(config, samples)
    last = n_steps - 1  # a network that grows is largest then
    require_network_fits(config, input_shape=shape, output_size=size, step=last, n_here=1)
    given = Given(samples.n_inputs, samples.n_static)
    model = _make_model(config, shape, size, given, last)
    params, _ = split_model(model)
    null = MPI.Intracomm()
    grid = TimeComm(null, 0, n_along, null, null, 0, n_groups, basis=null, n_basis=n_basis)
    update = make_update(config, grid, params)
    descent = update.descent
    opt_state = update.shapes()["opt_state"]
    batch = samples.section.batch_size or samples.n_rows
    shape = check_model(model, samples, build_noise(config))
    state, n_samples = int(np.prod(shape)), share_batch(config, samples.n_rows, n_groups)
    for part in splits:
        if part is not None:
            check_encoded(config, model, part)
    check_scores(config, model, samples, (n_samples, *shape))
    require_watched(config, build_loss(config)[1])
    message = n_samples * state * number_bytes
    params_bytes = tree_bytes(params)
    rows = {}
    if section.tracking is not None:
        sample = jax.ShapeDtypeStruct((batch, state), np.dtype(config.run.precision))
        n_rows = 2 if plan.get("levels", "1") == "1" else 4
        each = bytes_each(section.n_slices, sample, n_rows)
        n_tracked = samples.n_rows
        if samples.section.batch_size is not None:
            n_tracked = count_kept(section.tracking, n_tracked, each)
        most = part_of(n_tracked, n_groups, 0).stop
        plan["tracks_bytes_per_rank"] = most * bytes_each(max(owned), sample, n_rows)
        states = jax.ShapeDtypeStruct((section.n_slices, n_tracked, state), config.run.precision)
        rows = dict.fromkeys((ENDS, LEFTS, GROUP_DEFECTS, GROUP_LEFTS)[:n_rows], states)
    if config.noise is not None and config.noise.paths == "fresh" and section.method != "serial":
        plan["fresh_paths"] = (
            "every step is solved anew, in several sweeps: with fewer ranks along time than "
            f"sweeps (here {n_along}) serial training, `--plain`, is faster; `nodepint plan` "
            "measures it"
        )
    here = for_rank(samples, config, n_along, int(np.argmax(owned)), relaxed=True)
    sample_bytes, input_bytes = plan_samples(here, n_samples).values()
    replicated = {"params": params, "opt_state": opt_state}
    return (
        plan
        | plan_recurrence(config, n_along, state, n_samples)
        | {
            "n_train": samples.n_rows,
            "n_valid": None if splits.valid is None else splits.valid.n_rows,
            "batch_size": batch,
            "steps_per_epoch": samples.epoch_steps,
            "rows_left_out": samples.n_left_out,
            "n_steps": n_steps,
            "n_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "parameter_paths": parameter_paths(params),
            "state_size": state,
            "message_bytes": message,
            "gradient_message_bytes": params_bytes,
            "random_basis": None if descent is None else descent.describe(),
            "coefficient_message_bytes": None if descent is None else descent.message_bytes,
            "interface_bytes_per_rank": max(owned) * 6 * message,
            "adjoint_bytes_per_rank": max(owned) * kept_states(section.fine) * message,
            "samples_bytes_per_rank": sample_bytes,
            "inputs_bytes_per_rank": input_bytes,
            "encoder": "shared by samples"
            if deals_encoder(config, grid, model, samples)
            else "on the first rank",
            "update": update.describe(),
            "parameter_bytes_per_rank": 2 * params_bytes,
            "optimizer_bytes_per_rank": tree_bytes(jax.eval_shape(update.init, params)),
            "checkpoint_bytes": checkpoint_bytes(replicated, rows, meta_bytes=4096),
        }
    )


def _make_model(
    config: Config, shape: tuple[int, ...], size: int, given: Given, step: int
) -> EncodeProcessDecode:
    """The model, with zeros for the weights of a network of this package: no compiling.

    A network of the user's own is made as it is: its code may look at values.
    """
    make = functools.partial(
        build_model, config, input_shape=shape, output_size=size, given=given, step=step
    )
    if isinstance(config.network, UserNetwork):
        return make()
    return jax.tree.map(
        lambda leaf: (
            jax.device_put(np.zeros(leaf.shape, leaf.dtype))
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else leaf
        ),
        eqx.filter_eval_shape(make),
    )


def plan_recurrence(config: Config, n_along: int, state: int, n_samples: int) -> dict[str, str]:
    """How the coarse problem in coordinates is solved; nothing where there is none. Local.

    Args:
        config: The experiment.
        n_along: Ranks along time.
        state: Entries of a sample's state.
        n_samples: Samples of a line of ranks.
    """
    section, basis = config.time, config.time.basis
    if section.method not in ("tangent", "reduced") or basis is None or basis.complement:
        return {}
    if basis.recurrence != "auto":
        return {"recurrence": basis.recurrence}
    sizes = Sizes(
        n_along, section.n_slices, basis.rank or state, n_samples, config.run.data_ranks,
        np.dtype(config.run.precision).itemsize,
    )  # fmt: skip
    return {"recurrence": choose_way(sizes)}


def plan_levels(config: Config) -> dict[str, str]:
    """In what levels parareal's coarse walks are done; nothing where there are none. Local."""
    section = config.time.levels
    if config.time.method != "parareal" or section is None:
        return {}
    grouping = choose_grouping(
        config.time.n_slices, coarsening=section.coarsening, cycles=section.cycles,
        number=None if section.number == "auto" else section.number,
    )  # fmt: skip
    if grouping is None:
        return {"levels": "1"}
    n_deep = depth(grouping, section.cycles)
    groups = f"{grouping.n_groups} groups of {grouping.coarsening} slices"
    return {"levels": f"2: {groups}, {n_deep} coarse steps deep instead of {grouping.n_slices}"}


def format_plan(plan: dict[str, Any]) -> str:
    """The plan, a line per number. Local."""
    rows = ((key.replace("_", " "), _show(key, value)) for key, value in plan.items())
    return "\n".join(f"{name:28} {value}" for name, value in rows)


def open_alone(config: Config) -> Splits:
    """The splits, opened by this process alone and checked as in training. Local."""
    config = with_own_data(config)
    data = config.data
    if data is None:
        raise ConfigError("The plan of a training run needs a section `[data]`.")
    samples = {
        name: checked_samples(
            open_split(data.source, name, columns_of(data), series=series_of(data)), config
        )
        for name in (data.train_split, data.test_split, data.valid_split)
        if name is not None
    }
    valid = None if data.valid_split is None else samples[data.valid_split]
    return hold_out(config, samples[data.train_split], valid, samples[data.test_split])


def _show(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if "bytes" in key:
        return show_bytes(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
