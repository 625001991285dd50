"""Job files for SLURM, one for each number of ranks, and their submission.

Importing this module loads neither MPI nor JAX.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from nodepint_mpi.bench.studies.runs import Run
from nodepint_mpi.errors import ConfigError, OutputError
from nodepint_mpi.io.directory import write_text

TEMPLATE = "jobs/scaling.sbatch"
JOBS = "jobs"
ASKING_S = 60.0


def write_jobs(
    points: Sequence[Run], study_file: Path, out: Path, template: Path, options: Sequence[str]
) -> dict[int, Path]:
    """A job file for each number of ranks of which a point is to be done. Local.

    Args:
        points: All of them.
        study_file: Where they come from.
        out: Their folder; the job files go to OUT/jobs.
        template: What the job files are made of.
        options: Of `nodepint scaling`, for all jobs.

    Returns:
        The files by number of ranks.

    Raises:
        ConfigError: if the template has no place for what differs.
        OutputError: if they cannot be written.
    """
    try:
        text = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"Cannot read the template {template}: {reason}.") from error
    todo = {p.n_ranks: p.n_cores for p in points if p.chosen and p.state() != "finished"}
    folder, files = out / JOBS, {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}.") from error
    words = shlex.join([str(study_file), "--out", str(out), *options])
    for n_ranks, n_cores in sorted(todo.items()):
        name = f"ranks-{n_ranks}"
        lines = {
            "job-name": f"scaling-{n_ranks}",
            "ntasks": str(n_ranks),
            "cpus-per-task": str(n_cores),
            "output": str(folder / f"{name}.log"),
        }
        files[n_ranks] = folder / f"{name}.sbatch"
        write_text(files[n_ranks], fill_template(text, lines, words, template))
    return files


def fill_template(text: str, lines: dict[str, str], words: str, template: Path) -> str:
    """A template with other values after `#SBATCH`, and with its own words of the command. Local.

    Raises:
        ConfigError: if it has not each of these lines once.
    """
    for name, value in lines.items():
        text, n_found = re.subn(
            rf"^#SBATCH --{name}=.*$", lambda _, n=name, v=value: f"#SBATCH --{n}={v}", text,
            flags=re.MULTILINE,
        )  # fmt: skip
        if n_found != 1:
            raise ConfigError(f"{template} must have one line `#SBATCH --{name}=...`.")
    *head, last = re.split(r"^(?=set -euo pipefail$)", text, maxsplit=1, flags=re.MULTILINE)
    if not head:
        raise ConfigError(f"{template} must have a line `set -euo pipefail`.")
    return f"{head[0]}set -- {words}\n{last}"


def submit_jobs(files: dict[int, Path], report: Callable[[str], None]) -> dict[int, str]:
    """Submit job files, but for those whose last job is still in the queue. Local.

    Returns:
        The jobs' numbers by number of ranks.

    Raises:
        ConfigError: if there is no sbatch, or it refuses a job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "There is no sbatch on the PATH: `--submit` is for SLURM. With `--dry-run` it only "
            "writes the job files."
        )
    jobs = {}
    for n_ranks, file in files.items():
        note = file.with_suffix(".job")
        before = note.read_text(encoding="utf-8").strip() if note.exists() else ""
        if before and _ask("squeue", "--noheader", "--format=%i", "--jobs", before)[1].strip():
            jobs[n_ranks] = before
            report(f"{n_ranks} ranks: job {before} is in the queue")
            continue
        code, said, error = _ask("sbatch", "--parsable", str(file))
        if code != 0:
            raise ConfigError(f"sbatch refused {file}: {' '.join(error.split()) or code}.")
        jobs[n_ranks] = said.strip().partition(";")[0]  # NUMBER, or NUMBER;CLUSTER
        write_text(note, jobs[n_ranks] + "\n")
        report(f"{n_ranks} ranks: job {jobs[n_ranks]}, {file}")
    return jobs


def _ask(*words: str) -> tuple[int, str, str]:
    """Exit status, what was said, and on standard error."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ASKING_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, done.stderr
