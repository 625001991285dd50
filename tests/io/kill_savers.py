"""Start processes that save checkpoints and kill them: at named points, or at random moments.

A script for test_checkpoint_failures.py: `kill_savers.py FOLDER N_RANDOM module:name:count ...`.
Each process gets its own folder, saves step 1 whole and dies in a later step. All are forked from
this one, which has imported everything but has not started MPI, so each takes a fraction of a
second. Prints one JSON line for each: its folder, and the last step it knew to be saved.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import mpi4py

mpi4py.rc.initialize = False

from mpi4py import MPI  # noqa: E402

from nodepint_mpi.parallel.comms import alone  # noqa: E402
from tests.io.checkpoint_case import save  # noqa: E402


def save_on(folder: Path, step: int, tell: int) -> None:
    save(alone(), folder, step, plain=True)
    os.write(tell, bytes([step]))


def save_until_point(folder: Path, point: str, tell: int) -> None:
    """Save steps 1 and 2; die at the given call of a function in step 2."""
    module_name, name, count = point.split(":")
    save_on(folder, 1, tell)
    module, calls = importlib.import_module(module_name), []
    original = getattr(module, name)

    def die(*args, **options):
        calls.append(name)
        if len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(module, name, die)
    save_on(folder, 2, tell)


def save_for_ever(folder: Path, tell: int) -> None:
    for step in range(1, 256):
        save_on(folder, step, tell)


def run(folder: Path, point: str | None) -> None:
    """One process, from start to kill."""
    folder.mkdir()
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        MPI.Init()
        if point is None:
            save_for_ever(folder, tell)
        else:
            save_until_point(folder, point, tell)
        os._exit(0)  # not reached
    os.close(tell)
    saved = os.read(hear, 1)
    if point is None:
        time.sleep(random.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
    saved += b"".join(iter(lambda: os.read(hear, 100), b""))
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    print(json.dumps({"folder": str(folder), "saved": max(saved), "killed": killed}), flush=True)


if __name__ == "__main__":
    base, n_random, *points = sys.argv[1:]
    for number, point in enumerate([*points, *[None] * int(n_random)]):
        run(Path(base) / str(number), point)
