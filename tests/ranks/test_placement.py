"""Which GPU and cores a rank takes, as decided from what all ranks see: no GPU is needed for it."""

import os
import subprocess

import pytest

from nodepint_mpi.errors import NodepintError, PlacementError
from nodepint_mpi.ranks import devices
from nodepint_mpi.ranks.devices import check_launch, in_hardware_order, parse_gpu_list, settle
from nodepint_mpi.ranks.launcher import in_job, launched_size, local_rank, local_size
from nodepint_mpi.ranks.libmpi import is_cuda_aware
from nodepint_mpi.ranks.placement import (
    Gpu,
    Placement,
    Seen,
    gpu_environment,
    plan_local_ranks,
    plan_placement,
    visible_gpus,
)

ONE_RANK = pytest.mark.mpi(max_size=1)  # for what is pure

UUIDS = [f"GPU-{n}{n}{n}{n}-aaaa" for n in range(8)]


def gpus(*numbers):
    """As visible to one process, which numbers them from 0."""
    return tuple(Gpu(ordinal, UUIDS[number]) for ordinal, number in enumerate(numbers))


def taken(seen, *, share=False):
    """The driver's number of each rank's GPU."""
    plan = plan_placement(seen, share_gpus=share)
    return [UUIDS.index(place.gpu.identity) for place in plan if place.gpu is not None]


# ---- Launchers ----------------------------------------------------------------------------


@ONE_RANK
@pytest.mark.parametrize(
    "env, rank, size",
    [
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 3, 4),
        ({"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, 1, 2),
        ({"PALS_LOCAL_RANKID": "5", "PALS_LOCAL_SIZE": "6"}, 5, 6),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x3)"}, 2, 4),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4,2"}, 2, None),
        ({"MV2_COMM_WORLD_LOCAL_RANK": "1"}, 1, None),
        ({"FLUX_TASK_LOCAL_ID": "1"}, 1, None),
        # mpirun in a batch job: SLURM's numbers are the batch shell's
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3", "SLURM_LOCALID": "0"}, 3, None),
        ({"MPI_LOCALRANKID": "3", "SLURM_LOCALID": "0"}, 3, None),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "x", "SLURM_LOCALID": "1"}, 1, None),
        ({"SLURM_LOCALID": "-1"}, None, None),
        ({"SLURM_LOCALID": ""}, None, None),
        ({}, None, None),
    ],
)
def test_the_local_rank_is_what_the_launcher_says(env, rank, size):
    assert local_rank(env) == rank
    found = local_size(env)
    assert (None if found is None else found[0]) == size


@ONE_RANK
def test_a_batch_shell_is_no_rank_but_a_start_without_mpi_is_noticed():
    shell = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert not in_job(shell) and launched_size(shell) is None
    without_mpi = shell | {"SLURM_STEP_NUM_TASKS": "4"}  # srun, but not --mpi=pmix
    assert not in_job(without_mpi)
    with pytest.raises(PlacementError, match="started 4 ranks, but MPI knows only this one"):
        check_launch(1, without_mpi)
    check_launch(4, without_mpi)
    check_launch(1, shell)
    assert in_job({"PMIX_RANK": "0"}) and in_job({"PMI_RANK": "1"})


@ONE_RANK
@pytest.mark.parametrize(
    "claims, places",
    [
        ([0, 1, 0, 1], [(0, 2), (1, 2), (0, 2), (1, 2)]),
        ([1, 0, 1, 0], [(1, 2), (0, 2), (1, 2), (0, 2)]),  # the launcher's own order
        ([None] * 4, [(0, 2), (1, 2), (0, 2), (1, 2)]),
        ([0, 0, 1, 0], [(0, 2), (1, 2), (1, 2), (0, 2)]),  # makes no sense on the first machine
        ([0, 7, None, 1], [(0, 2), (1, 2), (0, 2), (1, 2)]),
    ],
)
def test_local_ranks_that_make_no_sense_are_counted(claims, places):
    seen = [Seen(f"n{r // 2}", claim) for r, claim in enumerate(claims)]
    assert plan_local_ranks(seen) == places


# ---- What a process sees ------------------------------------------------------------------


