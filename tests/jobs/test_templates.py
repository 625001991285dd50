"""Every template in a real SLURM, on CPUs and GPUs, under srun and mpirun."""

import json
import os
import re

import pytest

from tests.cli.small_case import read_json, wait_for
from tests.jobs.real_slurm import JOBS, MPIRUN, Repository

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(400)]

# In nodepint's place: every rank notes how it was started, the first writes what is asked for.
NOTE = """
import json, os, sys
from pathlib import Path

words, env = sys.argv[1:], os.environ
rank = int(env.get("PMIX_RANK", -1))
size = int(env.get("OMPI_COMM_WORLD_SIZE") or env["SLURM_NTASKS"]) if rank >= 0 else 0
names = "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
note = {"words": words, "rank": rank, "size": size} | {name: env.get(name) for name in names}
with open("notes", "a") as file:
    file.write(json.dumps(note) + "\\n")
options = dict(zip(words, words[1:]))
if "--json" in options and not Path(options["--json"]).parent.is_dir():
    sys.exit(2)  # as nodepint does, before it starts
if "--out" in options and rank == 0:
    Path(options["--out"]).mkdir(parents=True)
    (Path(options["--out"]) / "DONE").touch()
if "--json" in options and rank == 0:
    Path(options["--json"]).touch()
"""


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
@pytest.mark.parametrize("gpus", [0, 1])
def test_every_template_starts_the_ranks_it_should(repository, slurm, gpus, launcher):
    site = MPIRUN if launcher == "mpirun" else ""
    switch = "# export SBATCH_GPUS_PER_TASK=1"
    place = repository(site=site, nodepint=NOTE)
    path = place.folder / "jobs" / "site.sh"
    assert switch in path.read_text()
    if gpus:
        path.write_text(path.read_text().replace(switch, switch.removeprefix("# ")))
    sweep = "--set run.seed=1\n--set run.seed=2 --set optim.learning_rate=0.1\n"
    (place.folder / "sweep.txt").write_text(sweep)
    options = "--ntasks=2", "--cpus-per-task=2", "--nodes=1"
    jobs = {
        "smoke": place.submit(*options, "jobs/smoke.sbatch"),
        "train": place.submit(*options, "jobs/train.sbatch", "c.toml", "runs/t", "--set", "a=1"),
        "scaling": place.submit(*options, "jobs/scaling.sbatch", "s.toml", "--out", "runs/s"),
        "array": place.submit(
            *options, "--array=1-2", "jobs/array.sbatch", "c.toml", "sweep.txt", "runs/a"
        ),
    }
    logs = {name: place.folder / f"slurm-{job}.log" for name, job in jobs.items()}
    logs["array"] = place.folder / f"slurm-{jobs['array']}_2.log"
    for name, job in jobs.items():
        state = slurm.wait(f"{job}_2" if name == "array" else job)
        assert state == "COMPLETED", logs[name].read_text()
    slurm.wait(f"{jobs['array']}_1")
    notes = [json.loads(line) for line in (place.folder / "notes").read_text().splitlines()]
    start = "srun --mpi=pmix --kill-on-bad-exit=1 -n {ranks} -c {cores}"
    start = "mpirun -n {ranks}" if launcher == "mpirun" else start
    alone = [note["words"] for note in notes if note["rank"] < 0]
    assert sorted(alone) == [
        ["data", "prepare", "lotka_volterra"],
        ["scaling", "s.toml", "--only-ranks", "2", "--launcher", start, "--out", "runs/s"],
    ]

    ranks = [note for note in notes if note["rank"] >= 0]
    started = {" ".join(note["words"]) for note in ranks}
    smoke = f"runs/smoke-{jobs['smoke']}"
    assert started == {
        "doctor --mpi",
        f"train configs/quickstart.toml --out {smoke} --set run.n_steps=50",
        f"evaluate {smoke} --json {smoke}/scores.json",
        "train c.toml --out runs/t --set a=1",
        "train c.toml --out runs/a/1 --set run.seed=1",
        "train c.toml --out runs/a/2 --set run.seed=2 --set optim.learning_rate=0.1",
    }
    for words in started:
        group = [note for note in ranks if " ".join(note["words"]) == words]
        assert [note["size"] for note in group] == [2, 2], words
        assert sorted(note["rank"] for note in group) == [0, 1]
        assert {note["OMP_NUM_THREADS"] for note in group} == {"2"}
        assert {note["JAX_PLATFORMS"] for note in group} == {"cuda,cpu" if gpus else "cpu"}
        seen = [note["CUDA_VISIBLE_DEVICES"] for note in group]
        if not gpus:
            continue  # an exclusive job is given all GPUs of a node, and leaves them alone
        if launcher == "srun":  # one for each rank
            assert sorted(seen) == ["0", "1"]
        else:  # those of the job: the rank takes its own
            assert set(seen) == {"0,1"}


# In nodepint's place: stopped by the signal it leaves a checkpoint; when it resumes it is done.
STOPPED = """
import os, signal, sys
from pathlib import Path

run = Path(sys.argv[sys.argv.index("--out") + 1])
rank = int(os.environ["PMIX_RANK"])
if "--resume" in sys.argv:
    (run / "DONE").touch()
    sys.exit()
(run / "ckpt").mkdir(parents=True, exist_ok=True)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
(run / f"waits-{rank}").touch()
signal.sigwait([signal.SIGUSR1])
(run / "ckpt" / "step-000001.h5").touch()
"""


