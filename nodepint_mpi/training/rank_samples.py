"""What one rank takes of the samples: how many of a step, and the part around its slices."""

import numpy as np

from nodepint_mpi.build.model import build_edges
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.batch import count_reads
from nodepint_mpi.core.exogenous import count_knots
from nodepint_mpi.core.observations import BlockObservations, place_observations
from nodepint_mpi.core.partition import own_slices, owned_range, snap_times
from nodepint_mpi.data.sample_checks import known_inputs
from nodepint_mpi.data.samples import Block, Samples
from nodepint_mpi.errors import ConfigError


def for_rank(
    samples: Samples,
    config: Config,
    n_ranks: int,
    rank: int,
    *,
    relaxed: bool = False,
    whole: bool = False,
) -> Samples:
    """The same samples, of which a rank of a line takes what it needs. Local.

    Args:
        samples: A split.
        config: The experiment.
        n_ranks: Ranks of the line.
        rank: The rank asked for.
        relaxed: Whether continuity is, as far as the config says.
        whole: Take the whole horizon for one slice.
    """
    edges, section = build_edges(config.time), samples.section
    edges = edges[[0, -1]] if whole else edges
    owned = owned_range(len(edges) - 1, n_ranks, rank)
    sizes = None if samples.series is None else count_reads(*samples.series, edges, owned)
    n_knots = 0
    if section.inputs is not None:
        knots, _, lengths = known_inputs(samples.split, section, np.arange(samples.n_rows))
        n_knots = count_knots(snap_times(knots, edges), lengths, edges, section.interpolation)
    relaxed = relaxed and config.time.relaxation is not None and samples.has_gaps
    dtype = np.dtype(config.run.precision)
    return samples._replace(block=Block(edges, owned, sizes, n_knots, relaxed, dtype))


def place_samples(samples: Samples, n_ranks: int, rank: int) -> BlockObservations:
    """Where a rank reads the samples that were cut for it, at common times if they have any. Local.

    Raises:
        NodepintError: see `place_observations`.
    """
    block = samples.block
    assert block is not None  # they were cut for this rank
    if block.sizes is None:
        return place_observations(samples.times, block.edges, n_ranks, rank)
    inside = [
        np.linspace(a, b, block.sizes.inside + 2)[1:-1]
        for a, b in zip(block.edges, block.edges[1:], strict=False)
    ]
    none = np.zeros(0, int)
    slices = own_slices(block.edges, n_ranks, rank, inside=inside)
    return BlockObservations(slices, none, none, none)  # the batch says where


def share_batch(config: Config, n_rows: int, n_groups: int) -> int:
    """How many samples of a step each group of ranks has. Local.

    Raises:
        ConfigError: if the groups would have different numbers of them.
    """
    size = (config.data.batch_size if config.data else None) or n_rows
    if size % n_groups:
        fitting = [n for n in range(1, size + 1) if size % n == 0]
        raise ConfigError(
            f"A step has {size} samples, which {n_groups} groups of ranks cannot share evenly: set "
            f"`run.data_ranks` to one of {', '.join(map(str, fitting[:8]))}"
            f"{', ...' if fitting[8:] else ''}, or change `data.batch_size`."
        )
    return size // n_groups
