"""Checkpoints: saved by all ranks, loaded on any number of ranks, never half there.

A checkpoint is written under a temporary name, read back, sealed, brought to the disk and only then
given its name, so at any moment the one before it can be loaded.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, PyTree
from mpi4py import MPI

from nodepint_mpi.errors import CheckpointError, NodepintError, OutputError
from nodepint_mpi.io.checkpoint_choice import check_belongs, check_format, list_candidates
from nodepint_mpi.io.checkpoint_file import (
    DamagedError,
    Place,
    lay_out,
    read_head,
    read_leaves,
)
from nodepint_mpi.io.checkpoint_folder import (
    checkpoint_path,
    flush_file,
    partial_path,
    prune,
    publish,
    remove_file,
    remove_partials,
)
from nodepint_mpi.io.checkpoint_rows import (
    Rows,
    describe_dealt,
    describe_rows,
    read_all_rows,
    read_back,
    write_all_rows,
)
from nodepint_mpi.io.errno_text import error_text
from nodepint_mpi.io.leaves import (
    LeafSpec,
    describe_leaves,
    fill_leaves,
    list_differences,
    list_nonfinite,
    sum_rows,
    take_array,
    take_leaves,
)
from nodepint_mpi.io.seal import (
    Seal,
    Span,
    choose_apart,
    digest_file,
    find_damage,
    write_seal,
)
from nodepint_mpi.ranks.agreement import together

_log = logging.getLogger(__name__)
_BCAST_BYTES = 2**30  # MPI counts are 32 bit


class Checkpoint(NamedTuple):
    """What was loaded. `rows` and `dealt` are this rank's; all else is equal on all ranks."""

    step: int
    replicated: PyTree
    rows: dict[str, np.ndarray]
    dealt: dict[str, np.ndarray]
    meta: dict[str, Any]
    path: Path


Dealt = Mapping[str, tuple[LeafSpec, range]]
"""Arrays that are dealt in ways of their own: shapes, whole, and the rows of this rank."""


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
    dealt: Mapping[str, Rows] = {},
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
        dealt: This rank's rows of other arrays, by names that are none of those of `rows`.

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
        held = {name: Rows(block, row_start, n_rows) for name, block in blocks.items()}
        held |= {n: dealt[n]._replace(block=take_array(n, dealt[n].block)) for n in sorted(dealt)}
        sums = {name: sum_rows(one.block, name) for name, one in held.items()}
    # Each by itself: there may be as many rows of an array of the optimizer's as there are slices.
    specs = describe_rows(control, blocks, row_start=row_start, n_rows=n_rows)
    specs |= describe_dealt(control, {name: held[name] for name in sorted(dealt)})
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
            write_all_rows(control, partial, held, sums)
        with together(control):
            _check_written(partial, places, specs, sums, held)
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
    dealt_at: Callable[[int], Dealt] = lambda step: {},
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
        dealt_at: Gives, for the same step, the arrays to load that were saved as `dealt`.

    Raises:
        CheckpointError: on all ranks, if there is none, the one asked for is damaged, or it
            belongs to another experiment or another model.
    """
    with together(control):
        listed = list_candidates(where) if control.rank == 0 else None
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
            dealt_at=dealt_at,
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
        listed = list_candidates(where)[0] if control.rank == 0 else None
    for path in control.bcast(listed):
        with together(control):
            if control.rank == 0:
                check_format(path)
        damage = find_damage(control, path)
        with together(control):
            if control.rank == 0 and not damage:
                try:
                    check_belongs(path, read_head(path), fingerprint=fingerprint, config=None)
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
    rows: Mapping[str, Rows],
) -> None:
    """Compare this rank's rows in the file with the checksums they had in memory. Local."""
    try:
        damage = read_back(path, places, specs, sums, rows)
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


def _load_one(
    control: MPI.Intracomm,
    path: Path,
    like_at: Callable[[int], PyTree],
    *,
    row_start: int,
    n_owned: int,
    fingerprint: str | None,
    config: str | None,
    dealt_at: Callable[[int], Dealt],
) -> Checkpoint | str:
    """Load a file, or say what is damaged; the same on all ranks."""
    with together(control):
        if control.rank == 0:
            check_format(path)
    damage = find_damage(control, path)
    if damage:
        return damage
    head, leaves = None, {}
    with together(control):
        if control.rank == 0:
            try:
                head = read_head(path)
                check_belongs(path, head, fingerprint=fingerprint, config=config)
            except DamagedError as error:
                damage = str(error)
    head, damage = control.bcast((head, damage))
    if damage:
        return damage
    with together(control):
        like, asked = like_at(head.step), dealt_at(head.step)
        dealt = {name: spec for name, (spec, _) in asked.items()}
        stored = {name: spec for name, spec in head.rows.items() if name in dealt}
        differences = list_differences(head.replicated, describe_leaves(like))
        differences = differences or list_differences(stored, dealt)
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
    over_slices = {name: spec for name, spec in head.rows.items() if name not in dealt}
    specs, owned = dict(stored), {name: rows for name, (_, rows) in asked.items()}
    end = control.allreduce(row_start + n_owned if n_owned else 0, op=MPI.MAX)
    if over_slices and end:
        odd = [name for name, spec in over_slices.items() if spec.shape[0] != head.n_rows]
        if odd:
            return f"rows/{odd[0]} does not have {head.n_rows} rows"
        if end != head.n_rows:
            raise CheckpointError(f"{path} holds {head.n_rows} slices, expected {end}")
        specs |= over_slices
        owned |= dict.fromkeys(over_slices, range(row_start, row_start + n_owned))
    rows: dict[str, np.ndarray] = {}
    if specs:
        rows, damage = read_all_rows(control, path, specs, owned)
        damages = [why for why in control.allgather(damage) if why]
        if damages:
            return damages[0]
    owned_rows = {name: rows[name] for name in over_slices if name in rows}
    owned_dealt = {name: rows[name] for name in dealt}
    whole = fill_leaves(like, leaves)
    return Checkpoint(head.step, whole, owned_rows, owned_dealt, head.meta, path)


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