@ONE_RANK
@pytest.mark.parametrize(
    "env, listed, found",
    [
        ({}, UUIDS[:3], gpus(0, 1, 2)),
        ({}, None, ()),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, UUIDS[:3], gpus(2, 0)),
        ({"CUDA_VISIBLE_DEVICES": " 1 "}, UUIDS[:3], gpus(1)),
        ({"CUDA_VISIBLE_DEVICES": UUIDS[1]}, UUIDS[:3], gpus(1)),
        ({"CUDA_VISIBLE_DEVICES": "GPU-11"}, UUIDS[:3], gpus(1)),
        ({"CUDA_VISIBLE_DEVICES": "MIG-x"}, UUIDS[:1], (Gpu(0, "MIG-x"),)),
        ({"CUDA_VISIBLE_DEVICES": "1"}, None, (Gpu(0, "1"),)),
        ({"CUDA_VISIBLE_DEVICES": ""}, UUIDS[:3], ()),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, UUIDS[:3], ()),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, UUIDS[:3], ()),
        ({"CUDA_VISIBLE_DEVICES": "2,0", "JAX_CUDA_VISIBLE_DEVICES": "1"}, UUIDS[:3],
         (Gpu(1, UUIDS[0]),)),
    ],
)  # fmt: skip
def test_variables_narrow_what_the_driver_shows(env, listed, found):
    assert visible_gpus(env, listed) == found


@ONE_RANK
@pytest.mark.parametrize(
    "env, message",
    [
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, "'3' names no GPU; there are 3 here"),
        ({"CUDA_VISIBLE_DEVICES": "first"}, "'first' names no GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0,,1"}, "'' names no GPU"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-9"}, "'GPU-9' names no GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0,0"}, "names a GPU twice"),
        ({"CUDA_VISIBLE_DEVICES": "0," + UUIDS[0]}, "names a GPU twice"),
        ({"JAX_CUDA_VISIBLE_DEVICES": "3"}, "3 GPUs are visible here"),
        ({"JAX_CUDA_VISIBLE_DEVICES": "gpu"}, "3 GPUs are visible here"),
    ],
)
def test_variables_that_name_no_gpu_are_refused(env, message):
    with pytest.raises(PlacementError, match=message):
        visible_gpus(env, UUIDS[:3])


@ONE_RANK
def test_the_drivers_list_is_read():
    text = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-7f3c-11aa)\n"
        "  MIG 1g.10gb     Device  0: (UUID: MIG-88bc)\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-0d2e-22bb)\n"
    )
    assert parse_gpu_list(text) == ["GPU-7f3c-11aa", "GPU-0d2e-22bb"]
    assert parse_gpu_list("No devices found.\n") == []


# ---- GPUs ---------------------------------------------------------------------------------


@ONE_RANK
def test_a_rank_takes_the_gpu_of_its_local_rank():
    seen = [Seen(f"n{r // 4}", 3 - r % 4, gpus(0, 1, 2, 3)) for r in range(8)]
    assert taken(seen) == [3, 2, 1, 0] * 2
    assert [place.n_sharing for place in plan_placement(seen, share_gpus=False)] == [1] * 8


@ONE_RANK
def test_more_gpus_than_ranks_are_fine_and_said():
    plan = plan_placement([Seen("n0", r, gpus(0, 1, 2, 3)) for r in range(2)], share_gpus=False)
    assert [place.gpu and place.gpu.ordinal for place in plan] == [0, 1]
    said = devices.describe_plan(plan, n_visible=4)
    assert "4 GPUs and 2 rank(s) on a machine: 2 stay idle" in said[1]


@ONE_RANK
def test_fewer_gpus_than_ranks_are_an_error_that_says_what_to_do():
    seen = [Seen("n0", r, gpus(0, 1)) for r in range(3)]
    with pytest.raises(PlacementError, match="3 ranks on n0 have 2 GPU.*run.share_gpus=true"):
        plan_placement(seen, share_gpus=False)
    assert taken(seen, share=True) == [0, 0, 1]
    sharing = [place.n_sharing for place in plan_placement(seen, share_gpus=True)]
    assert sharing == [2, 2, 1]


@ONE_RANK
@pytest.mark.parametrize("n_ranks, n_gpus", [(4, 1), (5, 2), (8, 4), (7, 3)])
def test_shared_gpus_are_dealt_evenly_to_neighbors(n_ranks, n_gpus):
    seen = [Seen("n0", r, gpus(*range(n_gpus))) for r in range(n_ranks)]
    found = taken(seen, share=True)
    counts = [found.count(gpu) for gpu in range(n_gpus)]
    assert found == sorted(found) and max(counts) - min(counts) <= 1


