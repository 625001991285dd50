"""A program whose ranks step together under the watchdog until one of them fails."""

PROLOGUE = """
import os, signal, subprocess, sys, time
import jax, jax.numpy as jnp, mpi4jax
from mpi4py import MPI
from nodepint_mpi.errors import DataError, NodepintError
from nodepint_mpi.parallel.comms import make_comms, world
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.ranks.guard import run_guarded
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.ranks.watchdog import Watchdog

comms = make_comms(world())
rank, size = comms.time.rank, comms.time.size
guilty = int(sys.argv[1])

@jax.jit
def add(x):
    return mpi4jax.allreduce(x, op=MPI.SUM, comm=comms.time.mpi)

def step(watchdog, k):
    with watchdog.phase("training step", collective=True, step=k):
        add(jnp.ones(3)).block_until_ready()

def failing():
    print("FAILS", time.time(), flush=True)

def main():
    with Watchdog(comms.control) as watchdog:
        for k in range(5):
            step(watchdog, k)
"""
EPILOGUE = """
    return 0

sys.exit(run_guarded(main))
"""


def failing_program(body: str, **limits: float) -> str:
    """The program: five steps, then `body`, which knows `rank`, `guilty`, `step` and `failing`.

    Its first argument is the guilty rank. `limits` are the watchdog's.
    """
    arguments = "".join(f", {name}={value}" for name, value in limits.items())
    prologue = PROLOGUE.replace("Watchdog(comms.control", "Watchdog(comms.control" + arguments)
    return prologue + body + EPILOGUE
