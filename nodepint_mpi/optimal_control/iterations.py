"""The iterations of a control problem: optimizers, rounds of a constraint, learning in turns."""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
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
from nodepint_mpi.optimal_control.optimize import (
    NO_STEPS_LEFT,
    STOPPED,
    Minimum,
    minimize_lbfgs,
    minimize_optax,
)
from nodepint_mpi.optimal_control.progress import LEARNING, STEERING, Place, Progress
from nodepint_mpi.optimal_control.steered import Steered
from nodepint_mpi.parallel.tracking import SolveCarry

After = Callable[[dict[str, Any], Callable[[], Progress]], bool]
"""Called on every rank after each iteration with what it found, and a function that gives what the
next one begins with; true, on all ranks alike, ends the iterations."""

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
    """The iterations of one control problem, from `progress` on, and what they count."""

    def __init__(self, problem: Steered, plan: Plan, after: After | None):
        self.problem, self.plan, self.after = problem, plan, after
        learning, self.objective = plan.learning, Objective(problem)
        self.jointly = learning is not None and learning.schedule == "joint"
        if learning is not None and self.jointly:
            self.objective = Objective(problem, learning.loss, learning.weight)
        self.costs: list[float] = []
        self.losses: list[float] = []
        self.sweeps: list[int] = []
        self.is_stopped = False
        self._last: Found | None = None
        self._learn_program = None
        self._now = Progress(Place(), None, None)

    def take(self, progress: Progress) -> tuple[Any, PyTree, str]:
        """All that are left: the control, the field's arguments, and how it ended. Collective."""
        self._now = progress
        learning = self.plan.learning
        if learning is None or learning.schedule == "joint":
            return self._steer()
        status, rounds = "", learning.rounds if learning.schedule == "alternating" else 1
        shares = np.diff(np.linspace(0, learning.steps, rounds + 1).astype(int)).tolist()
        for turn in range(progress.place.turn, rounds):
            place = self._now.place
            if turn > place.turn or place.stage == LEARNING:
                done = place.done if turn == place.turn else 0
                self._learn(turn, shares[turn], done)
                if self.is_stopped:
                    return self._now.control, self._now.args, STOPPED
                self._now = self._now._replace(place=Place(turn, STEERING), slope=math.nan)
            *_, status = self._steer()
            if self.is_stopped:
                break
        return self._now.control, self._now.args, status

    @property
    def n_evaluations(self) -> int:
        """Solves with their gradients so far. Local."""
        return self._now.n_evaluations

    def start(self, control: Any, args: PyTree) -> Progress:
        """What the first iteration begins with. Local."""
        in_turns = self.plan.learning is not None and not self.jointly
        return Progress(Place(stage=LEARNING if in_turns else STEERING), control, args)

    def blank(self, control: Any, args: PyTree) -> Progress:
        """The shapes of all that there can be in a `Progress`, with zeros. Local."""
        variables, rest = separate(control, args, jointly=self.jointly)
        state = learner = carry = None
        if not self.plan.is_lbfgs:
            with jax.numpy_dtype_promotion("standard"):
                state = self._optimizer(variables).init(variables)
        if self.plan.learning is not None and not self.jointly:
            params = eqx.filter(args, eqx.is_inexact_array)
            with jax.numpy_dtype_promotion("standard"):
                learner = self.plan.learning.optimizer.init(params)
        interface = eqx.filter_eval_shape(
            lambda: self.problem.solve(control, args, throw=False, check_ranks=False).interface
        )
        guess = jnp.zeros(interface.shape, interface.dtype)
        end = eqx.filter_eval_shape(self.problem.value, guess[-1])[1]
        penalty = Penalty(jnp.zeros(end.shape, end.dtype), jnp.zeros((), end.dtype))
        if self.plan.tracking:
            like = self.objective.carry_like(variables, rest)
            carry = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        return Progress(
            Place(), control, args, state, learner,
            penalty if self.problem.cost.constraint is not None else None, guess=guess, carry=carry,
        )  # fmt: skip

    # ---- The control ----------------------------------------------------------------------------

    def _steer(self) -> tuple[Any, PyTree, str]:
        """Minimize, and update the multiplier of the constraint until it holds."""
        variables, rest = separate(self._now.control, self._now.args, jointly=self.jointly)
        if self.problem.cost.constraint is None:
            none = Penalty(jnp.zeros((0,)), jnp.zeros(()))
            ended = self._minimize(variables, rest, none)
            return *self._keep(ended.variables, rest), ended.status
        return self._satisfy(variables, rest)

    def _keep(self, variables: Variables, rest: Rest) -> tuple[Any, PyTree]:
        """Note the control and the arguments that an optimizer has ended with."""
        control, args = combine(variables, rest)
        self._now = self._now._replace(control=control, args=args)
        return control, args

    def _satisfy(self, variables: Variables, rest: Rest) -> tuple[Any, PyTree, str]:
        """The augmented Lagrangian (Nocedal, Wright 2006, framework 17.3)."""
        penalty, first = self._now.penalty, self._now.place.round
        if penalty is None or (first == 0 and self._now.place.done == 0):
            penalty = self._first_penalty(*combine(variables, rest))
            self._now = self._now._replace(penalty=penalty, gap=math.inf)
        status = ""
        for number in range(first, MOST_ROUNDS):
            ended = self._minimize(variables, rest, penalty)
            variables, found = ended.variables, self._found(ended.variables, rest, penalty)
            self._keep(variables, rest)
            left = float(jnp.max(jnp.abs(found.gap)))
            status = f"{ended.status}, the constraint holds to {left:.1e} in {number + 1} rounds"
            if self.is_stopped or left <= self.plan.constraint_tol or not math.isfinite(left):
                break
            multiplier = penalty.multiplier + penalty.weight * found.gap
            grown = penalty.weight * (_GROWTH if left > _PROGRESS * self._now.gap else 1.0)
            penalty = Penalty(multiplier, grown)
            place = self._now.place._replace(round=number + 1, done=0)
            self._now = self._now._replace(penalty=penalty, gap=left, place=place, slope=math.nan)
        else:
            status = f"not converged: {status}; allow more `steps`, or check that it can be reached"
        return *combine(variables, rest), status

    def _first_penalty(self, control: Any, args: PyTree) -> Penalty:
        start = self.problem.solve(control, args, throw=False, check_ranks=False)
        cost, gap = self.problem.value(start.interface[-1])
        # A square of the gap that weighs ten times the cost is a strong pull, and no stiff one.
        weight = 10.0 * max(1.0, abs(float(cost))) / max(1.0, float(jnp.sum(gap**2)))
        return Penalty(jnp.zeros_like(gap), jnp.asarray(weight, gap.dtype))

    def _found(self, variables: Variables, rest: Rest, penalty: Penalty) -> Found:
        return self.objective.converged(variables, rest, penalty, self._now.guess)[2]

    def _minimize(self, variables: Variables, rest: Rest, penalty: Penalty) -> Minimum:
        steps = self.plan.steps - self._now.place.done
        if steps < 1:
            return Minimum(variables, [], NO_STEPS_LEFT, 0)

        def report(value: float, point: Variables, state: Any, carry: Any) -> bool:
            self._now = self._now._replace(state=state)
            if isinstance(carry, SolveCarry):
                self._now = self._now._replace(carry=carry.carry)
            self._keep(point, rest)
            return self._iterated(value)

        if self.plan.is_lbfgs:

            def evaluate(point: Variables) -> tuple[Array, Variables]:
                found = self._evaluate(point, rest, penalty)
                if math.isnan(self._now.slope):  # as `minimize_lbfgs` takes it
                    largest = jnp.max(jnp.abs(ravel_pytree(found[1])[0]), initial=0.0)
                    self._now = self._now._replace(slope=float(largest))
                return found

            return minimize_lbfgs(
                evaluate, variables, steps=steps, tol=self.plan.tol, slope=self._now.slope,
                comm=self.problem.comm.control, report=report,
            )  # fmt: skip
        follows = self._follow if self.plan.tracking else self._evaluate_with
        carry = SolveCarry() if self._now.carry is None else SolveCarry(self._now.carry)
        ended, state, carry = minimize_optax(
            lambda point, carry: follows(point, rest, penalty, carry), variables,
            self._optimizer(variables), steps=steps, carry=carry, state=self._now.state,
            report=report,
        )  # fmt: skip
        self._now = self._now._replace(state=state)
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
        value, gradient, found = self.objective.converged(point, rest, penalty, self._now.guess)
        assert found.interface is not None and found.sweeps is not None  # of a converged solve
        if bool(jnp.all(jnp.isfinite(found.interface))):
            self._now = self._now._replace(guess=found.interface)
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
        self._now = self._now._replace(n_evaluations=self._now.n_evaluations + 1)
        self._last = found

    def _iterated(self, value: float) -> bool:
        """Keep and tell the cost of an iteration: of the point evaluated last."""
        found = self._last
        assert found is not None  # something was evaluated
        cost, loss = float(found.cost), float(found.loss)
        self.costs.append(cost)
        if self.jointly:
            self.losses.append(loss)
        told = {"stage": STEERING, "iteration": len(self.costs), "cost": cost, "value": value}
        if found.gap.size:
            told["gap"] = float(jnp.max(jnp.abs(found.gap)))
        return self._tell(told | ({"loss": loss} if self.jointly else {}))

    def _tell(self, told: dict[str, Any]) -> bool:
        """Count an iteration and tell of it; whether to stop."""
        now = self._now
        place = now.place._replace(done=now.place.done + 1)
        self._now = now._replace(place=place, n_total=now.n_total + 1)
        self.is_stopped = self.after is not None and self.after(told, lambda: self._now)
        return self.is_stopped

    # ---- The model ------------------------------------------------------------------------------

    def _learn(self, turn: int, steps: int, done: int) -> None:
        """Learn the model for the optimizer steps that are left of `steps`. Collective."""
        learning = self.plan.learning
        assert learning is not None  # else there is no model to learn
        self._now = self._now._replace(place=Place(turn, LEARNING, 0, done))
        params, static = eqx.partition(self._now.args, eqx.is_inexact_array)
        if self._learn_program is None:

            @eqx.filter_jit
            def program(params, static):
                return jax.value_and_grad(lambda p: learning.loss(eqx.combine(p, static)))(params)

            self._learn_program = program

        def evaluate(params: PyTree, carry: Any) -> tuple[Array, PyTree, Any]:
            assert self._learn_program is not None
            return *self._learn_program(params, static), carry

        def report(value: float, params: PyTree, state: Any, carry: Any) -> bool:
            del carry
            self.losses.append(value)
            self._now = self._now._replace(args=eqx.combine(params, static), learner=state)
            return self._tell({"stage": LEARNING, "iteration": len(self.losses), "loss": value})

        ended, _, _ = minimize_optax(
            evaluate, params, learning.optimizer, steps=steps - done, state=self._now.learner,
            report=report,
        )  # fmt: skip
        if len(ended.values) < steps - done and not self.is_stopped:
            raise ProblemError(f"Learning {ended.status}: lower the rate of `learning.optimizer`.")
