"""Checkpoints: saved by all ranks, loaded on any number of ranks, never half there.

A checkpoint is written under a temporary name, read back, sealed, brought to the disk and only then
given its name, so at any moment the one before it can be loaded.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, PyTree
from mpi4py import MPI

from nodepint_mpi.errors import CheckpointError, NodepintError, OutputError
from nodepint_mpi.io.checkpoint_file import (
    DamagedError,
    Head,
    Place,
    lay_out,
    read_head,
    read_leaves,
)
from nodepint_mpi.io.checkpoint_folder import (
    checkpoint_path,
    find_checkpoints,
    flush_file,
    partial_path,
    prune,
    publish,
    remove_file,
    remove_partials,
)
from nodepint_mpi.io.checkpoint_rows import (
    describe_rows,
    read_all_rows,
    read_back,
    sum_rows,
    write_all_rows,
)
from nodepint_mpi.io.difference import describe_difference
from nodepint_mpi.io.errno_text import error_text
from nodepint_mpi.io.leaves import (
    LeafSpec,
    describe_leaves,
    fill_leaves,
    list_differences,
    list_nonfinite,
    take_array,
    take_leaves,
)
from nodepint_mpi.io.seal import (
    FORMAT,
    Seal,
    Span,
    choose_apart,
    digest_file,
    find_damage,
    read_format,
    write_seal,
)
from nodepint_mpi.ranks.agreement import together

_log = logging.getLogger(__name__)
_BCAST_BYTES = 2**30  # MPI counts are 32 bit


class Checkpoint(NamedTuple):
    """What was loaded. `rows` are this rank's; all else is equal on all ranks."""

    step: int
    replicated: PyTree
    rows: dict[str, np.ndarray]
    meta: dict[str, Any]
    path: Path


