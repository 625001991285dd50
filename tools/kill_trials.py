#!/usr/bin/env python3
"""Kill a training run again and again, at random moments, and see whether anything is lost.

    tools/kill_trials.py [--trials N] [--ranks N] [--seed N]

Every trial resumes the run, waits for it to train, and kills one of its ranks by SIGKILL: the job
has to end by itself with a non-zero exit status, and the newest checkpoint may be at most one
interval behind the last step that was recorded. At last the run is let go to its end, and must
have the same bits as one that was never killed. Checkpoints are saved every few steps, so that many
kills meet one half written. Needs tools/setup.sh and `nodepint data prepare lotka_volterra`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
EVERY = 5
OPTIONS = [
    "time.fine.n_steps=2", "network.width=8", f"output.checkpoint_every={EVERY}",
    "output.log_every=1",
]  # fmt: skip
STARTS_WITHIN_S, ENDS_WITHIN_S, MOST_WAIT_S = 600.0, 30.0, 1.0
FOR_EVER = 1_000_000


def start(run: Path, n_ranks: int, n_steps: int) -> "subprocess.Popen[bytes]":
    """Begin the run, or go on with it; each rank leaves its process id beside it."""
    resume = ["--resume", "auto"] if run.exists() else []
    sets = [word for option in OPTIONS for word in ("--set", option)]
    noted = 'echo $$ > "$0-${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}.pid"; exec "$@"'
    train = [sys.executable, "-m", "nodepint_mpi", "train", "configs/quickstart.toml"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            ["mpirun", "-n", str(n_ranks), "sh", "-c", noted, str(run), *train,
             "--out", str(run), *resume, *sets, "--set", f"run.n_steps={n_steps}"],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


def recorded(run: Path) -> int:
    """The last step whose record is whole."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "ckpt").glob("step-*.h5"))


def failed(run: Path, why: str) -> SystemExit:
    log = run.with_suffix(".log").read_text(errors="replace")
    return SystemExit("\n".join([*log.splitlines()[-20:], f"kill_trials.py: {why}"]))


def kill_one(run: Path, n_ranks: int, rng: random.Random) -> str:
    """One trial; a line about it."""
    last = int(checkpoints(run)[-1].stem.removeprefix("step-")) if run.exists() else 0
    before, job = recorded(run), start(run, n_ranks, FOR_EVER)
    deadline = time.monotonic() + STARTS_WITHIN_S
    # What was recorded after the last checkpoint goes when the run is resumed.
    while not checkpoints(run) or recorded(run) in (before, *range(last + 1)):
        if job.poll() is not None or time.monotonic() > deadline:
            job.kill()
            raise failed(run, "the run does not train")
        time.sleep(0.02)
    time.sleep(rng.uniform(0, MOST_WAIT_S))
    rank = rng.randrange(n_ranks)
    os.kill(int(Path(f"{run}-{rank}.pid").read_text()), signal.SIGKILL)
    began = time.monotonic()
    try:
        status = job.wait(ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        job.kill()
        raise failed(run, f"the job went on for {ENDS_WITHIN_S:g} s") from None
    seconds = time.monotonic() - began
    step, saved = recorded(run), int(checkpoints(run)[-1].stem.removeprefix("step-"))
    half = len(list((run / "ckpt").glob("*.partial")))
    if status == 0:
        raise failed(run, "a rank was killed, and the job's exit status is 0")
    if step - saved > EVERY:
        raise failed(run, f"step {step} was recorded, the newest checkpoint is of step {saved}")
    return f"rank {rank} at step {step}: checkpoint {saved}, {half} half written, {seconds:.1f} s"


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of every array, by name."""
    found: dict[str, bytes] = {}

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = np.asarray(item[()]).tobytes()

    with h5py.File(path) as file:
        file.visititems(take)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kill-trials-") as folder:
        run, calm = Path(folder) / "killed", Path(folder) / "calm"
        for trial in range(options.trials):
            print(
                f"{trial + 1} of {options.trials}: {kill_one(run, options.ranks, rng)}", flush=True
            )
        n_steps = recorded(run) + 2 * EVERY
        for one in (run, calm):
            if start(one, options.ranks, n_steps).wait() != 0:
                raise failed(one, "the run does not come to its end")
        left, right = (contents(checkpoints(one)[-1]) for one in (run, calm))
        if differing := [name for name in left | right if left.get(name) != right.get(name)]:
            raise SystemExit(f"the killed run differs from the calm one in {differing}")
    print(f"{options.trials} of {options.trials}: nothing lost; {n_steps} steps, equal to the bit")


if __name__ == "__main__":
    main()