@ONE_RANK
def test_a_rank_that_was_given_a_gpu_takes_it_whatever_its_local_rank():
    """`srun --gpus-per-task=1`: with control groups every rank's own GPU is number 0."""
    seen = [Seen("n0", r, gpus(r)) for r in range(4)]
    plan = plan_placement(seen, share_gpus=False)
    assert [place.gpu for place in plan] == [Gpu(0, UUIDS[r]) for r in range(4)]
    two = [Seen("n0", r, gpus(2 * r, 2 * r + 1)) for r in range(4)]
    assert taken(two) == [0, 2, 4, 6]
    pairs = [Seen("n0", r, gpus(0, 1) if r < 2 else gpus(2, 3)) for r in range(4)]
    assert taken(pairs) == [0, 1, 2, 3]  # --gpu-bind=closest


@ONE_RANK
def test_gpus_of_tasks_are_told_apart_without_the_drivers_list():
    def see(rank, **extra):
        env = {"CUDA_VISIBLE_DEVICES": "0", "SLURM_PROCID": str(rank)} | extra
        return Seen("n0", rank, visible_gpus(env, None))

    own = [see(r, SLURM_GPUS_PER_TASK="a100:1") for r in range(3)]
    plan = plan_placement(own, share_gpus=False)
    assert [place.gpu and place.gpu.ordinal for place in plan] == [0, 0, 0]
    with pytest.raises(PlacementError, match="3 ranks would share"):
        plan_placement([see(r) for r in range(3)], share_gpus=False)


@ONE_RANK
def test_ranks_that_would_meet_on_a_gpu_by_an_odd_binding_are_refused():
    seen = [Seen("n0", 0, gpus(1)), Seen("n0", 1, gpus(1, 2))]
    with pytest.raises(PlacementError, match="2 ranks would share"):
        plan_placement(seen, share_gpus=False)


@ONE_RANK
def test_a_machine_without_gpus_among_others_is_named():
    seen = [Seen("n0", 0, gpus(0)), Seen("n1", 0), Seen("n1", 1)]
    with pytest.raises(PlacementError, match=r"rank 1 on n1 sees no GPU.*2 ranks see none"):
        plan_placement(seen, share_gpus=False)


def on_gpu(n_sharing=1):
    return Placement("n0", 0, 4, Gpu(0, UUIDS[0]), n_sharing, ())


@ONE_RANK
@pytest.mark.parametrize(
    "env, n_sharing, fraction",
    [
        ({}, 1, None),
        ({}, 3, "0.250"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}, 3, None),
        ({"XLA_CLIENT_MEM_FRACTION": ".2"}, 3, None),  # JAX refuses to have both
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 3, None),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, 3, "0.250"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, 3, None),
    ],
)
def test_ranks_that_share_a_gpu_divide_its_memory(env, n_sharing, fraction):
    found = gpu_environment(env, on_gpu(n_sharing), cuda_mpi=False, is_cuda_aware=None)
    assert found.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == fraction
    assert "XLA_CLIENT_MEM_FRACTION" not in found


@ONE_RANK
@pytest.mark.parametrize(
    "env, cuda_mpi, aware, used",
    [
        ({}, False, True, "0"),
        ({}, True, True, "1"),
        ({}, True, None, "1"),
        ({}, True, False, "0"),  # MPI would read the GPU's addresses as its own
        ({"MPI4JAX_USE_CUDA_MPI": "1"}, False, True, "1"),
        ({"MPI4JAX_USE_CUDA_MPI": "1"}, False, False, "0"),
        ({"MPI4JAX_USE_CUDA_MPI": "0"}, True, True, "1"),
    ],
)
def test_messages_go_from_gpu_to_gpu_if_asked_for_and_possible(env, cuda_mpi, aware, used):
    found = gpu_environment(env, on_gpu(), cuda_mpi=cuda_mpi, is_cuda_aware=aware)
    assert found["MPI4JAX_USE_CUDA_MPI"] == used
    without = on_gpu()._replace(gpu=None)
    assert gpu_environment(env, without, cuda_mpi=cuda_mpi, is_cuda_aware=aware) == {}


@ONE_RANK
def test_mpi_is_asked_whether_it_takes_gpu_memory():
    from mpi4py import MPI

    if "Open MPI" in MPI.Get_library_version():
        listed = ["ompi_info", "--parsable", "--param", "opal", "all", "-l", "9", "-a"]
        said = subprocess.run(listed, capture_output=True, text=True, timeout=60).stdout
        built = "opal_built_with_cuda_support:value:true" in said
        assert "opal_built_with_cuda_support:value:" in said
        assert is_cuda_aware() in (built, False)  # built with it, but there may be no driver


