"""Which GPU and which cores a rank takes, out of what all ranks see of their machines.

Every rank looks at its machine (`ranks.devices`), all exchange what they see, and each computes
the same plan from the same data: no rank can be surprised by another. Pure; nothing here asks the
system, MPI or JAX.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nodepint_mpi.errors import PlacementError

MEMORY_SHARE = 0.75
"""Of a GPU's memory, for all ranks on it together: what JAX takes by default."""

_NO_GPU = ("", "-1", "NoDevFiles", "none", "void")  # what launchers and containers write for none


class Gpu(NamedTuple):
    """A GPU as a process sees it: JAX's number for it, and what tells it from all others there."""

    ordinal: int
    identity: str


class Seen(NamedTuple):
    """What a rank sees of its machine. `cores` come in the order of the hardware."""

    host: str
    local_rank: int | None
    gpus: tuple[Gpu, ...] = ()
    cores: tuple[int, ...] = ()


class Placement(NamedTuple):
    """What a rank takes. `n_sharing` is the number of ranks on its GPU."""

    host: str
    local_rank: int
    local_size: int
    gpu: Gpu | None
    n_sharing: int
    cores: tuple[int, ...]


def visible_gpus(env: Mapping[str, str], listed: Sequence[str] | None) -> tuple[Gpu, ...]:
    """The GPUs this process may use. Local.

    Args:
        env: Environment. `CUDA_VISIBLE_DEVICES` narrows what there is, then
            `JAX_CUDA_VISIBLE_DEVICES`.
        listed: Unique names of the GPUs the driver shows to this process (in a control group of
            its own only its own), or None if it cannot be asked.

    Raises:
        PlacementError: if a variable names what is no GPU, which CUDA would pass over in silence.
    """
    narrowed = env.get("CUDA_VISIBLE_DEVICES")
    if narrowed is None:
        found = list(listed or [])
    elif narrowed.strip() in _NO_GPU:
        found = []
    else:
        words = [word.strip() for word in narrowed.split(",")]
        found = [_identify(word, narrowed, env, listed, len(words)) for word in words]
        if len(set(found)) < len(found):
            raise PlacementError(f"`CUDA_VISIBLE_DEVICES={narrowed}` names a GPU twice.")
    gpus = [Gpu(ordinal, identity) for ordinal, identity in enumerate(found)]
    chosen = env.get("JAX_CUDA_VISIBLE_DEVICES", "all")
    if chosen == "all":
        return tuple(gpus)
    words = [word.strip() for word in chosen.split(",")]
    if not all(word.isdigit() and int(word) < len(gpus) for word in words):
        raise PlacementError(
            f"`JAX_CUDA_VISIBLE_DEVICES={chosen}`: {len(gpus)} GPUs are visible here; give numbers "
            f"below that, or unset it."
        )
    return tuple(gpus[int(word)] for word in words)


def _identify(
    word: str, given: str, env: Mapping[str, str], listed: Sequence[str] | None, n_words: int
) -> str:
    """One entry of CUDA_VISIBLE_DEVICES: a number, or a (shortened) unique name."""
    if word.isdigit() and (listed is None or int(word) < len(listed)):
        if listed is not None:
            return listed[int(word)]
        # Behind `srun --gpus-per-task` every rank's own GPU may be number 0.
        if _per_task(env) == n_words:
            return f"task {env.get('SLURM_PROCID', '')}: {word}"
        return word
    if word.startswith(("GPU-", "MIG-")):
        whole = [name for name in listed or [] if name.startswith(word)]
        if len(whole) == 1:
            return whole[0]
        if listed is None or word.startswith("MIG-"):
            return word
    n_there = "" if listed is None else f"; there are {len(listed)} here"
    raise PlacementError(
        f"`CUDA_VISIBLE_DEVICES={given}`: {word!r} names no GPU{n_there}. Unset it, or give "
        "numbers or names that `nvidia-smi -L` shows."
    )


def _per_task(env: Mapping[str, str]) -> int | None:
    """GPUs that SLURM gives each task, from `2` or `a100:2`."""
    count = env.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
    return int(count) if count.isdigit() else None


def plan_local_ranks(seen: Sequence[Seen]) -> list[tuple[int, int]]:
    """Local rank and number of ranks on its machine, of every rank. Local.

    What the launcher says, where that numbers the ranks of a machine from 0 on; else their order.
    """
    places: list[tuple[int, int]] = [(0, 0)] * len(seen)
    for host in {one.host for one in seen}:
        ranks = [rank for rank, one in enumerate(seen) if one.host == host]
        claims = [seen[rank].local_rank for rank in ranks]
        if sorted(-1 if claim is None else claim for claim in claims) != list(range(len(ranks))):
            claims = list(range(len(ranks)))
        for rank, claim in zip(ranks, claims, strict=True):
            places[rank] = (claim or 0, len(ranks))
    return places


