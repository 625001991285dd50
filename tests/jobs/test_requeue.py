"""Stopped by a signal in a real SLURM, queued again, resumed: the run there would have been."""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.small_case import assert_equal, checkpoints, read_json, read_metrics, wait_for
from tests.jobs.real_slurm import MPIRUN, Repository

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(800)]

FOR_EVER = "n_steps = 1000000"
TRAIN = "jobs/train.sbatch", "tiny.toml"
LAUNCHERS = "srun", "mpirun"


class Story(NamedTuple):
    """What has happened to all jobs."""

    runs: dict[str, Path]
    restarts: dict[str, str]
    last_step: int


@pytest.fixture(scope="module")
def story(slurm, case, tmp_path_factory) -> Story:
    """Jobs under srun and under mpirun, interrupted, and one that is left alone, all at once.

    While the interrupted ones are held in the queue their config is told to end soon, and a copy of
    a run directory is resumed, on one rank, by another job.
    """
    site = {"srun": "", "mpirun": MPIRUN}
    nodes = {"srun": 1, "mpirun": 2}
    to_whom = {"srun": [], "mpirun": ["--batch"]}  # as --signal=USR1@120 and B:USR1@120 do
    endless = case.config.read_text().replace("n_steps = 20", FOR_EVER)
    assert FOR_EVER in endless
    jobs, places, runs, began = {}, {}, {}, time.monotonic()

    def submit(name, place, *options):
        places[name], runs[name] = place, place.folder / name
        jobs[name] = place.submit(*options, *TRAIN, name)

    def note(what):
        print(f"{time.monotonic() - began:5.1f} s  {what}")

    for name in LAUNCHERS:
        place = Repository(slurm, tmp_path_factory.mktemp(name) / "repository", site=site[name])
        (place.folder / "tiny.toml").write_text(endless)
        submit(name, place, "--ntasks=2", f"--nodes={nodes[name]}")
    for name in LAUNCHERS:
        wait_for(lambda run=runs[name]: len(read_metrics(run)) >= 7)
        slurm.ask("scancel", *to_whom[name], "--signal=USR1", jobs[name])
        note(f"{name} signaled")
    running, deadline, stopped_at = set(LAUNCHERS), time.monotonic() + 60, []
    while running:
        assert time.monotonic() < deadline, [places[name].log(jobs[name]) for name in running]
        for name in sorted(running):
            if slurm.state(jobs[name]) == "PENDING":
                slurm.ask("scontrol", "hold", jobs[name])
                running.remove(name)
                note(f"{name} queued again")
        time.sleep(0.1)
    for name in LAUNCHERS:
        assert not (runs[name] / "DONE").exists(), places[name].log(jobs[name])
        stopped_at.append(int(checkpoints(runs[name])[-1].stem.removeprefix("step-")))
    shutil.copytree(runs["srun"], places["srun"].folder / "srun on one")
    last_step = max(stopped_at) + 5
    for name in LAUNCHERS:
        soon = endless.replace(FOR_EVER, f"n_steps = {last_step}")
        (places[name].folder / "tiny.toml").write_text(soon)
        slurm.ask("scontrol", "release", jobs[name])
    submit("srun on one", places["srun"], "--ntasks=1")
    submit("calm", places["srun"], "--ntasks=2")

    for name, job in jobs.items():
        state = slurm.wait(job)
        note(f"{name} {state.lower()}")
        assert state == "COMPLETED", places[name].log(job)
        print(places[name].log(job).splitlines()[-1])
    return Story(runs, {name: slurm.show(job)["Restarts"] for name, job in jobs.items()}, last_step)


@pytest.mark.parametrize(
    ("name", "restarts", "ranks", "rtol"),
    [
        ("srun", "1", [2, 2], 0.0),
        ("mpirun", "1", [2, 2], 0.0),
        ("srun on one", "0", [2, 1], 1e-10),
    ],
)
def test_an_interrupted_run_ends_like_the_one_that_was_left_alone(
    story, name, restarts, ranks, rtol
):
    run, calm = story.runs[name], story.runs["calm"]
    assert (story.restarts[name], story.restarts["calm"]) == (restarts, "0")
    assert (run / "DONE").exists()
    starts = {folder: read_json(folder / "provenance.json")["starts"] for folder in (run, calm)}
    assert [start["n_ranks"] for start in starts[run]] == ranks
    assert [start["n_ranks"] for start in starts[calm]] == [2]
    steps = [record["step"] for record in read_metrics(run)]
    assert steps == list(range(1, story.last_step + 1))
    left, right = checkpoints(run)[-1], checkpoints(calm)[-1]
    assert left.name == right.name == f"step-{story.last_step:06d}.h5"
    assert_equal(left, right, rtol=rtol)
