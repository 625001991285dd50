"""`nodepint solve`: one initial-value problem, no training."""

import logging
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from nodepint_mpi.build.model import build_edges, build_integrator
from nodepint_mpi.build.noise import build_path_noise
from nodepint_mpi.build.sections import build_method, build_problem, build_stopping
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.problems import Problem
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.ivp import solve
from nodepint_mpi.parallel.methods.base import AbstractMethod
from nodepint_mpi.parallel.methods.serial import Serial
from nodepint_mpi.parallel.noise import Noise
from nodepint_mpi.parallel.outlook import forecast
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
    if config.control is not None:
        raise ConfigError("The config has a section `[control]`: start it by `nodepint control`.")
    section = config.time
    with Watchdog(comms.control, limit_s=config.run.hang_timeout_s) as watchdog:
        with watchdog.phase("setting up", limit_s=120.0), together(comms.control):
            problem = build_problem(config.problem, section.horizon)
            noise, diffusion = _noise_of(config, problem)
            fine = build_integrator(section.fine, "time.fine")
            coarse = section.coarse and build_integrator(section.coarse, "time.coarse")
            several = noise is not None and noise.n_paths is not None
            method = build_method(
                section, problem.field, n_batch_axes=int(several), seed=config.run.seed
            )
            stopping = build_stopping(section.stopping, config.run.precision)
            _try_field(problem)

        equation: dict[str, Any] = {
            "field": problem.field,
            "u0": np.asarray(problem.initial, dtype=jnp.zeros(()).dtype),
            "edges": build_edges(section),
            "fine": fine,
            "args": _as_arrays(problem),
            "diffusion": diffusion,
            "noise": noise,
            "in_axes": (None, None) if several else None,
            "stopping": stopping,
            "slices_at_once": section.slices_at_once,
            "comm": comms.time,
        }

        def run(method: AbstractMethod, throw: bool = True) -> Solution:
            return jax.block_until_ready(solve(**equation, method=method, throw=throw))

        expected = None
        if with_forecast and coarse is not None and method.iterates:
            with watchdog.phase("forecasting", collective=True):
                expected = forecast(**equation, coarse=coarse, method=method)
                _log.info("forecast: %s", expected.advice)
        with watchdog.phase("solving", collective=True):
            began = time.perf_counter()
            solution = run(method)
            seconds = time.perf_counter() - began
        result = {
            "problem": config.problem.field,
            "n_ranks": comms.control.size,
            "basis_ranks": comms.time.n_basis,
            "status": solution.status.name.lower(),
            "meaning": solution.status.value,
            "sweeps": solution.sweeps,
            "n_paths": None if noise is None else noise.n_paths or 1,
            "path_sweeps": _path_sweeps(solution),
            "jumps": solution.jumps.tolist(),
            "updates": solution.updates.tolist(),
            "fronts": solution.fronts.tolist(),
            "fine_solves": int(solution.work.fine),
            "tangents": int(solution.work.tangents),
            "guarded": int(solution.record.n_guarded),
            "damped": int(solution.record.n_damped),
            "fallbacks": int(solution.record.n_fallbacks),
            "forecast": None if expected is None else expected.as_dict(),
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


def _path_sweeps(solution: Solution) -> dict[str, float] | None:
    """How many sweeps the paths of a batch needed; None without a batch."""
    of_paths = solution.sample_sweeps
    if of_paths is None:
        return None
    return {"median": float(np.median(of_paths)), "largest": float(np.max(of_paths))}


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
    if result["path_sweeps"] is not None:
        of_paths = result["path_sweeps"]
        lines.append(
            f"{result['n_paths']} paths, half of which were solved after "
            f"{of_paths['median']:g} sweeps, all after {of_paths['largest']:g}"
        )
    lines.append(f"{result['sweeps']} sweeps, {result['seconds_with_compilation']:.1f} s")
    return "\n".join(lines)


def _noise_of(config: Config, problem: Problem) -> tuple[Noise | None, Any]:
    """The noise of a problem and its diffusion, which belong together. Local."""
    noise, diffusion = build_path_noise(config), getattr(problem.field, "diffusion", None)
    if noise is None:
        if callable(diffusion):
            raise ConfigError(
                "`problem.field` has a method `diffusion`, but the config has no section "
                "`[noise]`: add one, or call the method something else."
            )
        return None, None
    if not callable(diffusion):
        raise ConfigError(
            "`[noise]` needs a `problem.field` with a method `diffusion(t, u, args)`: what the "
            "noise is multiplied with."
        )
    return noise, diffusion


def _try_field(problem: Problem) -> None:
    """Let a field that raises do so where all ranks learn of it. Local."""
    t0, initial = jnp.asarray(problem.span[0], float), jnp.asarray(problem.initial, float)
    eqx.filter_eval_shape(problem.field, t0, initial, _as_arrays(problem))


def _as_arrays(problem: Problem) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, dtype=float) for name, value in problem.args.items()}
