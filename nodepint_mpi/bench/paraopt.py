"""`nodepint bench control`: ParaOpt's sweeps on the problems of its reference, as a table.

Reference:
    Gander, Kwok, Salomon (2020), SIAM J. Sci. Comput. 42, A2773-A2802, section 5.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nodepint_mpi.optimal_control.paraopt import solve_paraopt
from nodepint_mpi.optimal_control.paraopt_options import ParaOpt, ParaOptSolution, ParaOptStatus
from nodepint_mpi.parallel.comms import Comms

Report = Callable[[str], None]
RATIOS = tuple(Fraction(1, k) for k in (1, 2, 4, 16, 64))


class ParaOptCase(NamedTuple):
    """Steer du/dt = f(u) + c to a target: 1/2 |u(T) - target|^2 + alpha/2 int |c|^2 is smallest."""

    drift: Callable[[Array], Array]
    start: tuple[float, ...]
    target: tuple[float, ...]
    alpha: float
    horizon: float
    n_slices: int

    def solve(self, options: ParaOpt, **others: Any) -> ParaOptSolution:
        """Collective; `others` are those of `solve_paraopt`. Needs x64."""
        target = jnp.asarray(self.target)
        return solve_paraopt(
            lambda t, u, c, args: self.drift(u) + c,
            jnp.asarray(self.start),
            np.linspace(0.0, self.horizon, self.n_slices + 1),
            running=lambda t, u, c: 0.5 * self.alpha * jnp.sum(c**2),
            terminal=lambda u: 0.5 * jnp.sum((u - target) ** 2),
            n_controls=len(self.start),
            options=options,
            target=target,
            **others,
        )


def _predator_prey(u):
    return jnp.stack([u[0] * (10 - 0.2 * u[1]), u[1] * (0.2 * u[0] - 10)])


PARAOPT_CASES = {
    "lotka_volterra": ParaOptCase(_predator_prey, (20.0, 15.0), (1.0, 1.0), 0.5, 1.0, 8),
    "decay": ParaOptCase(lambda u: -u, (1.0,), (0.0,), 1.0, 1.0, 10),
    "growth": ParaOptCase(lambda u: 9.0 * u, (1.0,), (0.5,), 1.0, 1.0, 10),
}
"""Those of the reference. The scalar ones are y' = -y + c and y' = 9 y + c."""

PARAOPT_TABLES = (
    ("lotka_volterra", 64, RATIOS),
    ("lotka_volterra", 256, RATIOS),
    ("decay", 64, RATIOS[2:]),
    ("growth", 64, RATIOS[2:]),
)
"""Case, fine steps of a slice, ratios."""


def run_paraopt(
    comms: Comms, tables: Sequence[tuple[str, int, Sequence[Fraction]]], *, report: Report
) -> list[dict[str, Any]]:
    """Sweeps and costs. Collective over `comms`; equal on all ranks; needs x64.

    Args:
        comms: The run's communicators.
        tables: Case, fine steps of a slice and ratios; `PARAOPT_TABLES` if empty.
        report: Told about each solve as it ends.
    """
    rows = []
    for name, n_steps, ratios in tables or PARAOPT_TABLES:
        for ratio in ratios:
            found = PARAOPT_CASES[name].solve(ParaOpt(n_steps, ratio), comm=comms.time)
            rows.append(
                {
                    "case": name,
                    "n_steps": n_steps,
                    "ratio": str(ratio),
                    "status": found.status.value,
                    "reason": found.reason,
                    "sweeps": found.sweeps,
                    "cost": found.cost,
                    "end": found.states[-1].tolist(),
                    "contraction": found.contraction,
                    "updates": found.updates.tolist(),
                }
            )
            report(f"{name}, {n_steps} steps a slice, ratio {ratio}: {found.reason}")
    return rows


def format_paraopt(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown. Local."""
    lines = [
        "| problem | fine steps a slice | ratio | sweeps | J | u(T) | estimate | updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sweeps, cost, end = str(row["sweeps"]), f"{row['cost']:.9g}", ""
        if row["status"] == ParaOptStatus.DIVERGED:
            sweeps, cost = "diverges", ""
        else:
            end = f"({', '.join(f'{value:.6f}' for value in row['end'])})"
        if row["status"] == ParaOptStatus.MAX_SWEEPS:
            sweeps = f"more than {row['sweeps']}"
        updates = " ".join(f"{update:.1e}" for update in row["updates"][:5])
        lines.append(
            f"| {row['case']} | {row['n_steps']} | {row['ratio']} | {sweeps} | {cost} | {end} | "
            f"{row['contraction']:.2f} | {updates} |"
        )
    return "\n".join(lines)