def save_checkpoint(
    control: MPI.Intracomm,
    folder: Path,
    *,
    step: int,
    replicated: PyTree,
    rows: Mapping[str, Array | np.ndarray],
    row_start: int,
    n_rows: int,
    meta: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Save a checkpoint and remove the oldest ones.

    Collective over `control`. Whatever goes wrong, checkpoints that were there before still are.

    Args:
        control: The ranks that save.
        folder: An existing folder, seen by all ranks.
        step: Optimizer steps done; names the file.
        replicated: Tree of arrays and numbers, equal on all ranks; rank 0's are stored. Other
            leaves (functions, None) are passed over.
        rows: This rank's rows of arrays over all slices, by name. Every rank holds consecutive
            rows, possibly none, but all name the same arrays.
        row_start: Global index of this rank's first row.
        n_rows: Number of rows on all ranks together.
        meta: Further facts that JSON can hold, equal on all ranks: "fingerprint" of the
            experiment, seeds, data cursor; "config" (TOML text) explains a wrong fingerprint.
        keep: How many checkpoints up to this step stay, this one among them; at least 1.
            None for all.

    Returns:
        The checkpoint's path, on all ranks.

    Raises:
        OutputError: on all ranks, if it cannot be written: no folder, no permission, no space.
        LayoutError: on all ranks, if the ranks' rows do not fit together.
    """
    path = checkpoint_path(folder, step)
    partial = partial_path(path)
    with together(control):
        leaves = take_leaves(replicated)
        blocks = {name: take_array(name, rows[name]) for name in sorted(rows)}
        sums = {name: sum_rows(block, name) for name, block in blocks.items()}
    specs = describe_rows(control, blocks, row_start=row_start, n_rows=n_rows)
    try:
        places = {}
        with together(control):
            if control.rank == 0:
                remove_partials(folder)
                places = lay_out(
                    partial,
                    leaves,
                    specs,
                    step=step,
                    n_rows=n_rows,
                    n_ranks=control.size,
                    meta=meta,
                )
        places: dict[str, Place] = control.bcast(places)
        if specs:
            write_all_rows(control, partial, blocks, sums, row_start=row_start)
        with together(control):
            _check_written(partial, places, specs, sums, row_start=row_start)
            if control.rank == 0:
                _check_leaves(partial)
        seal = _make_seal(control, partial, places, specs)
        with together(control):
            if control.rank == 0:
                _write_seal(partial, seal)
            flush_file(partial)
        with together(control):
            if control.rank == 0:
                publish(partial, path)
                if keep is not None:
                    prune(folder, step=step, keep=keep)
    except NodepintError:
        if control.rank == 0:
            remove_file(partial)
        raise
    return path


def load_checkpoint(
    control: MPI.Intracomm,
    where: Path,
    *,
    like_at: Callable[[int], PyTree],
    row_start: int,
    n_owned_rows: int,
    fingerprint: str | None,
    config: str | None = None,
) -> Checkpoint:
    """Load a checkpoint, saved on this or any other number of ranks.

    Collective over `control`; all arguments but `row_start` and `n_owned_rows` are equal.

    Args:
        control: The ranks that load.
        where: A checkpoint, or a folder of them: then the newest good one is taken, and a damaged
            one is named in a warning and passed over.
        like_at: Gives, for the step a checkpoint was saved at, a tree with the shapes, types and
            structure to fill, such as a fresh start.
        row_start: Global index of this rank's first row.
        n_owned_rows: Number of its rows. If no rank asks for rows, none are read.
        fingerprint: Of the experiment it must belong to; None takes any.
        config: The experiment's config (TOML text), to say in what another one differs.

    Raises:
        CheckpointError: on all ranks, if there is none, the one asked for is damaged, or it
            belongs to another experiment or another model.
    """
    with together(control):
        listed = _candidates(where) if control.rank == 0 else None
    candidates, is_folder = control.bcast(listed)
    tried = []
    for path in candidates:
        loaded = _load_one(
            control,
            path,
            like_at,
            row_start=row_start,
            n_owned=n_owned_rows,
            fingerprint=fingerprint,
            config=config,
        )
        if isinstance(loaded, Checkpoint):
            return loaded
        if not is_folder:
            raise CheckpointError(f"{path} is damaged: {loaded}; name another checkpoint")
        tried.append(f"{path.name}: {loaded}")
        if control.rank == 0:
            _log.warning("skipped a damaged checkpoint: %s: %s", path, loaded)
    listing = "; ".join(tried) or "it holds no file step-*.h5"
    raise CheckpointError(f"no good checkpoint in {where}: {listing}")


def require_fingerprint(control: MPI.Intracomm, where: Path, fingerprint: str) -> None:
    """Check, before anything else is done, that a checkpoint belongs here: a file, or a folder's
    newest good one.

    Collective over `control`. Reads no array.

    Raises:
        CheckpointError: on all ranks, if there is none or it belongs to another experiment.
    """
    with together(control):
        listed = _candidates(where)[0] if control.rank == 0 else None
    for path in control.bcast(listed):
        with together(control):
            if control.rank == 0:
                _check_format(path)
        damage = find_damage(control, path)
        with together(control):
            if control.rank == 0 and not damage:
                try:
                    _check_belongs(path, read_head(path), fingerprint=fingerprint, config=None)
                except DamagedError as error:
                    damage = str(error)
        if not control.bcast(damage):
            return
    raise CheckpointError(f"no good checkpoint in {where}")


def require_finite(loaded: Checkpoint) -> None:
    """Check that what was loaded has finite parameters. Local; equal on all ranks.

    Raises:
        CheckpointError: with the names of those that hold NaN or infinity.
    """
    wrong = list_nonfinite(take_leaves(loaded.replicated["params"]))
    if wrong:
        raise CheckpointError(
            f"{loaded.path}: the parameters {wrong} hold NaN or infinity; name an older checkpoint"
        )


def _check_written(
    path: Path,
    places: Mapping[str, Place],
    specs: Mapping[str, LeafSpec],
    sums: Mapping[str, np.ndarray],
    *,
    row_start: int,
) -> None:
    """Compare this rank's rows in the file with the checksums they had in memory. Local."""
    try:
        damage = read_back(path, places, specs, sums, row_start=row_start)
    except OSError as error:
        raise OutputError(f"cannot read back {path}: {error_text(error)}") from error
    if damage:
        raise OutputError(f"{path} does not read back as it was written: {damage}")


def _check_leaves(path: Path) -> None:
    """The same for what all ranks hold alike. Local."""
    try:
        read_leaves(path, read_head(path).replicated)
    except DamagedError as error:
        raise OutputError(f"{path} does not read back as it was written: {error}") from error


def _make_seal(
    control: MPI.Intracomm, path: Path, places: Mapping[str, Place], specs: Mapping[str, LeafSpec]
) -> Seal:
    n_bytes = 0
    with together(control):
        if control.rank == 0:
            try:
                n_bytes = path.stat().st_size
            except OSError as error:
                raise OutputError(f"cannot read back {path}: {error_text(error)}") from error
    n_bytes = control.bcast(n_bytes)
    apart = choose_apart(Span(places[name].rows, specs[name].n_bytes) for name in places)
    digest, damage = digest_file(control, path, n_bytes, apart)
    if damage:
        raise OutputError(f"cannot read back {path}: {damage}")
    return Seal(n_bytes, apart, digest)


def _write_seal(path: Path, seal: Seal) -> None:
    try:
        write_seal(path, seal)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error_text(error)}") from error


