"""Checkpoints come back bit by bit, on any number of ranks, and only where they belong."""

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.errors import CheckpointError, LayoutError, OutputError
from nodepint_mpi.io import checkpoint
from nodepint_mpi.io.checkpoint import load_checkpoint, save_checkpoint
from nodepint_mpi.io.checkpoint_file import checkpoint_bytes
from nodepint_mpi.io.checkpoint_folder import find_checkpoints
from nodepint_mpi.io.leaves import take_leaves
from nodepint_mpi.parallel.comms import alone
from tests.io.checkpoint_case import (
    CONFIG,
    FINGERPRINT,
    N_ROWS,
    check,
    deal,
    listing,
    load,
    make_rows,
    make_tree,
    same_tree,
    save,
)

HOWS = ["even", "gaps", "last"]


def save_plain(comm, folder, tree, rows=None, *, row_start=0, n_rows=0, step=1):
    meta = {"fingerprint": FINGERPRINT}
    return save_checkpoint(
        comm,
        folder,
        step=step,
        replicated=tree,
        rows=rows or {},
        row_start=row_start,
        n_rows=n_rows,
        meta=meta,
        keep=1,
    )


def load_plain(comm, where, like, *, row_start=0, n_owned_rows=0):
    return load_checkpoint(
        comm,
        where,
        like_at=lambda _: like,
        row_start=row_start,
        n_owned_rows=n_owned_rows,
        fingerprint=FINGERPRINT,
    )


@pytest.mark.parametrize("how", HOWS)
def test_everything_comes_back(comm, shared_tmp_path, how):
    path = save(comm, shared_tmp_path, 120, how=how)
    assert path == shared_tmp_path / "step-000120.h5"
    assert listing(shared_tmp_path) == [path.name]
    for other in HOWS:
        loaded = load(comm, shared_tmp_path, how=other)
        assert (loaded.step, loaded.path) == (120, path)
        assert loaded.meta["config"] == CONFIG
        check(loaded, comm, how=other)


def test_saved_on_some_ranks_loaded_on_others(comm, shared_tmp_path):
    """Save on the first R ranks, load on the first R', for all R and R' there are."""
    for n_savers in range(1, comm.size + 1):
        folder = shared_tmp_path / str(n_savers)
        part = comm.Split(comm.rank < n_savers, comm.rank)
        if comm.rank < n_savers:
            if comm.rank == 0:
                folder.mkdir()
            part.Barrier()
            save(part, folder, n_savers)
        part.Free()
        comm.Barrier()
        for n_loaders in range(1, comm.size + 1):
            part = comm.Split(comm.rank < n_loaders, comm.rank)
            if comm.rank < n_loaders:
                check(load(part, folder), part)
            part.Free()
        check(load(alone(), folder), alone())  # each rank for itself, all at once


def test_files_do_not_depend_on_the_ranks_that_wrote_them(comm, shared_tmp_path):
    folders = [shared_tmp_path / name for name in ("all", "one")]
    if comm.rank == 0:
        for folder in folders:
            folder.mkdir()
    comm.Barrier()
    save(comm, folders[0], 5)
    if comm.rank == 0:
        save(alone(), folders[1], 5)
        whole, single = (content(folder / "step-000005.h5") for folder in folders)
        assert whole.pop("/n_ranks") == comm.size
        assert single.pop("/n_ranks") == 1
        assert whole == single


def content(path) -> dict:
    """Everything in an HDF5 file but times. Local."""
    found = {}

    def add(name, item):
        found.update({f"{name}/{key}": value for key, value in item.attrs.items()})
        if isinstance(item, h5py.Dataset):
            found[name] = (item.shape, item.dtype.str, np.asarray(item[()]).tobytes())

    with h5py.File(path) as file:
        add("", file)
        file.visititems(add)
    return found


def test_without_rows_and_without_leaves(comm, shared_tmp_path):
    save_plain(comm, shared_tmp_path, {"a": None})
    loaded = load_plain(comm, shared_tmp_path, {"a": None}, n_owned_rows=3)
    assert loaded.replicated == {"a": None}
    assert loaded.rows == {}
    save_plain(comm, shared_tmp_path, 3.5, step=2)
    assert load_plain(comm, shared_tmp_path, 0.0).replicated == 3.5


def test_rows_are_read_only_if_asked_for(comm, shared_tmp_path):
    save(comm, shared_tmp_path, 1)
    loaded = load_plain(comm, shared_tmp_path, make_tree(0))
    assert loaded.rows == {}
    same_tree(loaded.replicated, make_tree(1))


def test_shapes_are_enough_to_load(comm, shared_tmp_path):
    tree = {"w": jnp.arange(6.0).reshape(2, 3), "n": jnp.int32(4)}
    save_plain(comm, shared_tmp_path, tree)
    same_tree(load_plain(comm, shared_tmp_path, jax.eval_shape(lambda: tree)).replicated, tree)


