"""`nodepint bench sampling`: diffusion models with an exact score, sampled parallel in time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nodepint_mpi.bench.sampling_cases import GaussianMixture, circle, subspace
from nodepint_mpi.core.gaussian_paths import StraightLine
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.parallel.generate import Drawn, sample
from nodepint_mpi.parallel.sampling import Sampling

Report = Callable[[str], None]
END = 0.999
"""Where the variance-preserving path ends."""

PUBLISHED = {
    (64, "sde", "parareal"): "8 (136 / 72)",
    (256, "sde", "parareal"): "6 (208 / 112)",
    (64, "ode", "parareal"): "4 (72 / 40)",
    (256, "ode", "parareal"): "4 (144 / 80)",
    (64, "sde", "picard"): "20 (715 evaluations)",
    (256, "sde", "picard"): "23 (3,129 evaluations)",
    (64, "ode", "picard"): "7 (148 evaluations)",
    (256, "ode", "picard"): "7 (596 evaluations)",
    (256, "sde", "tangent"): "5",
    (256, "ode", "tangent"): "4",
}
"""Reference values by steps, sampler and method, from a small independent program with its own
noise: other noise moves a count by one."""

METHODS = {
    "parareal": Sampling(method="parareal"),
    "picard": Sampling(method="picard"),
    "tangent": Sampling(method="tangent"),
}
LOW_RANK = METHODS | {
    "tangent, rank 8": Sampling(rank=8, tol=1e-3),
    "tangent, rank 8, nothing outside": Sampling(rank=8, complement=False, tol=1e-3),
}
"""For data near a subspace of that rank."""


def run_sampling(
    comms: Comms, steps: Sequence[int], *, n_samples: int, report: Report
) -> list[dict[str, Any]]:
    """Every sampler and method against the serial sampler. Collective; needs x64.

    Args:
        comms: The run's communicators.
        steps: Numbers of steps for the circle; the first is that of the subspace, too.
        n_samples: Samples drawn, with the same noise by all methods.
        report: Told about each row.
    """
    rows = []
    cases = [("circle", circle(), n, METHODS) for n in steps]
    cases.append(("subspace", subspace(), steps[0], LOW_RANK))
    for name, field, n_steps, methods in cases:
        for sampler in ("sde", "ode"):
            for row in compare_methods(comms, field, methods, sampler, n_steps, n_samples):
                rows.append({"case": name, **row})
                report(f"{name}, {sampler}, {n_steps} steps, {row['method']}: {row['sweeps']}")
    return rows


def compare_methods(
    comms: Comms,
    field: GaussianMixture,
    methods: dict[str, Sampling],
    sampler: str,
    n_steps: int,
    n_samples: int,
) -> list[dict[str, Any]]:
    """A row for each method, with its error against the serial sampler. Collective."""

    def draw(options: Sampling) -> tuple[Drawn, float]:
        end = 1.0 if isinstance(field.path, StraightLine) else END
        chosen = replace(options, sampler=sampler, n_steps=n_steps, end=end)

        def once() -> Drawn:
            drawn = sample(field, field.size, n_samples, chosen, comm=comms.time)
            return drawn._replace(samples=jax.block_until_ready(drawn.samples))

        once()  # compiles
        began = time.perf_counter()
        return once(), time.perf_counter() - began

    serial, serial_s = draw(Sampling(method="serial"))
    rows = []
    for name, options in methods.items():
        drawn, seconds = draw(options)
        difference = drawn.samples - serial.samples
        rows.append(
            {
                "sampler": sampler, "n_steps": n_steps, "method": name,
                **drawn.counts._asdict(), "largest_jump": drawn.largest_jump,
                "status": drawn.solution.status.name.lower(),
                "error_max": float(jnp.max(jnp.abs(difference))), "error_rms": _rms(difference),
                "published": PUBLISHED.get((n_steps, sampler, options.method))
                if field.size == 2 else None,
                "seconds": seconds, "serial_s": serial_s,
            }
        )  # fmt: skip
    return rows


def _rms(values: Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(values))))


def format_sampling(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown. Local."""
    lines = [
        "| data, sampler, steps | method | sweeps (steps in sequence: plain / pipelined) | "
        "reference | serial solutions of work | largest jump | error: largest / rms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sweeps = str(row["sweeps"])
        if row["method"] == "picard":
            sweeps += f" ({row['evaluations']:,} evaluations)"
        else:
            sweeps += f" ({row['serial_steps']} / {row['serial_steps_pipelined']})"
        lines.append(
            f"| {row['case']}, {row['sampler']}, {row['n_steps']} | {row['method']} | {sweeps} | "
            f"{row['published'] or '-'} | {row['equivalents']:.1f} | {row['largest_jump']:.0e} | "
            f"{row['error_max']:.0e} / {row['error_rms']:.0e} |"
        )
    return "\n".join(lines)