# ---- Cores --------------------------------------------------------------------------------


def cores_of(seen):
    return [place.cores for place in plan_placement(seen, share_gpus=False)]


@ONE_RANK
@pytest.mark.parametrize("n_cores, n_ranks", [(8, 2), (8, 3), (5, 5), (7, 1)])
def test_ranks_left_unbound_divide_the_cores(n_cores, n_ranks):
    seen = [Seen("n0", r, (), tuple(range(n_cores))) for r in range(n_ranks)]
    found = cores_of(seen)
    assert sorted(core for own in found for core in own) == list(range(n_cores))
    sizes = [len(own) for own in found]
    assert max(sizes) - min(sizes) <= 1


@ONE_RANK
def test_cores_that_a_launcher_has_bound_stay():
    bound = [Seen("n0", r, (), (2 * r, 2 * r + 1)) for r in range(3)]
    assert cores_of(bound) == [(0, 1), (2, 3), (4, 5)]
    socket = [Seen("n0", r, (), (0, 1, 2, 3) if r < 2 else (4, 5)) for r in range(3)]
    assert cores_of(socket) == [(0, 1), (2, 3), (4, 5)]  # --bind-to socket: two on the first
    too_few = [Seen("n0", r, (), (0, 1)) for r in range(3)]
    assert cores_of(too_few) == [(0, 1)] * 3
    overlapping = [Seen("n0", 0, (), (0, 1)), Seen("n0", 1, (), (1, 2))]
    assert cores_of(overlapping) == [(0, 1), (1, 2)]
    apart = [Seen(f"n{r}", 0, (), (0, 1)) for r in range(2)]
    assert cores_of(apart) == [(0, 1)] * 2
    unknown = [Seen("n0", r) for r in range(2)]  # macOS
    assert cores_of(unknown) == [()] * 2


@ONE_RANK
def test_hardware_threads_of_one_core_stay_together(tmp_path):
    for core in range(8):  # threads n and n + 4 share a core
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    order = in_hardware_order(range(8), tmp_path)
    assert order == (0, 4, 1, 5, 2, 6, 3, 7)
    assert cores_of([Seen("n0", r, (), order) for r in range(2)]) == [(0, 4, 1, 5), (2, 6, 3, 7)]
    assert in_hardware_order({3, 1}, tmp_path / "nowhere") == (1, 3)


# ---- All of it, on the ranks of this test ---------------------------------------------------


@pytest.fixture
def bound_before():
    if not hasattr(os, "sched_getaffinity"):
        yield set()
        return
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def test_every_rank_settles_on_its_cores(comm, bound_before):
    placements = settle(comm)
    assert len(placements) == comm.size
    assert sorted(place.local_rank for place in placements) == list(range(comm.size))
    if bound_before:
        own = os.sched_getaffinity(0)
        assert own == set(placements[comm.rank].cores)
        masks = comm.allgather((bound_before, own))
        together = set().union(*(mask for _, mask in masks))
        assert together == set().union(*(before for before, _ in masks))
        if len(together) >= comm.size:
            assert sum(len(mask) for _, mask in masks) == len(together)


def test_too_few_gpus_are_refused_on_all_ranks(comm, bound_before, monkeypatch):
    """As many ranks as there are, and one GPU; a pretended one, which JAX never hears of."""
    monkeypatch.setattr(devices, "look", lambda: Seen("n0", None, gpus(0)))
    monkeypatch.setattr(devices, "_take_gpu", lambda own, *, cuda_mpi: None)
    if comm.size > 1:
        with pytest.raises(PlacementError, match=f"{comm.size} ranks on n0 have 1 GPU"):
            settle(comm)
    placements = settle(comm, share_gpus=True)
    assert [place.n_sharing for place in placements] == [comm.size] * comm.size


def test_a_bad_variable_on_one_rank_is_everybodys_error(comm, monkeypatch):
    last = comm.size - 1
    if comm.rank == last:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "first")
    monkeypatch.setattr(devices, "_jax_wants_gpus", lambda env: True)
    monkeypatch.setattr(devices, "_list_gpus", lambda: [])
    with pytest.raises(NodepintError, match="'first' names no GPU"):
        settle(comm)
