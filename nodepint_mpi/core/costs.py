"""What a control is to minimize: costs along the trajectory and at its end, constraints there.

    J = terminal(u(T)) + integral of running(t, u, c) dt,   subject to constraint(u(T)) = 0

The integral is one more component of the state, so it is cut into slices, and is of the order of
the solver, like everything else.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nodepint_mpi.errors import ProblemError


class Cost(eqx.Module):
    """The parts of a cost, each of one state of one sample.

    `running(t, u, c)` and `terminal(u)` return a number, `constraint(u)` what has to be zero at
    the end, (n_constraints,).
    """

    terminal: Callable | None = None
    running: Callable | None = None
    constraint: Callable | None = None

    def __check_init__(self):
        if self.terminal is None and self.running is None:
            raise ProblemError("A cost needs `terminal` or `running`, functions to be minimized.")
        for name in ("terminal", "running", "constraint"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ProblemError(f"`{name}` of a cost is {value!r}; expected a function.")


class Distance(eqx.Module):
    """w / 2 |u - target|^2, of the states listed in `of`, all unless given."""

    target: tuple[float, ...] = eqx.field(static=True)
    weight: float = eqx.field(static=True)
    of: tuple[int, ...] | None = eqx.field(static=True, default=None)

    def __call__(self, u: Any) -> Float[Array, ""]:
        return 0.5 * self.weight * jnp.sum(jnp.square(self.gap(u)))

    def gap(self, u: Any) -> Float[Array, " states"]:
        """How far the state is from the target, component by component. Local."""
        flat = flatten(u)
        flat = flat if self.of is None else flat[np.asarray(self.of)]
        if len(self.target) not in (1, flat.size):
            raise ProblemError(
                f"`target` of a cost has {len(self.target)} numbers, and {flat.size} states are "
                "compared with it."
            )
        return flat - jnp.broadcast_to(jnp.asarray(np.squeeze(self.target), flat.dtype), flat.shape)


class Quadratic(eqx.Module):
    """w / 2 |u - target|^2 + energy / 2 |c|^2, along the trajectory."""

    distance: Distance | None
    energy: float = eqx.field(static=True)

    def __call__(self, t: Any, u: Any, c: Array) -> Float[Array, ""]:
        del t
        total = 0.5 * self.energy * jnp.sum(jnp.square(c))
        return total if self.distance is None else total + self.distance(u)


def quadratic_cost(
    *,
    target: Any = 0.0,
    terminal: float = 0.0,
    running: float = 0.0,
    energy: float = 0.0,
    reach: bool = False,
    of: Any = None,
) -> Cost:
    """terminal / 2 |u(T) - target|^2 + integral of running / 2 |u - target|^2 + energy / 2 |c|^2.

    Local.

    Args:
        target: One number or one for each state compared.
        terminal: Weight at the end.
        running: Weight along the trajectory.
        energy: Weight of the control.
        reach: The target must be reached: u(T) = target is a constraint.
        of: Indices of the states compared, all unless given.

    Raises:
        ProblemError: for weights that are negative, or all zero.
    """
    weights = {"terminal": terminal, "running": running, "energy": energy}
    for name, weight in weights.items():
        number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
        if not number or not np.isfinite(weight) or weight < 0:
            raise ProblemError(f"`{name}` of a cost is {weight!r}; expected a number, at least 0.")
    if not any(weights.values()):
        raise ProblemError("A cost needs a weight above zero: `terminal`, `running` or `energy`.")
    goal = tuple(np.atleast_1d(np.asarray(target, dtype=float)).tolist())
    states = None if of is None else tuple(int(i) for i in np.atleast_1d(of))
    along = Distance(goal, float(running), states) if running else None
    return Cost(
        terminal=Distance(goal, float(terminal), states) if terminal else None,
        running=Quadratic(along, float(energy)) if running or energy else None,
        constraint=Distance(goal, 1.0, states).gap if reach else None,
    )


def flatten(u: Any) -> Array:
    """All numbers of a state, in one row. Local."""
    return jnp.concatenate([jnp.ravel(part) for part in jax.tree.leaves(u)])
