"""Some steps of training by one contestant, in a process or job of its own; see `bench.contest`.

python -m nodepint_mpi.bench.contestant REQUEST.json [CORE,...] trains as it is asked to, and rank 0
prints the result as JSON. With cores, each rank takes the one of its local rank, and one thread.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodepint_mpi.ranks.launcher import local_rank
from nodepint_mpi.ranks.machine import peak_bytes

if TYPE_CHECKING:
    from nodepint_mpi.training.error_control import Stepper
    from nodepint_mpi.training.setup import Experiment
    from nodepint_mpi.training.train_state import TrainState

COMPILED_STEPS = 3
"""The first steps compile: they count as the median step."""
PROFILED_STEPS = 4
"""Steps after those that are timed, for the shares of its phases."""


def contend(request: dict[str, Any]) -> dict[str, Any]:
    """Train and take times. Collective over all ranks; equal on all ranks.

    Args:
        request: `config` (TOML text), `kind` (whose step: "ours", "plain" or "torchdiffeq"),
            `n_steps`; `n_checks`, how often our gradient is compared with the serial one, outside
            of the times; whether the model is `scored` at the end; whether `network` is timed.
    """
    import jax
    import numpy as np

    from nodepint_mpi.bench.peers import Torch
    from nodepint_mpi.bench.planning.network import measure_network
    from nodepint_mpi.config.experiment import parse_config
    from nodepint_mpi.data.own import share_own_data
    from nodepint_mpi.parallel.comms import make_comms, world
    from nodepint_mpi.training.error_control import make_stepper, relative_error
    from nodepint_mpi.training.evaluate import evaluate
    from nodepint_mpi.training.plain import make_plain_loss, make_plain_stepper
    from nodepint_mpi.training.setup import fresh_state, set_up

    config = parse_config(request["config"])
    jax.config.update("jax_enable_x64", config.run.precision == "float64")
    ours = request["kind"] == "ours"
    grid = (config.run.data_ranks, config.run.basis_ranks) if ours else (1, 1)
    comms = make_comms(world(), n_groups=grid[0], n_basis=grid[1])
    config = share_own_data(comms.control, config)
    experiment = set_up(config, comms)
    state = fresh_state(experiment)
    steppers = {"ours": make_stepper, "plain": make_plain_stepper, "torchdiffeq": Torch}
    stepper = steppers[request["kind"]](experiment)
    exact = jax.jit(jax.grad(make_plain_loss(experiment)))  # compiled at the first check
    relaxation = config.time.relaxation  # till its end the gradient is that of another loss
    n_steps, n_checks = request["n_steps"], request["n_checks"] if ours else 0
    # Not where tracking looks at the serial gradient itself.
    checked = {round((i + 0.5) * (n_steps - 1) / n_checks) for i in range(n_checks)}
    losses, seconds, sweeps, errors, peak, n_serial = [], [], [], [], 0, 0
    for k in range(n_steps):
        batch = experiment.batch(k)
        wanted = None
        if k in checked and (relaxation is None or relaxation.weight_at(k) == 1):
            peak = peak or peak_bytes()  # before the serial solve takes its share
            wanted = jax.device_get(exact(state.params, experiment.whole_batch(k)))
        comms.control.Barrier()
        began = time.perf_counter()
        taken = stepper.take(state, batch, k)
        seconds.append(time.perf_counter() - began)
        state, report = taken.state, taken.report
        losses.append(float(report.loss))
        sweeps.append([int(report.sweeps), int(report.adjoint_sweeps)])
        n_serial += taken.serial
        if wanted is not None:
            ours_whole = experiment.update.whole_params(taken.gradient)
            errors.append(relative_error(ours_whole, wanted))
    peaks = comms.control.allgather(peak or peak_bytes())
    shares, counts = _profiled(experiment, stepper, state, n_steps) if ours else (None, None)
    return {
        "losses": losses,
        "seconds": comms.control.bcast(seconds),
        "sweeps": np.mean(sweeps[n_steps // 2 :], axis=0).tolist(),
        "serial_steps": n_serial,
        "gradient_errors": errors,
        "shares": shares,
        "counts": counts,
        "message_share": None if shares is None else _message_share(shares),
        "coarse_share": None if shares is None else _coarse_share(shares, grid[0] * grid[1]),
        "scores": evaluate(comms, experiment, state.params) if request["scored"] else {},
        "network": measure_network(comms) if request["network"] and comms.time.size > 1 else None,
        "peak_bytes": max(peaks),
        "n_ranks": comms.control.size,
    }


def _profiled(experiment: "Experiment", stepper: "Stepper", state: "TrainState", step: int):
    """Shares of a step by phase, and its counts, for every rank. Collective.

    None where no step could be profiled.
    """
    from nodepint_mpi.profiling.record import phase_shares, profiled_counts
    from nodepint_mpi.profiling.sampling import Sampler

    comms = experiment.comms
    sampler = Sampler(comms.control)
    for k in range(step, step + PROFILED_STEPS):
        batch = experiment.batch(k)
        taken = sampler.profiled(lambda k=k, batch=batch: stepper.take(state, batch, k), k)
        if taken.serial:  # a check of the gradient
            sampler.forget(k)
    samples = comms.control.allgather(sampler.samples)
    return phase_shares(samples, comms.time.n_groups, comms.time.n_basis), profiled_counts(samples)


def _message_share(shares: list[dict[str, float]]) -> float:
    """Of a step in messages and waiting, a mean over the ranks."""
    from nodepint_mpi.core.scopes import MESSAGES
    from nodepint_mpi.profiling.waits import WAIT

    return sum(share[name] for share in shares for name in (*MESSAGES, WAIT)) / len(shares)


def _coarse_share(shares: list[dict[str, float]], n_lines: int) -> float:
    """Of a step in the coarse steps of a line, whose ranks take them one after the other."""
    from nodepint_mpi.core.scopes import COARSE

    return sum(share[COARSE] for share in shares) / n_lines


def main(arguments: list[str]) -> None:
    """Read the request, take a core, compete, and have rank 0 print the result."""
    file = Path(arguments[0])
    if arguments[1:]:
        cores = [int(core) for core in arguments[1].split(",")]
        os.sched_setaffinity(0, {cores[(local_rank(os.environ) or 0) % len(cores)]})
        os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    from nodepint_mpi.ranks.guard import run_guarded

    def run() -> int:
        from nodepint_mpi.parallel.comms import world

        result = contend(json.loads(file.read_text()))
        if world().rank == 0:
            print(json.dumps(result))
        return 0

    sys.exit(run_guarded(run))


if __name__ == "__main__":
    main(sys.argv[1:])
