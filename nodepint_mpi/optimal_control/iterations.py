"""The iterations of a control problem: optimizers, rounds of a constraint, learning in turns."""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from nodepint_mpi.errors import ProblemError
from nodepint_mpi.optimal_control.learning import Learning
from nodepint_mpi.optimal_control.objective import (
    Found,
    Objective,
    Penalty,
    Rest,
    Variables,
    combine,
    separate,
)
from nodepint_mpi.optimal_control.optimize import Minimum, minimize_lbfgs, minimize_optax
from nodepint_mpi.optimal_control.steered import Steered
from nodepint_mpi.parallel.tracking import SolveCarry

MOST_ROUNDS = 20
"""Updates of the multiplier of a constraint."""
_GROWTH, _PROGRESS = 4.0, 0.25


class Plan(NamedTuple):
    """How a control is to be found; see `nodepint_mpi.control`."""

    optimizer: Any
    steps: int
    tol: float
    constraint_tol: float
    tracking: bool
    learning: Learning | None

    @property
    def is_lbfgs(self) -> bool:
        """Whether the optimizer is L-BFGS. Local."""
        return isinstance(self.optimizer, str)

    def check(self, options: dict[str, Any]) -> None:
        """Refuse what makes no sense. Local.

        Raises:
            ProblemError: with the value and what was expected.
        """
        if self.optimizer != "lbfgs" and not isinstance(
            self.optimizer, optax.GradientTransformation
        ):
            raise ProblemError(
                f"`optimizer` is {self.optimizer!r}; expected 'lbfgs' or one of optax's, such as "
                "`optax.adam(1e-2)`."
            )
        whole = isinstance(self.steps, (int, np.integer)) and not isinstance(self.steps, bool)
        if not whole or self.steps < 1:
            raise ProblemError(f"`steps` is {self.steps!r}; expected a whole number, at least one.")
        for name in ("tol", "constraint_tol"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not value > 0:
                raise ProblemError(f"`{name}` is {value!r}; expected a number above zero.")
        if self.learning is not None:
            if not isinstance(self.learning, Learning):
                raise ProblemError(
                    f"`learning` is a {type(self.learning).__name__}; pass `nm.Learning(...)`."
                )
            self.learning.check()
        if self.tracking and self.optimizer == "lbfgs":
            raise ProblemError(
                "`tracking` starts each solve from the last step's, which an optimizer of optax "
                "takes; the line search of L-BFGS needs solves that converge: leave one out."
            )
        if self.tracking and options.get("method") == "serial":
            raise ProblemError("`tracking` needs a method that sweeps, and 'serial' does not.")
        if self.tracking and options.get("stopping") is not None:
            raise ProblemError("`tracking` does one sweep a step: leave `stopping` out.")


class Iterations:
    """The iterations of one call of `control`, and what they count."""

    def __init__(self, problem: Steered, plan: Plan, report: Callable | None):
        self.problem, self.plan, self.report = problem, plan, report
        learning, self.objective = plan.learning, Objective(problem)
        self.jointly = learning is not None and learning.schedule == "joint"
        if learning is not None and self.jointly:
            self.objective = Objective(problem, learning.loss, learning.weight)
        self.costs: list[float] = []
        self.losses: list[float] = []
        self.sweeps: list[int] = []
        self.n_evaluations = 0
        self.guess: Array | None = None
        self.carry, self.state = SolveCarry(), None
        self._last: Found | None = None
        self._learn_state, self._learn_program = None, None

    def take(self, control: Any, args: PyTree) -> tuple[Any, PyTree, str]:
        """All of them: the control, the field's arguments, and how it ended. Collective."""
        learning = self.plan.learning
        if learning is None or learning.schedule == "joint":
            return self._steer(control, args)
        status, rounds = "", learning.rounds if learning.schedule == "alternating" else 1
        shares = np.diff(np.linspace(0, learning.steps, rounds + 1).astype(int))
        for share in shares.tolist():
            args = self._learn(args, share)
            control, args, status = self._steer(control, args)
        return control, args, status

    # ---- The control ----------------------------------------------------------------------------

    def _steer(self, control: Any, args: PyTree) -> tuple[Any, PyTree, str]:
        """Minimize, and update the multiplier of the constraint until it holds."""
        variables, rest = separate(control, args, jointly=self.jointly)
        if self.problem.cost.constraint is None:
            none = jnp.zeros((0,))
            ended = self._minimize(variables, rest, Penalty(none, jnp.zeros(())))
            return *combine(ended.variables, rest), ended.status
        return self._satisfy(variables, rest)

    def _satisfy(self, variables: Variables, rest: Rest) -> tuple[Any, PyTree, str]:
        """The augmented Lagrangian (Nocedal, Wright 2006, framework 17.3)."""
        control, args = combine(variables, rest)
        start = self.problem.solve(control, args, throw=False, check_ranks=False)
        cost, gap = self.problem.value(start.interface[-1])
        # A square of the gap that weighs ten times the cost is a strong pull, and no stiff one.
        weight = 10.0 * max(1.0, abs(float(cost))) / max(1.0, float(jnp.sum(gap**2)))
        penalty = Penalty(jnp.zeros_like(gap), jnp.asarray(weight, gap.dtype))
        before, status = math.inf, ""
        for number in range(MOST_ROUNDS):
            ended = self._minimize(variables, rest, penalty)
            variables, found = ended.variables, self._found(ended.variables, rest, penalty)
            left = float(jnp.max(jnp.abs(found.gap)))
            status = f"{ended.status}, the constraint holds to {left:.1e} in {number + 1} rounds"
            if left <= self.plan.constraint_tol or not math.isfinite(left):
                break
            multiplier = penalty.multiplier + penalty.weight * found.gap
            grown = penalty.weight * (_GROWTH if left > _PROGRESS * before else 1.0)
            penalty, before = Penalty(multiplier, grown), left
        else:
            status = f"not converged: {status}; allow more `steps`, or check that it can be reached"
        return *combine(variables, rest), status

    def _found(self, variables: Variables, rest: Rest, penalty: Penalty) -> Found:
        return self.objective.converged(variables, rest, penalty, self.guess)[2]

    def _minimize(self, variables: Variables, rest: Rest, penalty: Penalty) -> Minimum:
        if self.plan.optimizer == "lbfgs":
            return minimize_lbfgs(
                lambda point: self._evaluate(point, rest, penalty), variables,
                steps=self.plan.steps, tol=self.plan.tol, comm=self.problem.comm.control,
                report=self._iterated,
            )  # fmt: skip
        evaluate = self._follow if self.plan.tracking else self._evaluate_with
        ended, self.state, self.carry = minimize_optax(
            lambda point, carry: evaluate(point, rest, penalty, carry), variables,
            self._optimizer(variables), steps=self.plan.steps, carry=self.carry, state=self.state,
            report=self._iterated,
        )  # fmt: skip
        return ended

    def _optimizer(self, variables: Variables) -> optax.GradientTransformation:
        if variables.model is None:
            return self.plan.optimizer
        assert self.plan.learning is not None  # whose model it is
        labels = Variables(
            jax.tree.map(lambda _: "control", variables.control),
            jax.tree.map(lambda _: "model", variables.model),
        )
        own: dict[Hashable, optax.GradientTransformation] = {
            "control": self.plan.optimizer,
            "model": self.plan.learning.optimizer,
        }
        return optax.partition(own, labels)

    def _evaluate(self, point: Variables, rest: Rest, penalty: Penalty):
        value, gradient, found = self.objective.converged(point, rest, penalty, self.guess)
        assert found.interface is not None and found.sweeps is not None  # of a converged solve
        if bool(jnp.all(jnp.isfinite(found.interface))):
            self.guess = found.interface
        self.sweeps.append(int(found.sweeps))
        self._note(found)
        return value, gradient

    def _evaluate_with(self, point: Variables, rest: Rest, penalty: Penalty, carry: Any):
        return *self._evaluate(point, rest, penalty), carry

    def _follow(self, point: Variables, rest: Rest, penalty: Penalty, carry: SolveCarry):
        value, gradient, carry, found = self.objective.tracked(point, rest, penalty, carry)
        self.sweeps.append(1)
        self._note(found)
        return value, gradient, carry

    def _note(self, found: Found) -> None:
        self.n_evaluations += 1
        self._last = found

    def _iterated(self, step: int, value: float) -> None:
        """Keep and tell the cost of an iteration: of the point evaluated last."""
        del step
        found = self._last
        assert found is not None  # something was evaluated
        cost, loss = float(found.cost), float(found.loss)
        self.costs.append(cost)
        if self.jointly:
            self.losses.append(loss)
        if self.report is not None:
            told = {"stage": "control", "iteration": len(self.costs), "cost": cost, "value": value}
            self.report(told | ({"loss": loss} if self.jointly else {}))

    # ---- The model ------------------------------------------------------------------------------

    def _learn(self, args: PyTree, steps: int) -> PyTree:
        """Learn the model for `steps` optimizer steps. Collective."""
        learning = self.plan.learning
        assert learning is not None  # else there is no model to learn
        params, static = eqx.partition(args, eqx.is_inexact_array)
        if self._learn_program is None:

            @eqx.filter_jit
            def program(params, static):
                return jax.value_and_grad(lambda p: learning.loss(eqx.combine(p, static)))(params)

            self._learn_program = program

        def evaluate(params: PyTree, carry: Any) -> tuple[Array, PyTree, Any]:
            assert self._learn_program is not None
            return *self._learn_program(params, static), carry

        def report(step: int, value: float) -> None:
            self.losses.append(value)
            if self.report is not None:
                told = {"stage": "learning", "iteration": len(self.losses), "loss": value}
                self.report(told)

        ended, self._learn_state, _ = minimize_optax(
            evaluate, params, learning.optimizer, steps=steps, state=self._learn_state,
            report=report,
        )  # fmt: skip
        if len(ended.values) < steps:
            raise ProblemError(f"Learning {ended.status}: lower the rate of `learning.optimizer`.")
        return eqx.combine(ended.variables, static)
