"""A checkpoint to test with: what is saved, and whether what was loaded is that, to the bit."""

import contextlib
import functools
import os
import subprocess
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

N_ROWS = 7
FINGERPRINT = "4f1d"
CONFIG = 'seed = 1\n[optim]\nrate = 0.001\nname = "adam"\n'


@functools.cache
def make_tree(step: int, *, plain: bool = False) -> dict:
    """A tree with leaves of all kinds; `step` changes every value that can change.

    A plain one has nothing that JAX would have to compile, for scripts that should start fast.
    """
    rng = np.random.default_rng(step)
    if plain:
        return {"w": rng.standard_normal((30, 30)), "n": [step, np.float32(step)]}
    net = eqx.nn.MLP(2, 3, 4, 2, activation=jax.nn.tanh, key=jax.random.key(step))
    return {
        "net": net,
        "moments": [jnp.asarray(rng.standard_normal((3, 2))), None, (jnp.int32(step),)],
        "single": jnp.asarray(rng.standard_normal(5), jnp.float32),
        "half": jnp.asarray(rng.standard_normal(5), jnp.bfloat16),
        "mask": np.arange(5) % 2 == step % 2,
        "empty": np.empty((0, 3)),
        "scalar": np.asarray(rng.standard_normal()),
        "special": np.array([np.nan, -0.0, np.inf, 5e-324]),
        "key": jax.random.key(step),
        "raw key": jax.random.key_data(jax.random.key(step)),
        "count": step,
        "rate": 0.1 * step,
        "on": bool(step % 2),
        "phase": complex(step, 1),
        "numpy": np.float32(step),
        "big endian": np.arange(step, step + 3, dtype=">i4"),
        "transposed": rng.standard_normal((3, 4)).T,
        "a/b": {".": np.arange(3) + step, "": np.ones(1), "%": np.zeros(1)},
        "function": jnp.sin,
        "name": "a string is no array",
    }


def make_rows(step: int, low: int = 0, high: int = N_ROWS) -> dict:
    """Rows `low : high` of arrays over all slices."""
    rng = np.random.default_rng(1000 + step)
    starts = rng.standard_normal((N_ROWS, 3, 2))
    return {
        "starts": jnp.asarray(starts[low:high]),
        "half": jnp.asarray(starts[low:high, 0], jnp.bfloat16),
        "more/frozen": (starts[:, 0, 0] > 0)[low:high],
        "flat": np.arange(N_ROWS, dtype=np.int32)[low:high] + step,
        "nothing": np.empty((N_ROWS, 0, 2))[low:high],
    }


def deal(rank: int, size: int, how: str = "even") -> tuple[int, int]:
    """First row and number of rows of a rank; "gaps" leaves every other rank without rows."""
    if how == "even":
        counts = [N_ROWS // size + (r < N_ROWS % size) for r in range(size)]
    elif how == "gaps":
        holders = [r for r in range(size) if r % 2 == 1] or [0]
        counts = [0] * size
        for n in range(N_ROWS):
            counts[holders[n * len(holders) // N_ROWS]] += 1
    else:
        counts = [0] * (size - 1) + [N_ROWS]
    return sum(counts[:rank]), counts[rank]


def save(
    control,
    folder: Path,
    step: int,
    *,
    how: str = "even",
    keep: int = 2,
    plain: bool = False,
    **meta,
) -> Path:
    """Save the case of a step. Collective."""
    row_start, n_owned = deal(control.rank, control.size, how)
    return save_checkpoint(
        control,
        folder,
        step=step,
        replicated=make_tree(step, plain=plain),
        rows=make_rows(step, row_start, row_start + n_owned),
        row_start=row_start,
        n_rows=N_ROWS,
        meta={"fingerprint": FINGERPRINT, "config": CONFIG, "cursor": [step, 0], **meta},
        keep=keep,
    )


def load(
    control, where: Path, *, how: str = "even", plain: bool = False, **options: Any
) -> Checkpoint:
    """Load into a tree with other values. Collective."""
    row_start, n_owned = deal(control.rank, control.size, how)
    options = {"fingerprint": FINGERPRINT} | options
    return load_checkpoint(
        control,
        where,
        like_at=lambda _: make_tree(99, plain=plain),
        row_start=row_start,
        n_owned_rows=n_owned,
        **options,
    )


def check(loaded: Checkpoint, control, *, how: str = "even") -> None:
    """Whether a loaded checkpoint is the case of its step, bit by bit. Local."""
    row_start, n_owned = deal(control.rank, control.size, how)
    assert loaded.meta["cursor"] == [loaded.step, 0]
    plain = "w" in loaded.replicated
    same_tree(loaded.replicated, make_tree(loaded.step, plain=plain))
    same_tree(loaded.rows, make_rows(loaded.step, row_start, row_start + n_owned), kinds=False)


def same_tree(given, expected, *, kinds: bool = True) -> None:
    """Equal structure, types and bytes."""
    pairs = zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        if callable(b) or isinstance(b, str):
            assert a is b or a == b
            continue
        if kinds:
            assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
            assert isinstance(b, jax.Array) or type(a) is type(b)
        if isinstance(b, jax.Array) and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        assert a.dtype == b.dtype.newbyteorder("=")
        assert a.tobytes() == b.astype(a.dtype).tobytes()


@contextlib.contextmanager
def small_disk(control, folder: Path, n_bytes: int):
    """A disk of a few bytes at `folder`, where it can be mounted. Collective."""
    reason = ""
    if control.rank == 0:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
        try:
            made = subprocess.run(command, capture_output=True, text=True)
            reason = made.stderr if made.returncode else ""
        except FileNotFoundError:
            reason = "there is no command mount"
    reason = control.bcast(reason)
    if reason:
        pytest.skip(f"cannot mount a small disk: {reason.strip()}")
    try:
        yield folder
    finally:
        control.Barrier()
        if control.rank == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def listing(folder: Path) -> list[str]:
    """Names in a folder. Local."""
    return sorted(os.listdir(folder))