def _candidates(where: Path) -> tuple[list[Path], bool]:
    """Files to try in order, and whether they were found in a folder."""
    if os.path.isdir(where):
        return find_checkpoints(where), True
    if not os.path.exists(where):
        raise CheckpointError(f"no checkpoint at {where}: there is no such file or folder")
    return [where], False


def _load_one(
    control: MPI.Intracomm,
    path: Path,
    like_at: Callable[[int], PyTree],
    *,
    row_start: int,
    n_owned: int,
    fingerprint: str | None,
    config: str | None,
) -> Checkpoint | str:
    """Load a file, or say what is damaged; the same on all ranks."""
    with together(control):
        if control.rank == 0:
            _check_format(path)
    damage = find_damage(control, path)
    if damage:
        return damage
    head, leaves = None, {}
    with together(control):
        if control.rank == 0:
            try:
                head = read_head(path)
                _check_belongs(path, head, fingerprint=fingerprint, config=config)
            except DamagedError as error:
                damage = str(error)
    head, damage = control.bcast((head, damage))
    if damage:
        return damage
    with together(control):
        like = like_at(head.step)
        differences = list_differences(head.replicated, describe_leaves(like))
        if differences:
            raise CheckpointError(f"{path} does not fit this model: {differences}")
        if control.rank == 0:
            try:
                leaves = read_leaves(path, head.replicated)
            except DamagedError as error:
                damage = str(error)
    damage = control.bcast(damage)
    if damage:
        return damage
    leaves = _broadcast(control, leaves, head.replicated)
    rows = {}
    end = control.allreduce(row_start + n_owned if n_owned else 0, op=MPI.MAX)
    if head.rows and end:
        if end != head.n_rows:
            raise CheckpointError(f"{path} holds {head.n_rows} slices, expected {end}")
        rows, damage = read_all_rows(control, path, head.rows, row_start=row_start, n_owned=n_owned)
        damages = [why for why in control.allgather(damage) if why]
        if damages:
            return damages[0]
    return Checkpoint(head.step, fill_leaves(like, leaves), rows, head.meta, path)


def _check_format(path: Path) -> None:
    found = read_format(path)
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, this program reads format {FORMAT}; resume with the "
            "version of nodepint_mpi that wrote it"
        )


def _check_belongs(path: Path, head: Head, *, fingerprint: str | None, config: str | None) -> None:
    """Check that it is a checkpoint of this experiment."""
    if fingerprint is not None and head.fingerprint != fingerprint:
        how = describe_difference(head.meta.get("config"), config)
        raise CheckpointError(
            f"{path} belongs to another experiment (fingerprint {head.fingerprint}, expected "
            f"{fingerprint}){how}; resume with the config it was saved with, or start a new run"
        )


def _broadcast(
    control: MPI.Intracomm, leaves: Mapping[str, np.ndarray], specs: Mapping[str, LeafSpec]
) -> dict[str, np.ndarray]:
    """Give rank 0's leaves to all ranks, byte by byte whatever their type."""
    everywhere = {}
    for name, spec in specs.items():
        leaf = leaves[name] if control.rank == 0 else np.empty(spec.shape, spec.dtype)
        raw = leaf.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, _BCAST_BYTES):
            control.Bcast(raw[start : start + _BCAST_BYTES])
        everywhere[name] = leaf
    return everywhere
