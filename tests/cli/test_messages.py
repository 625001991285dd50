"""How many messages a solve and its gradient send: none is dropped, hoisted or sent twice.

JAX drops effects whose results a rank does not use from differentiated loops, without a word; a
count of the calls that are really made is the only guard.
"""

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(400)]

SCRIPT = """
import os
from mpi4py import MPI

name = "{folder}/rank-%d.log" % MPI.COMM_WORLD.Get_rank()
log = os.open(name, os.O_CREAT | os.O_WRONLY)
os.dup2(log, 1)  # a file each: mpirun may mix the lines of ranks
os.dup2(log, 2)

import jax, jax.numpy as jnp, numpy as np
import diffrax
import nodepint_mpi as nm

def loss(u0):
    solution = nm.solve(
        lambda t, u, args: -u, u0, np.linspace(0.0, 1.0, 8),
        fine=nm.FixedSteps(nm.RK4(), 4), coarse=nm.FixedSteps(diffrax.Euler(), 1),
        method="{method}", stopping=nm.FixedSweeps({sweeps}), adjoint_tol=1e-30,
    )
    return jnp.sum(solution.interface)

{run}
"""
CALL = re.compile(r"\| MPI_(\w+) (?!done)")  # the line that begins a call


def count_calls(mpirun, tmp_path, **options) -> list[Counter]:
    """Calls by name on each of 3 ranks."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    script = folder / "script.py"
    script.write_text(SCRIPT.format(folder=folder, **options))
    done = mpirun(
        3, sys.executable, "-m", "mpi4py", str(script), env={"MPI4JAX_DEBUG": "1"}, timeout_s=180
    )
    logs = [(folder / f"rank-{rank}.log").read_text() for rank in range(3)]
    assert done.returncode == 0, logs
    return [Counter(name.lower() for name in CALL.findall(log)) for log in logs]


@pytest.mark.parametrize("sweeps", [2, 3])
def test_each_sweep_sends_one_state_to_the_right(mpirun, tmp_path, sweeps):
    run = "jax.block_until_ready(loss(jnp.ones(2)))"
    first, middle, last = count_calls(mpirun, tmp_path, method="parareal", sweeps=sweeps, run=run)
    chain = 1 + sweeps  # the coarse solution, then one correction a sweep
    assert (first["send"], first.get("recv", 0)) == (chain, 0)
    assert (middle["send"], middle["recv"]) == (chain, chain)
    assert (last.get("send", 0), last["recv"]) == (0, chain)
    reductions = 1 + 2 * sweeps
    assert [calls["allreduce"] for calls in (first, middle, last)] == [reductions] * 3


def test_the_adjoint_sends_one_cotangent_to_the_left_a_sweep(mpirun, tmp_path):
    run = "jax.block_until_ready(jax.grad(loss)(jnp.ones(2)))"
    options = dict(method="parareal", sweeps=2)
    forward = count_calls(mpirun, tmp_path, run="loss(jnp.ones(2)).block_until_ready()", **options)
    both = count_calls(mpirun, tmp_path, run=run, **options)
    extra = [
        {name: calls.get(name, 0) - before.get(name, 0) for name in ("send", "recv", "allreduce")}
        for calls, before in zip(both, forward, strict=True)
    ]
    chain = extra[1]["send"]  # the coarse adjoint, then one correction a sweep
    assert chain >= 3
    assert [calls["send"] for calls in extra] == [0, chain, chain]
    assert [calls["recv"] for calls in extra] == [chain, chain, 0]
    assert [calls["allreduce"] for calls in extra] == [chain] * 3
