"""Learning the field of a control problem from trajectories, before or while it is controlled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from nodepint_mpi.core.propagators import AbstractIntegrator
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.optimal_control.gradients import GradientKind, with_gradient
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.ivp import solve

Schedule = Literal["before", "alternating", "joint"]


@dataclass(frozen=True)
class Learning:
    """How the model among the `args` of a control problem is learned.

    Args:
        loss: `loss(model)`, a number that is the same on every rank, such as `trajectory_loss`.
        optimizer: Of the model, by optax.
        steps: Of the optimizer in all.
        schedule: "before": learn, then control; "alternating": learn a share of the steps, control
            through the learned field, and again, `rounds` times; "joint": both in every iteration,
            by the gradient of loss + weight * cost.
        rounds: Of "alternating".
        weight: Of the cost beside the loss, for "joint".
    """

    loss: Callable[[PyTree], Array]
    optimizer: optax.GradientTransformation
    steps: int
    schedule: Schedule = "before"
    rounds: int = 1
    weight: float = 1.0

    @property
    def stated(self) -> tuple[int, str, int, float]:
        """What ranks must agree on besides the loss. Local."""
        return self.steps, self.schedule, self.rounds, self.weight

    def check(self) -> None:
        """Refuse what makes no sense. Local.

        Raises:
            ProblemError: with the value and what was expected.
        """
        if not callable(self.loss):
            raise ProblemError(f"`learning.loss` is a {type(self.loss).__name__}; not a function.")
        if not isinstance(self.optimizer, optax.GradientTransformation):
            raise ProblemError(
                f"`learning.optimizer` is a {type(self.optimizer).__name__}; expected one of "
                "optax's, such as `optax.adam(1e-2)`."
            )
        if self.schedule not in get_args(Schedule):
            raise ProblemError(
                f"`learning.schedule` is {self.schedule!r}; choose from "
                f"{', '.join(map(repr, get_args(Schedule)))}."
            )
        for name in ("steps", "rounds"):
            value = getattr(self, name)
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if not whole or value < 1:
                raise ProblemError(f"`learning.{name}` is {value!r}; expected at least one.")
        if self.rounds > 1 and self.schedule != "alternating":
            raise ProblemError("`learning.rounds` belongs to schedule 'alternating'.")
        if self.rounds > self.steps:
            raise ProblemError("`learning.rounds` must not be more than `learning.steps`.")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
            raise ProblemError(f"`learning.weight` is {weight!r}; expected a number above zero.")


def trajectory_loss(
    field: Callable,
    starts: Any,
    times: Any,
    states: Any,
    *,
    edges: Any,
    fine: AbstractIntegrator,
    control: Callable | None = None,
    n_controls: int = 0,
    gradient: GradientKind = "dp",
    comm: TimeComm | None = None,
    **options: Any,
) -> Callable[[PyTree], Array]:
    """The mean squared error of trajectories, as a function of the model that gives the field.

    Local to make; what it returns is collective over `comm`, and the same on all ranks.

    Args:
        field: `field(t, u, c, model)`, as of a control problem.
        starts: Initial states, (samples, *state).
        times: Of the observations, increasing, (times,).
        states: Observed then, (samples, times, *state).
        edges: Slice boundaries of the solves.
        fine: Steps of the fine propagator over one slice.
        control: That under which the trajectories were recorded; zero unless given.
        n_controls: Size of that zero.
        gradient: "dp" or "dal", as of `nodepint_mpi.control`.
        comm: A line of ranks; the whole world unless given.
        **options: Of `solve`: `coarse`, `method`, `stopping` and so on.

    Raises:
        ProblemError: if shapes do not fit together; from the function, as from `solve`.
    """
    starts, observed = jnp.asarray(starts), jnp.asarray(states)
    times = np.asarray(times, dtype=float)
    if observed.ndim < 2 or observed.shape[:2] != (len(starts), len(times)):
        raise ProblemError(
            f"`states` has shape {observed.shape}; expected ({len(starts)}, {len(times)}, *state), "
            "a state for each of `starts` at each of `times`."
        )
    if observed.shape[2:] != starts.shape[1:]:
        raise ProblemError(
            f"`states` are of shape {observed.shape[2:]} and `starts` of {starts.shape[1:]}."
        )
    if not bool(jnp.all(jnp.isfinite(observed))) or not bool(jnp.all(jnp.isfinite(starts))):
        raise ProblemError("`starts` and `states` must be finite.")
    targets = jnp.moveaxis(observed, 1, 0)
    steps = with_gradient(fine, gradient)

    def driven(t: Array, u: Array, model: PyTree) -> Any:
        c = jnp.zeros(n_controls, u.dtype) if control is None else control(t, u)
        return field(t, u, c, model)

    def loss(model: PyTree) -> Array:
        solution = solve(
            driven, starts, edges, fine=steps, args=model, in_axes=(0, None), ts=times, comm=comm,
            throw=False, check_ranks=False, **options,
        )  # fmt: skip
        assert isinstance(solution.ys, jax.Array)  # states are arrays, and times were given
        return jnp.mean(jnp.square(solution.ys - targets))

    return loss
