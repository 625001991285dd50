"""A real SLURM for the tests: the throwaway cluster of tools/, a repository in it, and its jobs."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.small_case import QUICK

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
TOOL = ROOT / "tools" / "slurm_cluster.py"
ENDED = "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"
MPIRUN = 'export LAUNCH="mpirun" SBATCH_SIGNAL=B:USR1@120\n'  # as site.example.sh has it

ENVIRONMENT = QUICK | {
    # Every node pretends to have more cores than there are.
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


class Slurm:
    """The commands of a running cluster."""

    def __init__(self, conf: str):
        foreign = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "SBATCH_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.environment = clean | ENVIRONMENT | {"SLURM_CONF": conf}

    def ask(self, *command: object, cwd: Path | None = None) -> str:
        """What a command prints; it has to succeed."""
        done = subprocess.run(
            [*map(str, command)],
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """All that SLURM knows of a job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED ..."""
        return self.show(job)["JobState"]

    def wait(self, job: str, *states: str, limit_s: float = 280) -> str:
        """Wait until a job is in one of the states, by default one that is for good; return it."""
        states = states or ENDED
        deadline = time.monotonic() + limit_s
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"{state}, not {states}, after {limit_s:g} s"
            time.sleep(0.2)
        return state


class Repository:
    """A folder from which jobs can be submitted."""

    def __init__(self, slurm: Slurm, folder: Path, *, site: str = "", nodepint: str | None = None):
        """With more lines for site.sh, and a Python program in nodepint's place."""
        self.slurm = slurm
        self.folder = folder
        for name in ("jobs", "tools", "configs"):
            (folder / name).mkdir(parents=True)
        for path in JOBS.glob("*.sbatch"):
            shutil.copy(path, folder / "jobs")
        text = (JOBS / "site.example.sh").read_text()
        (folder / "jobs" / "site.sh").write_text(text + site)
        shutil.copy(ROOT / "tools" / "env.sh", folder / "tools")
        if nodepint is None:
            (folder / ".venv").symlink_to(sys.prefix)
        else:
            stand_in = folder / ".venv" / "bin" / "nodepint"
            stand_in.parent.mkdir(parents=True)
            stand_in.write_text(f"#!{sys.executable}\n{nodepint}")
            stand_in.chmod(0o755)

    def submit(self, *words: object) -> str:
        """`. jobs/site.sh && sbatch ...`, as the templates say; the job's number."""
        command = '. jobs/site.sh && exec sbatch --parsable "$@"'
        said = self.slurm.ask("bash", "-c", command, "bash", *words, cwd=self.folder)
        match = re.fullmatch(r"(\d+)\n", said)
        assert match, said
        return match[1]

    def log(self, job: str) -> str:
        """What a job has printed."""
        path = self.folder / f"slurm-{job}.log"
        return path.read_text() if path.exists() else ""


@contextmanager
def cluster(n_nodes: int) -> Iterator[Slurm]:
    """Bring a cluster up; it goes down with this process, however that ends: its stdin closes."""
    words = "sh", "-c", 'echo "$SLURM_CONF" && exec cat'
    with subprocess.Popen(
        [sys.executable, TOOL, f"--nodes={n_nodes}", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        conf = process.stdout.readline().strip()
        assert conf, "the cluster has not come up: it says why on standard error"
        yield Slurm(conf)
        process.stdin.close()
        assert process.wait(60) == 0
