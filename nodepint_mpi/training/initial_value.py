"""`nodepint solve`: one initial-value problem, no training."""

import logging
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.build.model import build_edges, build_integrator
from nodepint_mpi.build.sections import build_method, build_problem, build_stopping
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.problems import Problem
from nodepint_mpi.core.propagators import AbstractIntegrator
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.methods.serial import Serial
from nodepint_mpi.parallel.outlook import make_forecast
from nodepint_mpi.parallel.solution import Solution
from nodepint_mpi.ranks.agreement import together
from nodepint_mpi.ranks.watchdog import Watchdog

_log = logging.getLogger(__name__)


def solve_problem(
    config: Config, comms: Comms, *, with_error: bool, with_forecast: bool
) -> dict[str, Any]:
    """Solve the config's initial-value problem. Collective over `comms`; equal on all ranks.

    Args:
        config: The experiment; needs a section `[problem]`.
        comms: The run's communicators.
        with_error: Also solve serially, and report the largest distance from that.
        with_forecast: First say what to expect, where there is a coarse propagator.

    Raises:
        NodepintError: on all ranks, for anything the user can fix.
    """
    if config.problem is None:
        raise ConfigError(
            '`nodepint solve` needs a section `[problem]`, such as `field = "lorenz"`.'
        )
    section = config.time
    with Watchdog(comms.control, limit_s=config.run.hang_timeout_s) as watchdog:
        with watchdog.phase("setting up", limit_s=120), together(comms.control):
            problem = build_problem(config.problem, section.horizon)
            fine = build_integrator(section.fine, "time.fine")
            coarse = section.coarse and build_integrator(section.coarse, "time.coarse")
            method = build_method(section, problem.field, n_batch_axes=0, seed=config.run.seed)
            stopping = build_stopping(section.stopping, config.run.precision)
            _try_field(problem)

        edges, args = build_edges(section), _as_arrays(problem)

        def run(
            method: AbstractMethod, fine: AbstractIntegrator = fine, throw: bool = True
        ) -> Solution:
            solution = solve(
                problem.field,
                np.asarray(problem.initial, dtype=jnp.zeros(()).dtype),
                edges,
                fine=fine,
                method=method,
                stopping=stopping,
                args=args,
                slices_at_once=section.slices_at_once,
                comm=comms.time,
                throw=throw,
            )
            return jax.block_until_ready(solution)

        forecast = None
        if with_forecast and coarse is not None and method.iterates:
            with watchdog.phase("forecasting", collective=True):
                forecast = make_forecast(
                    lambda steps: run(method, steps, throw=False),
                    problem.field,
                    args,
                    coarse,
                    edges,
                    comms.time.size,
                )
                _log.info("forecast: %s", forecast.advice)
        with watchdog.phase("solving", collective=True):
            began = time.perf_counter()
            solution = run(method)
            seconds = time.perf_counter() - began
        result = {
            "problem": config.problem.field,
            "n_ranks": comms.control.size,
            "status": solution.status.name.lower(),
            "meaning": solution.status.value,
            "sweeps": solution.sweeps,
            "jumps": solution.jumps.tolist(),
            "updates": solution.updates.tolist(),
            "fronts": solution.fronts.tolist(),
            "fine_solves": int(solution.work.fine),
            "tangents": int(solution.work.tangents),
            "guarded": int(solution.record.n_guarded),
            "damped": int(solution.record.n_damped),
            "fallbacks": int(solution.record.n_fallbacks),
            "forecast": None if forecast is None else forecast.as_dict(),
            "end_state_norm": float(jnp.max(jnp.abs(solution.interface[-1]))),
            "seconds_with_compilation": seconds,
        }
        if with_error:
            with watchdog.phase("solving serially", collective=True):
                serial = run(Serial(), throw=False)
            distance = float(jnp.max(jnp.abs(solution.interface - serial.interface)))
            result["serial_status"] = serial.status.name.lower()
            result["error"] = distance
        return result


_NOTES = {
    "guarded": "slices on one rank had a non-finite value that a sweep stepped around",
    "damped": "slices had a correction too long to be trusted, which was cut",
    "fallbacks": "sweeps were done by the fallback, since the jumps no longer fell",
}


def format_solution(result: dict[str, Any]) -> str:
    """The result as a table, a line per sweep. Local."""
    lines = [f"{result['problem']}: {result['meaning']}", " sweep      jump    update  frozen"]
    jumps, updates, fronts = result["jumps"], result["updates"], result["fronts"]
    for k in range(result["sweeps"] + 1):
        jump = f"{jumps[k]:9.2e}" if k < len(jumps) else "        -"
        moved = f"{updates[k - 1]:9.2e} {fronts[k - 1]:7d}" if k else "        -       -"
        lines.append(f"{k:6d} {jump} {moved}")
    if "error" in result:
        lines.append(f"largest distance from the serial solution: {result['error']:.3e}")
    for name, what in _NOTES.items():
        if result[name]:
            lines.append(f"{result[name]} {what}")
    lines.append(f"{result['sweeps']} sweeps, {result['seconds_with_compilation']:.1f} s")
    return "\n".join(lines)


def _try_field(problem: Problem) -> None:
    """Let a field that raises do so where all ranks learn of it. Local."""
    t0, initial = jnp.asarray(problem.span[0], float), jnp.asarray(problem.initial, float)
    eqx.filter_eval_shape(problem.field, t0, initial, _as_arrays(problem))


def _as_arrays(problem: Problem) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, dtype=float) for name, value in problem.args.items()}