def plan_placement(seen: Sequence[Seen], *, share_gpus: bool) -> list[Placement]:
    """What every rank takes. Local; a pure function of its arguments, so the same on all ranks.

    Ranks that see the same GPUs deal them out in the order of their local ranks; a rank whose
    launcher has given it a GPU of its own takes that one. Ranks that see the same cores divide
    them; cores that a launcher has bound stay as they are.

    Args:
        seen: What each rank sees, in the order of ranks.
        share_gpus: Whether ranks may share a GPU.

    Raises:
        PlacementError: if only some ranks see a GPU, or ranks would share one and must not.
    """
    blind = [rank for rank, one in enumerate(seen) if not one.gpus]
    if blind and len(blind) < len(seen):
        first = blind[0]
        raise PlacementError(
            f"rank {first} on {seen[first].host} sees no GPU and other ranks do"
            f"{f' ({len(blind)} ranks see none)' if len(blind) > 1 else ''}: ask for GPUs on all "
            "machines and for all ranks, or set JAX_PLATFORMS=cpu to run without."
        )
    places = plan_local_ranks(seen)
    gpus = [_choose_gpu(seen, places, rank) for rank in range(len(seen))]
    users = Counter((one.host, gpu.identity) for one, gpu in zip(seen, gpus, strict=True) if gpu)
    if users and max(users.values()) > 1 and not share_gpus:
        (host, identity), n_ranks = users.most_common(1)[0]
        on_host = [rank for rank, one in enumerate(seen) if one.host == host]
        n_gpus = len({gpu.identity for rank in on_host for gpu in seen[rank].gpus})
        raise PlacementError(
            f"{len(on_host)} ranks on {host} have {n_gpus} GPU(s): {n_ranks} ranks would share "
            f"GPU {identity}. Start at most {n_gpus} ranks on a machine like this (srun "
            f"--ntasks-per-node={n_gpus}), ask for more GPUs, let ranks share them by "
            "`--set run.share_gpus=true`, or set JAX_PLATFORMS=cpu to run without."
        )
    placements = []
    for rank, (one, gpu) in enumerate(zip(seen, gpus, strict=True)):
        n_sharing = users[(one.host, gpu.identity)] if gpu is not None else 0
        cores = _choose_cores(seen, places, rank)
        placements.append(Placement(one.host, *places[rank], gpu, n_sharing, cores))
    return placements


def _choose_gpu(seen: Sequence[Seen], places: Sequence[tuple[int, int]], rank: int) -> Gpu | None:
    mine = seen[rank]
    if not mine.gpus:
        return None
    same = {gpu.identity for gpu in mine.gpus}
    group = [
        places[other][0]
        for other, one in enumerate(seen)
        if one.host == mine.host and {gpu.identity for gpu in one.gpus} == same
    ]
    position, n_gpus = sorted(group).index(places[rank][0]), len(mine.gpus)
    if len(group) <= n_gpus:
        return mine.gpus[position]
    return mine.gpus[position * n_gpus // len(group)]  # neighbors in time on the same GPU


def _choose_cores(
    seen: Sequence[Seen], places: Sequence[tuple[int, int]], rank: int
) -> tuple[int, ...]:
    """This rank's share of the cores it sees, or all of them if these are its own already."""
    mine = seen[rank]
    here = [other for other, one in enumerate(seen) if one.host == mine.host]
    group = [other for other in here if set(seen[other].cores) == set(mine.cores)]
    overlaps = any(set(seen[other].cores) & set(mine.cores) for other in here if other not in group)
    n_cores = len(mine.cores)
    if overlaps or n_cores < len(group):
        return mine.cores
    position = sorted(places[other][0] for other in group).index(places[rank][0])
    first, end = (n_cores * p // len(group) for p in (position, position + 1))
    return mine.cores[first:end]


def gpu_environment(
    env: Mapping[str, str], placement: Placement, *, cuda_mpi: bool, is_cuda_aware: bool | None
) -> dict[str, str]:
    """Variables to set for JAX and mpi4jax before they touch the GPU. Local.

    Memory that the user has arranged for stays as it is. Messages go from GPU to GPU if that is
    asked for (by `cuda_mpi` or `MPI4JAX_USE_CUDA_MPI=1`) and MPI does not say that it cannot: it
    would read the GPU's addresses as the host's and crash.
    """
    if placement.gpu is None:
        return {}
    asked = cuda_mpi or env.get("MPI4JAX_USE_CUDA_MPI", "").lower() in ("1", "true", "on")
    chosen = {"MPI4JAX_USE_CUDA_MPI": "1" if asked and is_cuda_aware is not False else "0"}
    arranged = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    on_demand = env.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    platform = env.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform"
    if placement.n_sharing > 1 and not on_demand and not platform and not set(arranged) & set(env):
        chosen["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{MEMORY_SHARE / placement.n_sharing:.3f}"
    return chosen
