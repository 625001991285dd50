"""How many messages a solve and its gradient send: none is dropped, hoisted or sent twice.

JAX drops effects whose results a rank does not use from differentiated loops, without a word; a
count of the calls that are really made is the only guard.
"""

import re
import sys
from collections import Counter

import pytest

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(400)]

N_RANKS = 3
CASES = {
    "2 sweeps": "loss(jnp.ones(2), 2)",
    "3 sweeps": "loss(jnp.ones(2), 3)",
    "2 sweeps and back": "jax.grad(loss)(jnp.ones(2), 2)",
}
SCRIPT = """
import ctypes, os
from mpi4py import MPI

name = "{folder}/rank-%d.log" % MPI.COMM_WORLD.Get_rank()
log = os.open(name, os.O_CREAT | os.O_WRONLY)
os.dup2(log, 1)  # a file each: mpirun may mix the lines of ranks
os.dup2(log, 2)

import jax, jax.numpy as jnp, numpy as np
import diffrax
import nodepint_mpi as nm

def loss(u0, sweeps):
    solution = nm.solve(
        lambda t, u, args: -u, u0, np.linspace(0.0, 1.0, 8),
        fine=nm.FixedSteps(nm.RK4(), 4), coarse=nm.FixedSteps(diffrax.Euler(), 1),
        method="parareal", stopping=nm.FixedSweeps(sweeps), adjoint_tol=1e-30,
    )
    return jnp.sum(solution.interface)

for name, run in {{{cases}}}.items():
    print("case", name, flush=True)
    jax.block_until_ready(run())
    ctypes.CDLL(None).fflush(None)  # what C has printed stands before the next case
"""
CALL = re.compile(r"\| MPI_(\w+) (?!done)")  # the line that begins a call


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder for what each rank printed; the first test to need it runs all cases."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture
def calls(mpirun, logs):
    """Calls by name on each rank: `first, middle, last = calls("2 sweeps")`."""
    script = logs / "script.py"
    if not script.exists():
        cases = ", ".join(f"{name!r}: lambda: {run}" for name, run in CASES.items())
        script.write_text(SCRIPT.format(folder=logs, cases=cases))
        done = mpirun(
            N_RANKS, sys.executable, "-m", "mpi4py", script, env={"MPI4JAX_DEBUG": "1"},
            timeout_s=180,
        )  # fmt: skip
        (logs / "job.txt").write_text(f"{done.returncode}\n{done.stdout}{done.stderr}")

    def count(case) -> list[Counter]:
        texts = [(logs / f"rank-{rank}.log").read_text() for rank in range(N_RANKS)]
        assert (logs / "job.txt").read_text() == "0\n", texts
        own = [re.split(r"^case (.*)$", text, flags=re.MULTILINE) for text in texts]
        parts = [dict(zip(words[1::2], words[2::2], strict=True)) for words in own]
        assert all(part.keys() == CASES.keys() for part in parts), texts
        return [Counter(name.lower() for name in CALL.findall(part[case])) for part in parts]

    return count


@pytest.mark.parametrize("sweeps", [2, 3])
def test_each_sweep_sends_one_state_to_the_right(calls, sweeps):
    first, middle, last = calls(f"{sweeps} sweeps")
    chain = 1 + sweeps  # the coarse solution, then one correction a sweep
    assert (first["send"], first.get("recv", 0)) == (chain, 0)
    assert (middle["send"], middle["recv"]) == (chain, chain)
    assert (last.get("send", 0), last["recv"]) == (0, chain)
    reductions = 2 + 2 * sweeps  # guards, jumps and updates of a sweep, what was counted
    assert [calls["allreduce"] for calls in (first, middle, last)] == [reductions] * 3


def test_the_adjoint_sends_one_cotangent_to_the_left_a_sweep(calls):
    forward, both = calls("2 sweeps"), calls("2 sweeps and back")
    extra = [
        {name: of.get(name, 0) - before.get(name, 0) for name in ("send", "recv", "allreduce")}
        for of, before in zip(both, forward, strict=True)
    ]
    chain = extra[1]["send"]  # the coarse adjoint, then one correction a sweep
    assert chain >= 3
    assert [calls["send"] for calls in extra] == [0, chain, chain]
    assert [calls["recv"] for calls in extra] == [chain, chain, 0]
    assert [calls["allreduce"] for calls in extra] == [chain] * 3
