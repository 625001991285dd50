"""The job templates as texts, and run by bash with stand-ins for SLURM's commands.

What a real SLURM does with them is tested beside; here is what would take it long or is rare.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import click
import pytest

from nodepint_mpi.cli.main import cli

pytestmark = pytest.mark.mpi(max_size=1)

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
TEMPLATES = sorted(JOBS.glob("*.sbatch"))
SCRIPTS = [*TEMPLATES, *sorted(JOBS.glob("*.sh"))]
FORBIDDEN = r"account|partition|qos|reservation|nodelist|constraint|mail-user|clusters"
LIMIT_LINES = 40

# Notes its arguments, a line each, and a line of dashes; then does what the test says.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/}" "$@" -- >>"$NOTES"
printf 'OMP_NUM_THREADS=%s\\n' "${OMP_NUM_THREADS-}" >>"$NOTES.env"
[ "${0##*/}" != srun ] || eval "$RANKS_DO"
[ "${0##*/}" != scontrol ] || exit "$SCONTROL_EXITS"
"""
# A rank's side of the bargain: wait for the signal, then leave with 0 and a checkpoint.
WAIT_FOR_USR1 = """
trap 'mkdir -p runs/x/ckpt; touch runs/x/ckpt/step-000007.h5; touch stopped; exit 0' USR1
touch waiting
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_name_no_site(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    text = script.read_text()
    assert len(text.splitlines()) <= LIMIT_LINES
    active = [line for line in text.splitlines() if not re.match(r"#($|[^!S])", line)]
    assert not re.search(rf"--?({FORBIDDEN})\b|module load|\S@\S+\.\S", "\n".join(active))
    assert not re.search(
        r"(^|[\s=\"'])/(?!usr/bin/env|dev/null)\w", "\n".join(active), re.MULTILINE
    )


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_say_how_to_submit_and_what_slurm_needs(template):
    text = template.read_text()
    header = text[: text.index("#SBATCH")]
    assert re.search(
        rf"^# +\. jobs/site\.sh && sbatch .*jobs/{template.name}", header, re.MULTILINE
    )
    assert "#SBATCH --open-mode=append" in text


@pytest.mark.parametrize("name", ["train", "array"])
def test_the_signal_reaches_all_ranks(name):
    text = (JOBS / f"{name}.sbatch").read_text()
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", text, re.MULTILINE)  # not B: the shell alone
    assert "#SBATCH --requeue" in text
    assert re.search(
        r"LAUNCH=.mpirun.*SBATCH_SIGNAL=B:USR1@", (JOBS / "site.example.sh").read_text()
    )


def test_the_table_has_every_file():
    text = (JOBS / "README.md").read_text()
    for path in [*SCRIPTS, *JOBS.glob("*.md")]:
        if path.name not in ("site.sh", "README.md"):  # the user's own, and itself
            assert f"| `{path.name}` |" in text


class Cluster:
    """A folder that looks like the repository, and stand-ins on the PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.notes = folder / "notes"
        for name in ("jobs", "tools", "bin"):
            (folder / name).mkdir()
        for path in TEMPLATES:
            shutil.copy(path, folder / "jobs")
        shutil.copy(JOBS / "site.example.sh", folder / "jobs" / "site.sh")
        shutil.copy(ROOT / "tools" / "env.sh", folder / "tools")
        for name in ("srun", "scontrol", "nodepint"):
            (folder / "bin" / name).write_text(STAND_IN)
            (folder / "bin" / name).chmod(0o755)

    def start(
        self,
        template: str,
        *arguments: str,
        ranks_do: str = "",
        restarts: int | None = None,
        scontrol_exits: int = 0,
        **more: str,
    ):
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "RANKS_DO": ranks_do,
            "SCONTROL_EXITS": str(scontrol_exits),
            "SLURM_JOB_ID": "42",
            "SLURM_NTASKS": "2",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_JOB_NODELIST": "n[1-2]",
        } | more
        if restarts is not None:
            environment["SLURM_RESTART_COUNT"] = str(restarts)
        return subprocess.Popen(
            ["bash", f"jobs/{template}", *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments, **options) -> tuple[int, str]:
        job = self.start(*arguments, **options)
        said, _ = job.communicate(timeout=30)
        return job.returncode, said

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of a stand-in."""
        calls = self.notes.read_text().split("\n--\n") if self.notes.exists() else []
        return [words[1:] for words in map(str.splitlines, calls) if words and words[0] == name]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


TRAIN = "train.sbatch", "configs/x.toml", "runs/x"
DONE = "mkdir -p runs/x; touch runs/x/DONE"
STOP = "mkdir -p runs/x/ckpt; touch runs/x/ckpt/step-000007.h5"


def test_a_finished_run_ends_the_job(cluster):
    code, said = cluster.run(*TRAIN, ranks_do=DONE)
    assert code == 0
    assert cluster.calls("scontrol") == []
    assert "job 42, restart 0, 2 ranks on n[1-2], commit" in said
    assert "OMP_NUM_THREADS=3" in (cluster.folder / "notes.env").read_text()


def test_a_stopped_run_is_queued_again_and_resumes(cluster):
    code, _ = cluster.run(*TRAIN, "--set", "run.n_steps=9", ranks_do=STOP)
    assert code == 0
    assert cluster.calls("scontrol") == [["requeue", "42"]]
    code, said = cluster.run(*TRAIN, "--set", "run.n_steps=9", ranks_do=DONE, restarts=1)
    assert code == 0
    assert "restart 1" in said
    assert len(cluster.calls("scontrol")) == 1
    first, second = cluster.calls("srun")
    assert "--resume" not in first
    assert second[second.index("--resume") + 1] == "auto"
    assert first[-2:] == second[-2:] == ["--set", "run.n_steps=9"]


def test_an_array_task_is_queued_again_by_its_own_name(cluster):
    array = {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "7"}  # the last has the array's id
    assert cluster.run(*TRAIN, ranks_do=STOP, **array)[0] == 0
    assert cluster.calls("scontrol") == [["requeue", "42_7"]]


def test_a_run_that_cannot_be_queued_again_fails_and_keeps_its_checkpoint(cluster):
    code, said = cluster.run(*TRAIN, ranks_do=STOP, scontrol_exits=3)
    assert code == 1
    assert said.endswith(
        "job 42 is not finished and cannot be requeued: its checkpoint is in runs/x, submit it "
        "again\n"
    )
    assert (cluster.folder / "runs/x/ckpt/step-000007.h5").exists()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_no_template_touches_a_job_by_an_id_that_may_be_an_array(template):
    lines = [line for line in template.read_text().splitlines() if not line.startswith("#")]
    assert not re.search(r"(scontrol|scancel)[^|&;]*SLURM_\w*JOB_ID", "\n".join(lines))


def test_a_failed_run_is_left_for_the_user(cluster):
    code, _ = cluster.run(*TRAIN, ranks_do=f"{STOP}; exit 3")
    assert code == 3
    assert cluster.calls("scontrol") == []


@pytest.mark.parametrize(("restarts", "again"), [(19, True), (20, False)])
def test_the_number_of_restarts_is_bounded(cluster, restarts, again):
    code, said = cluster.run(*TRAIN, ranks_do=STOP, restarts=restarts)
    assert len(cluster.calls("scontrol")) == again
    assert code == (0 if again else 1)
    assert again or "not finished after 20 restarts" in said


def test_a_missing_argument_starts_nothing(cluster):
    code, said = cluster.run("train.sbatch", "configs/x.toml")
    assert code != 0
    assert "which RUN_DIR?" in said
    assert not cluster.notes.exists()


def test_the_batch_shell_passes_the_signal_on_and_waits_for_the_ranks(cluster):
    job = cluster.start(*TRAIN, ranks_do=WAIT_FOR_USR1)  # as with SBATCH_SIGNAL=B:USR1@120
    deadline = time.monotonic() + 20
    while not (cluster.folder / "waiting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=20)
    assert job.returncode == 0
    assert (cluster.folder / "stopped").exists()
    assert cluster.calls("scontrol") == [["requeue", "42"]]


def test_a_rank_that_dies_of_the_signal_fails_the_job(cluster):
    # Before its handler is there: bash repeats that status, as if the wait had been interrupted.
    code, _ = cluster.run(*TRAIN, ranks_do="kill -USR1 $$")
    assert code == 128 + signal.SIGUSR1
    assert cluster.calls("scontrol") == []


def test_a_failed_smoke_test_fails_the_job(cluster):
    code, _ = cluster.run("smoke.sbatch", ranks_do="exit 5")
    assert code == 5
    assert len(cluster.calls("srun")) == 1


def test_every_option_of_a_called_command_exists(cluster):
    cluster.run(*TRAIN, "--set", "run.n_steps=9", ranks_do=STOP)
    cluster.run(*TRAIN, ranks_do=DONE, restarts=1)  # with --resume
    cluster.run("smoke.sbatch")
    cluster.run("scaling.sbatch", "configs/x.toml", "--timeout", "60")
    cluster.run("table.sbatch", "--ranks", "1,2", "--only", "heat")
    calls = [words[words.index("nodepint") + 1 :] for words in cluster.calls("srun")]
    calls += cluster.calls("nodepint")
    assert len(calls) == 8
    for words in calls:
        command, context = cli, click.Context(cli)
        while isinstance(command, click.Group):
            name, found, words = command.resolve_command(context, list(words))
            assert found is not None, name
            command = found
        kept = [word for word in words if word != "--json"]  # its file is in a run directory
        if len(kept) < len(words):
            assert any("--json" in option.opts for option in command.params)
            del kept[-1]
        command.make_context(command.name, kept)
