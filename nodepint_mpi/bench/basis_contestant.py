"""Sweeps whose tangents the ranks share, timed; in a process or job of its own: see `bench.basis`.

python -m nodepint_mpi.bench.basis_contestant REQUEST.json CORE,... solves as it is asked to, and
rank 0 prints the result as JSON. Each rank takes the core of its local rank, and one thread.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodepint_mpi.ranks.launcher import local_rank

if TYPE_CHECKING:
    import numpy as np

    from nodepint_mpi.parallel.iterate import TimeSolver

N_SLICES, RANK, N_SWEEPS = 8, 16, 2
"""Of the 32 slices of `bench.cases` the first ones; directions; sweeps. The directions are random,
so that all are in use from the start: one made of jumps may find fewer in the first sweeps."""


def make_case() -> "tuple[TimeSolver, np.ndarray, np.ndarray]":
    """Burgers on 1,024 points with exact tangents: solver, edges, initial state. Local."""
    import numpy as np

    from nodepint_mpi.bench.cases import SWEEP_CASES
    from nodepint_mpi.core.propagators import Propagator
    from nodepint_mpi.core.stopping import FixedSweeps
    from nodepint_mpi.parallel.iterate import TimeSolver
    from nodepint_mpi.parallel.methods.tangent import Tangent
    from nodepint_mpi.parallel.shared_basis import SharedBasis

    case = SWEEP_CASES["burgers_1024"]
    field = case.problem.field
    fine = Propagator(field, case.fine)
    basis = SharedBasis("random", rank=RANK)
    method = Tangent(basis, fine, Propagator(field, case.cheap), recycle=False)
    solver = TimeSolver(fine, method, FixedSweeps(N_SWEEPS), adjoint_tol=1e-10)
    edges = np.linspace(*case.problem.span, case.n_slices + 1)[: N_SLICES + 1]
    return solver, edges, case.problem.initial


def contend(n_repeats: int) -> dict[str, Any]:
    """Seconds of a solve on all ranks of the world, which share its tangents. Collective.

    The slowest rank's, after a solve that compiles; with the last state, to be compared.
    """
    import jax
    import jax.numpy as jnp

    from nodepint_mpi.bench.cases import SWEEP_CASES
    from nodepint_mpi.core.partition import own_slices
    from nodepint_mpi.parallel.comms import make_comms, world
    from nodepint_mpi.parallel.line import Line
    from nodepint_mpi.parallel.solve import solve_interface

    jax.config.update("jax_enable_x64", True)
    comms = make_comms(world(), n_basis=world().Get_size())
    solver, edges, initial = make_case()
    line = Line(comms.time, own_slices(edges, 1, 0), SWEEP_CASES["burgers_1024"].problem.args)
    solve = jax.jit(lambda initial: solve_interface(line, solver, initial).states.ends)
    ends = jax.block_until_ready(solve(jnp.asarray(initial)))
    seconds = []
    for _ in range(n_repeats):
        comms.control.Barrier()
        began = time.perf_counter()
        jax.block_until_ready(solve(jnp.asarray(initial)))
        seconds.append(max(comms.control.allgather(time.perf_counter() - began)))
    return {"seconds": seconds, "last": ends[-1].tolist()}


def main() -> None:
    """The process: take a core, solve, print. Collective over the world."""
    request = json.loads(Path(sys.argv[1]).read_text())
    cores = [int(core) for core in sys.argv[2].split(",")]
    os.sched_setaffinity(0, {cores[(local_rank(os.environ) or 0) % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"
    found = contend(request["repeats"])
    from nodepint_mpi.parallel.comms import world

    if world().Get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
