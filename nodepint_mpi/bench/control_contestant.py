"""One contestant of `bench.control_time`, in a process or job of its own.

python -m nodepint_mpi.bench.control_contestant REQUEST.json [CORE,...] finds the control as it is
asked to, and rank 0 prints the result as JSON. With cores, each rank takes the one of its local
rank, and one thread.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from nodepint_mpi.ranks.launcher import local_rank


class TimedCase(NamedTuple):
    """Oscillators to be steered: `d` of them, in slices of fine steps of RK4, with one coarse
    step of Euler's method each; the control has `n_nodes` nodes."""

    d: int = 128
    n_slices: int = 64
    fine_steps: int = 32
    horizon: float = 20.0
    n_nodes: int = 65
    n_controls: int = 8
    rate: float = 0.05


def contend(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds and costs after each evaluation. Collective over the world; equal on all ranks.

    Compiling is left out: everything is called once before the clock starts.

    Args:
        request: `case`, fields of `TimedCase`; `kind`: "diffrax" or "ours"; `optimizer`: "lbfgs",
            or "adam" or "quasi-newton", which with "ours" track; `steps`, the most iterations. Or
            `kind` "costs": those of a slice, with each of `widths` slices at once.
    """
    import jax
    import jax.numpy as jnp

    from nodepint_mpi.bench.control_oscillators import Oscillators
    from nodepint_mpi.parallel.comms import make_comms, world

    jax.config.update("jax_enable_x64", True)
    comms = make_comms(world())
    case = TimedCase(**request["case"])
    problem = Oscillators(case, comms.time)
    if request["kind"] == "costs":
        return {str(width): problem.costs(width) for width in request["widths"]}
    run = problem.plain if request["kind"] == "diffrax" else problem.ours
    seconds, points, sweeps, compiled_s = run(request["optimizer"], request["steps"])
    costs = [float(problem.cost_of(jnp.asarray(point))) for point in points]
    return {
        "seconds": seconds, "costs": costs, "sweeps": sweeps, "compiled_s": compiled_s,
        "ranks": comms.time.size,
    }  # fmt: skip


def main() -> None:
    """The process: read, find, print. Collective over the world."""
    request = json.loads(Path(sys.argv[1]).read_text())
    if len(sys.argv) > 2:
        cores = [int(core) for core in sys.argv[2].split(",")]
        os.sched_setaffinity(0, {cores[(local_rank(os.environ) or 0) % len(cores)]})
        os.environ["OMP_NUM_THREADS"] = "1"
    found = contend(request)
    from nodepint_mpi.parallel.comms import world

    if world().Get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