def test_leaves_go_in_pieces(comm, shared_tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_BCAST_BYTES", 7)
    save(comm, shared_tmp_path, 1)
    check(load(comm, shared_tmp_path), comm)


def test_the_last_few_are_kept(comm, shared_tmp_path):
    for step in (10, 20, 5, 30, 40, 1_000_000):
        path = save(comm, shared_tmp_path, step, keep=2)
        assert path.exists()
    names = [path.name for path in find_checkpoints(shared_tmp_path)]
    assert names == ["step-1000000.h5", "step-000040.h5"]
    path = save(comm, shared_tmp_path, 35, keep=1)  # after going back; later ones stay
    names = [path.name for path in find_checkpoints(shared_tmp_path)]
    assert names == ["step-1000000.h5", "step-000040.h5", "step-000035.h5"]


def test_only_checkpoints_are_touched(comm, shared_tmp_path):
    mine = ["step-000001.h5.bak", "notes.partial", "step-x.h5", "step-000009.h5.partial"]
    if comm.rank == 0:
        for name in mine:
            (shared_tmp_path / name).write_text("mine")
    comm.Barrier()
    save(comm, shared_tmp_path, 2, keep=1)
    assert listing(shared_tmp_path) == sorted([*mine[:3], "step-000002.h5"])


def test_the_same_step_again_replaces(comm, shared_tmp_path):
    save(comm, shared_tmp_path, 10, note="first")
    save(comm, shared_tmp_path, 10, note="second")
    assert load(comm, shared_tmp_path).meta["note"] == "second"


def test_another_experiment_is_refused(comm, shared_tmp_path):
    save(comm, shared_tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"fingerprint 4f1d, expected other\); resume"):
        load(comm, shared_tmp_path, fingerprint="other")
    here = CONFIG.replace("0.001", "0.1").replace("seed = 1\n", "")
    with pytest.raises(CheckpointError) as caught:
        load(comm, shared_tmp_path, fingerprint="other", config=here)
    how = "optim.rate is 0.001 there and 0.1 here; seed is 1 there and not set here;"
    assert f"belongs to another experiment (fingerprint 4f1d, expected other): {how}" in str(
        caught.value
    )
    check(load(comm, shared_tmp_path, fingerprint=None), comm)


def test_another_model_is_refused_by_name(comm, shared_tmp_path):
    save_plain(comm, shared_tmp_path, {"a": [jnp.zeros((2, 3)), 1], "b": np.zeros(2), "d": 1.0})
    like = {"a": [jnp.zeros((3, 2)), 1.0], "c": np.zeros(2), "d": 0.0}
    with pytest.raises(CheckpointError) as caught:
        load_plain(comm, shared_tmp_path / "step-000001.h5", like)
    assert str(caught.value).endswith(
        "does not fit this model: a/0 is float64[2,3], expected float64[3,2]; "
        "a/1 is int64[], expected float64[]; c is missing, expected float64[2]; "
        "b is float64[2], not expected"
    )


def test_another_number_of_slices_is_refused(comm, shared_tmp_path):
    save(comm, shared_tmp_path, 3)
    n_owned = 1 if comm.rank == comm.size - 1 else 0
    with pytest.raises(CheckpointError, match=f"holds {N_ROWS} slices, expected 5"):
        load_plain(comm, shared_tmp_path, make_tree(0), row_start=4, n_owned_rows=n_owned)


def test_nothing_to_load(comm, shared_tmp_path):
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*holds no file step-"):
        load(comm, shared_tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at .*no such file or folder"):
        load(comm, shared_tmp_path / "step-000001.h5")
    assert find_checkpoints(shared_tmp_path / "missing") == []


def test_rows_that_do_not_fit_together_are_refused(comm, shared_tmp_path):
    start, n_owned = deal(comm.rank, comm.size)
    rows = make_rows(1, start, start + n_owned)
    with pytest.raises(LayoutError, match=f"the ranks hold {N_ROWS} rows, expected 9"):
        save_plain(comm, shared_tmp_path, {}, rows, row_start=start, n_rows=9)
    with pytest.raises(LayoutError, match=f"rows of rank {comm.size - 1} start at 99"):
        wrong = 99 if comm.rank == comm.size - 1 else start
        save_plain(comm, shared_tmp_path, {}, rows, row_start=wrong, n_rows=N_ROWS)
    last = comm.rank == comm.size - 1
    if comm.size > 1:
        with pytest.raises(LayoutError, match=f"rank {comm.size - 1} holds rows of another shape"):
            other = rows | {"flat": rows["flat"].astype(float)} if last else rows
            save_plain(comm, shared_tmp_path, {}, other, row_start=start, n_rows=N_ROWS)
        with pytest.raises(LayoutError, match=f"rank {comm.size - 1} holds rows of other arrays"):
            other = {} if last else rows
            save_plain(comm, shared_tmp_path, {}, other, row_start=start, n_rows=N_ROWS)
    with pytest.raises(LayoutError, match="different numbers of rows"):
        other = {"a": np.zeros(n_owned), "b": np.zeros(n_owned + 1)}
        save_plain(comm, shared_tmp_path, {}, other, row_start=start, n_rows=N_ROWS)
    assert listing(shared_tmp_path) == []


def test_what_is_no_number_is_refused_by_name(comm, shared_tmp_path):
    for bad in [np.array(["a"]), np.array([None]), np.array(0, "M8[s]"), 2**70]:
        with pytest.raises(OutputError, match=r"a/0: .* cannot be saved; expected numbers"):
            save_plain(comm, shared_tmp_path, {"a": [bad]})


def test_the_size_is_known_beforehand(comm, shared_tmp_path):
    shapes = {name: jax.ShapeDtypeStruct(np.shape(block), block.dtype)
              for name, block in make_rows(0).items()}  # fmt: skip
    size = save(comm, shared_tmp_path, 12).stat().st_size
    bound = checkpoint_bytes(make_tree(12), shapes, meta_bytes=1000)
    assert size <= bound <= size + 64 * 2**10 + 4 * 2**10 * 100
    many = {f"group{n % 30}": {f"leaf{m}": float(m) for m in range(50)} for n in range(30)}
    assert save_plain(comm, shared_tmp_path, many).stat().st_size <= checkpoint_bytes(many, {})


def test_names_in_the_file_are_paths(comm, shared_tmp_path):
    names = set(take_leaves(make_tree(1)))
    assert {"net/layers/0/weight", "moments/2/0", "a%2Fb/%.", "a%2Fb/%", "a%2Fb/%25"} <= names
    assert set(take_leaves(jnp.ones(2))) == {"value"}