def test_one_task_of_an_array_is_queued_again_alone(repository, slurm):
    place = repository(nodepint=STOPPED)
    (place.folder / "sweep.txt").write_text("--set run.seed=1\n" * 3)
    job = place.submit(
        "--ntasks=1", "--array=1-3", "jobs/array.sbatch", "c.toml", "sweep.txt", "runs"
    )
    tasks = [f"{job}_{n}" for n in (1, 2, 3)]
    waits = [place.folder / "runs" / str(n) / "waits-0" for n in (1, 2, 3)]
    wait_for(lambda: all(path.exists() for path in waits), limit_s=60)
    assert slurm.show(tasks[2])["JobId"] == job  # the last one has the id of the array
    slurm.ask("scancel", "--signal=USR1", tasks[2])
    wait_for(lambda: slurm.show(tasks[2])["Restarts"] == "1", limit_s=60)
    assert [slurm.state(task) for task in tasks[:2]] == ["RUNNING", "RUNNING"]
    for task in tasks[:2]:
        slurm.ask("scancel", task)
    # SLURM holds what it queues again for two minutes; it is enough that it is queued, alone.
    assert [slurm.show(task)["Restarts"] for task in tasks] == ["0", "0", "1"]
    assert slurm.state(tasks[2]) in ("PENDING", "RUNNING", "COMPLETED")
    slurm.ask("scancel", tasks[2])


def test_an_array_task_without_a_line_fails(repository, slurm):
    place = repository(nodepint=NOTE)
    (place.folder / "sweep.txt").write_text("--set run.seed=1\n")
    job = place.submit("--array=2", "jobs/array.sbatch", "c.toml", "sweep.txt", "runs")
    assert slurm.wait(f"{job}_2") == "FAILED"
    assert "sweep.txt has no line 2" in (place.folder / f"slurm-{job}_2.log").read_text()
    assert not (place.folder / "notes").exists()


def test_the_interactive_recipe(repository, slurm):
    text = (JOBS / "interactive.md").read_text()
    allocate, use = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    place = repository(site="export SBATCH_GPUS_PER_TASK=1\n", nodepint=NOTE)
    (place.folder / "use.sh").write_text(use)
    typed = f"set -eu\n{allocate.rstrip()} bash -eu use.sh"  # as if typed into the shell it opens
    slurm.ask("bash", "-c", typed, cwd=place.folder)
    notes = [json.loads(line) for line in (place.folder / "notes").read_text().splitlines()]
    commands = [note["words"][0] for note in notes]
    assert commands == ["doctor", "doctor", "train", "train", "evaluate"]
    assert {note["CUDA_VISIBLE_DEVICES"] for note in notes[:2]} == {"0", "1"}


def test_smoke_with_the_real_nodepint(case, slurm, tmp_path):
    # As users have it, without the switches with which the other tests compile faster.
    site = "unset JAX_DISABLE_MOST_OPTIMIZATIONS XLA_FLAGS\n"
    place = Repository(slurm, tmp_path / "repository", site=site)
    (place.folder / "configs" / "quickstart.toml").write_text(case.config.read_text())
    (place.folder / "data" / "lotka_volterra" / "prepared").mkdir(parents=True)  # it has its own
    job = place.submit("--ntasks=2", "jobs/smoke.sbatch")
    assert slurm.wait(job) == "COMPLETED", place.log(job)
    run = place.folder / "runs" / f"smoke-{job}"
    assert "all good" in place.log(job)
    assert place.log(job).endswith(f"all is well: see runs/smoke-{job}/trajectories.png\n")
    assert (run / "trajectories.png").exists()
    (start,) = read_json(run / "provenance.json")["starts"]
    assert start["n_ranks"] == 2
    assert read_json(run / "scores.json")["step"] == 50


STUDY = """
config = "configs/tiny.toml"
n_steps = 12

[[study]]
name = "strong"
ranks = [2]
"""


def test_a_scaling_study_submits_its_jobs(case, repository, slurm):
    place = repository()
    (place.folder / "configs" / "tiny.toml").write_text(case.config.read_text())
    (place.folder / "study.toml").write_text(STUDY)
    typed = ". jobs/site.sh && . tools/env.sh && exec nodepint scaling study.toml"
    said = slurm.ask("bash", "-c", f"{typed} --submit", cwd=place.folder)
    files = "runs/scaling/study/jobs/ranks-2"
    match = re.search(rf"^2 ranks: job (\d+), {files}.sbatch$", said, re.MULTILINE)
    assert match, said
    again = slurm.ask("bash", "-c", f"{typed} --submit", cwd=place.folder)
    assert f"2 ranks: job {match[1]} is in the queue" in again
    log = place.folder / f"{files}.log"
    assert slurm.wait(match[1]) == "COMPLETED", log.read_text()
    assert "strong, ranks-2: finished" in log.read_text()
    said = slurm.ask("bash", "-c", f"{typed} --report", cwd=place.folder)
    time = r"\d" if len(os.sched_getaffinity(0)) > 1 else "cores are shared"
    assert re.search(rf"^\| 2 +\| {time}", said, re.MULTILINE), said
