"""`nodepint bench coarse`: the first rank's work and memory beside one sweep's fine work."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.basis import project, transfers
from nodepint_mpi.core.networks import make_dense
from nodepint_mpi.core.partition import OwnedSlices, own_slices
from nodepint_mpi.core.propagators import FixedSteps, Propagator
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.sweeps import propagate_block
from nodepint_mpi.errors import LayoutError
from nodepint_mpi.parallel.coarse import solve_cocoordinates, solve_coordinates
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.run.step import batched_field, split_model

N_SLICES, RANK, BATCH, WIDTH, FINE_STEPS = 1024, 16, 32, 64, 64
STATE_SIZES = (1_000, 10_000, 100_000)
TIMED_SLICES = 4  # the others take as long


def run_coarse(comms: Comms, repeats: int) -> dict[str, Any]:
    """Time the r-dimensional recurrences of all slices and the fine solves of a few. One rank.

    The field is a multi-layer perceptron of r coordinates, the smallest state that has such a
    basis and so the hardest case for the share. Bytes are those of the arrays that the first rank
    gathers in a sweep, for states of `STATE_SIZES` entries.

    Raises:
        LayoutError: on all ranks, if there are several.
    """
    if comms.time.size > 1:
        raise LayoutError("`nodepint bench coarse` times one rank: start it without mpirun")
    keys = jax.random.split(jax.random.key(0), 3)
    owned = own_slices(np.linspace(0.0, 1.0, N_SLICES + 1), 1, 0)
    matrices = jax.random.normal(keys[0], (N_SLICES, BATCH, RANK, RANK)) / RANK**0.5 / 2
    vectors = jax.random.normal(keys[1], (N_SLICES, BATCH, RANK))
    radius = jnp.array(1e3)
    forward = jax.jit(lambda a, b: solve_coordinates(comms.time, a, b, radius, owned).at_starts)
    adjoint = jax.jit(lambda a, b: solve_cocoordinates(comms.time, a, b, owned).at_lefts)
    fine, starts, params = _fine_work(keys[2])
    seconds = {
        "coarse, forward": _median_s(lambda: forward(matrices, vectors), repeats),
        "coarse, adjoint": _median_s(lambda: adjoint(matrices, vectors), repeats),
        "fine, all slices": _median_s(lambda: fine(params, starts), repeats)
        / TIMED_SLICES
        * N_SLICES,
    }
    work = seconds["fine, all slices"]
    return {
        "seconds": seconds,
        "share": {name: value / work for name, value in seconds.items()},
        "gathered_bytes": {size: _gathered_bytes(size) for size in STATE_SIZES},
        "state_bytes": {size: N_SLICES * BATCH * size * vectors.itemsize for size in STATE_SIZES},
    }


def format_coarse(result: dict[str, Any]) -> str:
    """Two tables: time, and bytes by size of the state. Local."""
    lines = [
        f"N = {N_SLICES} slices, r = {RANK}, batch {BATCH}; fine: MLP of width {WIDTH}, "
        f"{FINE_STEPS} RK4 steps a slice",
        f"{'':18} {'s':>8} {'of fine':>8}",
    ]
    for name, seconds in result["seconds"].items():
        lines.append(f"{name:18} {seconds:8.4f} {result['share'][name]:8.2%}")
    lines.append(f"{'state size':>18} {'gathered MB':>12} {'all states MB':>14}")
    for size, gathered in result["gathered_bytes"].items():
        states = result["state_bytes"][size]
        lines.append(f"{size:18} {gathered / 1e6:12.1f} {states / 1e6:14.1f}")
    return "\n".join(lines)


def _fine_work(key: jax.Array) -> tuple[Callable, jax.Array, Any]:
    """Fine solves of a few slices, as a sweep does them."""
    model = make_dense(
        key, input_shape=(RANK,), output_size=RANK, width=WIDTH, depth=2,
        activation="tanh", time_dependent=False, positive=False,
    )  # fmt: skip
    params, static = split_model(model)
    propagator = Propagator(batched_field(static.processor), FixedSteps(RK4(), FINE_STEPS))
    owned: OwnedSlices = own_slices(np.linspace(0.0, 1.0, TIMED_SLICES + 1), 1, 0)
    dtype = jax.tree.leaves(params)[0].dtype
    starts = jax.random.normal(key, (TIMED_SLICES, BATCH, RANK), dtype)
    fine = jax.jit(lambda params, u: propagate_block(propagator, params, u, owned).end)
    return fine, starts, params.processor


def _gathered_bytes(size: int) -> int:
    """Bytes of what all ranks together send to the first one in a sweep."""
    basis = jax.ShapeDtypeStruct((RANK, size), float)
    tangents = jax.ShapeDtypeStruct((N_SLICES, RANK, BATCH, size), float)
    jumps = jax.ShapeDtypeStruct((N_SLICES, BATCH, size), float)
    gathered = jax.eval_shape(transfers, basis, tangents), jax.eval_shape(project, basis, jumps)
    return sum(array.size * array.dtype.itemsize for array in gathered)


def _median_s(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)
