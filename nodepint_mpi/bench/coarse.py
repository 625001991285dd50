"""`nodepint bench coarse`: the coarse problem alone, in its ways, beside a sweep's fine work."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.core.affine import Affine, compose_all, pack, walk_guarded
from nodepint_mpi.core.partition import OwnedSlices, check_layout, own_slices
from nodepint_mpi.core.propagators import FixedSteps, Propagator
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.sweeps import propagate_block
from nodepint_mpi.models.networks import make_dense
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.counters import WORD_BYTES, counting
from nodepint_mpi.parallel.recurrence import (
    solve_adjoint_coordinates,
    solve_both,
    solve_coordinates,
)
from nodepint_mpi.parallel.recurrence_cost import Sizes, Way, choose_way
from nodepint_mpi.training.batch_model import BatchedField, split_model

WIDTH, FINE_STEPS = 64, 64
TIMED_SLICES = 4  # the others take as long
RADIUS = 1e3  # longer than any coordinates here: what is timed is the linear case

Seconds = Callable[[Callable[[], Any]], float]
"""Median seconds of a call."""


def run_coarse(
    comms: Comms,
    n_slices: Sequence[int],
    ranks: Sequence[int],
    samples: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """Time the coarse problem, and the fine solves of a few slices. Collective over `comms`.

    The field is a multi-layer perceptron of r coordinates, the smallest state that has such a
    basis and so the hardest case for the share.

    Args:
        comms: The run's communicators.
        n_slices: Slices of the horizon; every combination with the other two is timed.
        ranks: Directions of the basis.
        samples: Samples that share it.
        repeats: Calls of which the median counts.

    Raises:
        LayoutError: on all ranks, if there are more ranks than slices.
    """
    for number in n_slices:
        check_layout(number, comms.time.size)

    def seconds(run: Callable[[], Any]) -> float:
        return _median_s(comms, run, repeats)

    pieces, cases = [], []
    for rank, n_samples in itertools.product(ranks, samples):
        pieces.append(_time_pieces(seconds, max(n_slices), rank, n_samples))
        for number in n_slices:
            cases.append(_time_case(comms, seconds, number, rank, n_samples))
            cases[-1]["fine_s"] = pieces[-1]["fine_slice_s"] * -(-number // comms.time.size)
    return {"n_ranks": comms.time.size, "pieces": pieces, "cases": cases}


def format_coarse(result: dict[str, Any]) -> str:
    """What a slice costs, then a row for each case and way. Local."""
    lines = [
        f"{result['n_ranks']} rank(s); fine: MLP of width {WIDTH}, {FINE_STEPS} RK4 steps a slice",
        f"{'r':>5} {'samples':>8} {'walk, us/slice':>15} {'compose, us/slice':>18} "
        f"{'fine, us/slice':>15}",
    ]
    for row in result["pieces"]:
        lines.append(
            f"{row['rank']:5} {row['samples']:8} {1e6 * row['walk_slice_s']:15.2f} "
            f"{1e6 * row['compose_slice_s']:18.2f} {1e6 * row['fine_slice_s']:15.1f}"
        )
    lines.append(
        f"{'slices':>6} {'r':>5} {'samples':>8} {'way':>8} {'forward, ms':>12} {'adjoint, ms':>12} "
        f"{'at once, ms':>12} "
        f"{'of fine':>8} {'to rank 0, MB':>14} {'sent, MB':>9}"
    )
    for case in result["cases"]:
        for way, done in case["ways"].items():
            lines.append(
                f"{case['n_slices']:6} {case['rank']:5} {case['samples']:8} "
                f"{way + '*' * (way == case['chosen']):>8} "
                f"{1e3 * done['forward_s']:12.3f} {1e3 * done['adjoint_s']:12.3f} "
                f"{1e3 * done['both_s']:12.3f} "
                f"{done['forward_s'] / case['fine_s']:8.2%} "
                f"{done['gathered_bytes'] / 1e6:14.3f} {done['sent_bytes'] / 1e6:9.3f}"
            )
    lines.append(
        '*: what `recurrence = "auto"` takes. at once: forward and adjoint together, as in a '
        "tracked step. of fine: of a sweep's fine solves on one rank. to rank 0: maps, before the "
        "walk there; sent: by all ranks, forward."
    )
    return "\n".join(lines)


def gathered_bytes(way: Way, n_ranks: int, n_slices: int, map_bytes: int) -> int:
    """Bytes of the maps on the first rank, of which it has its own already. Local."""
    n_maps = {"slices": n_slices, "blocks": n_ranks, "scan": 0}[way]
    return 0 if n_ranks == 1 else n_maps * map_bytes


def _time_case(
    comms: Comms, seconds: Seconds, n_slices: int, rank: int, n_samples: int
) -> dict[str, Any]:
    """One horizon in all ways."""
    comm = comms.time
    owned = own_slices(np.linspace(0.0, 1.0, n_slices + 1), comm.size, comm.rank)
    matrices, vectors = _maps(owned.indices, rank, n_samples)
    map_bytes = (matrices[0].size + vectors[0].size) * vectors.itemsize
    ways = {}
    for way in get_args(Way):

        def forward(matrices, vectors, way=way):
            with counting() as ledger:
                solved = solve_coordinates(
                    comm, matrices, vectors, jnp.array(RADIUS), owned, way
                ).at_starts
            return solved, ledger.tally.as_array()

        def adjoint(matrices, vectors, way=way):
            return solve_adjoint_coordinates(comm, matrices, vectors, owned, way).at_lefts

        def both(matrices, vectors, way=way):
            radius = jnp.array(RADIUS)
            solved = solve_both(comm, matrices, vectors, vectors, radius, owned, way)
            return solved[0].at_starts, solved[1].at_lefts

        forward, adjoint, both = jax.jit(forward), jax.jit(adjoint), jax.jit(both)
        words = int(forward(matrices, vectors)[1][-1])
        ways[way] = {
            "forward_s": seconds(partial(forward, matrices, vectors)),
            "adjoint_s": seconds(partial(adjoint, matrices, vectors)),
            "both_s": seconds(partial(both, matrices, vectors)),
            "gathered_bytes": gathered_bytes(way, comm.size, n_slices, map_bytes),
            "sent_bytes": sum(comms.control.allgather(words)) * WORD_BYTES,
        }
    sizes = Sizes(comm.size, n_slices, rank, n_samples, number_bytes=vectors.itemsize)
    return {
        "n_slices": n_slices,
        "rank": rank,
        "samples": n_samples,
        "chosen": choose_way(sizes),
        "ways": ways,
    }


def _time_pieces(seconds: Seconds, n_slices: int, rank: int, n_samples: int) -> dict[str, Any]:
    """What one rank needs for a slice: in the walk of rank 0, to compose its map, and in F."""
    maps = Affine(*_maps(np.arange(n_slices), rank, n_samples))
    packed, start, radius = pack(maps), jnp.zeros_like(maps.vector[0]), jnp.array(RADIUS)
    walk = jax.jit(lambda packed: walk_guarded(packed, start, radius, transposed=False))
    compose = jax.jit(lambda maps: compose_all(maps, transposed=False))
    fine, starts, params = _fine_work(rank, n_samples)
    return {
        "rank": rank,
        "samples": n_samples,
        "walk_slice_s": seconds(lambda: walk(packed)) / n_slices,
        "compose_slice_s": seconds(lambda: compose(maps)) / n_slices,
        "fine_slice_s": seconds(lambda: fine(params, starts)) / TIMED_SLICES,
    }


def _maps(indices: np.ndarray, rank: int, n_samples: int) -> tuple[jax.Array, jax.Array]:
    """Matrices and vectors of some slices, under which coordinates stay of their size."""

    def draw(index):
        key, other = jax.random.split(jax.random.fold_in(jax.random.key(0), index))
        matrix = jax.random.normal(key, (n_samples, rank, rank)) / rank**0.5 / 2
        return matrix, jax.random.normal(other, (n_samples, rank))

    return jax.vmap(draw)(jnp.asarray(indices))


def _fine_work(rank: int, n_samples: int) -> tuple[Callable, jax.Array, Any]:
    """Fine solves of a few slices, as a sweep does them."""
    key = jax.random.key(1)
    model = make_dense(
        key, input_shape=(rank,), output_size=rank, width=WIDTH, depth=2,
        activation="tanh", time_dependent=False, positive=False,
    )  # fmt: skip
    params, static = split_model(model)
    propagator = Propagator(BatchedField(static.processor), FixedSteps(RK4(), FINE_STEPS))
    owned: OwnedSlices = own_slices(np.linspace(0.0, 1.0, TIMED_SLICES + 1), 1, 0)
    dtype = jax.tree.leaves(params)[0].dtype
    starts = jax.random.normal(key, (TIMED_SLICES, n_samples, rank), dtype)
    fine = jax.jit(lambda params, u: propagate_block(propagator, params, u, owned).end)
    return fine, starts, params.processor


def _median_s(comms: Comms, run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call on the slowest rank, after one that compiles. Collective."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        comms.control.Barrier()
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(max(comms.control.allgather(time.perf_counter() - began)))
    return statistics.median(times)
