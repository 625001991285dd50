"""Value and gradient of a control problem, by converged solves or by tracked ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nodepint_mpi.optimal_control.steered import Steered
from nodepint_mpi.parallel.methods.base import Carry, no_carry
from nodepint_mpi.parallel.tracking import LentCarry, SolveCarry, value_and_grad


class Variables(NamedTuple):
    """Arrays that an optimizer changes: of the control, and of the model if both are, else None."""

    control: PyTree
    model: PyTree = None


class Rest(NamedTuple):
    """What stays as it is: the other parts of the control, and all of the field's arguments that no
    optimizer changes."""

    control: PyTree
    args: PyTree


class Penalty(NamedTuple):
    """The augmented Lagrangian of the constraint: its multiplier, and the weight of its square."""

    multiplier: Float[Array, " constraints"]
    weight: Float[Array, ""]


class Found(NamedTuple):
    """What was found beside the value: cost, gap of the constraint, loss of learning, and in a
    converged solve the trajectory and its sweeps."""

    cost: Array
    gap: Array
    loss: Array
    interface: Array | None
    sweeps: Array | None


class Objective:
    """cost + penalty, or loss + weight * (cost + penalty) if the model is learned jointly."""

    def __init__(self, problem: Steered, loss: Callable | None = None, weight: float = 1.0):
        self.problem, self.loss, self.weight = problem, loss, weight
        self._converged: dict[bool, Callable] = {}
        self._tracked: Callable | None = None

    def converged(
        self, variables: Variables, rest: Rest, penalty: Penalty, guess: Array | None
    ) -> tuple[Array, Variables, Found]:
        """Value, gradient and more by solves that converge, from a guess. Collective."""
        guessed = guess is not None
        if guessed not in self._converged:
            self._converged[guessed] = eqx.filter_jit(self._make_converged)
        return self._converged[guessed](variables, rest, penalty, guess)

    def tracked(
        self, variables: Variables, rest: Rest, penalty: Penalty, carry: SolveCarry
    ) -> tuple[Array, Variables, SolveCarry, Found]:
        """The same from one sweep each way, as near as what is carried. Collective."""
        if self._tracked is None:
            self._tracked = eqx.filter_jit(self._make_tracked)
        return self._tracked(variables, rest, penalty, carry)

    def carry_like(self, variables: Variables, rest: Rest) -> Carry:
        """Shapes of the carry that a tracked step leaves. Local."""
        lent = LentCarry(no_carry(), None)
        control, args = combine(variables, rest)
        eqx.filter_eval_shape(
            lambda: self.problem.solve(control, args, carry=lent, check_ranks=False).interface
        )
        return lent.found[0]

    def _make_converged(self, variables, rest, penalty, guess):
        def value(variables: Variables) -> tuple[Array, Found]:
            control, args = combine(variables, rest)
            solution = self.problem.solve(
                control, args, guess=guess, throw=False, check_ranks=False
            )
            total, found = self._total(variables, args, penalty, solution.interface)
            return total, found._replace(sweeps=solution.record.n_sweeps)

        (total, found), gradient = jax.value_and_grad(value, has_aux=True)(variables)
        return total, gradient, found

    def _make_tracked(self, variables, rest, penalty, carry):
        def value(variables: Variables, lent: Any) -> tuple[Array, Found]:
            control, args = combine(variables, rest)
            solution = self.problem.solve(control, args, carry=lent, check_ranks=False)
            total, found = self._total(variables, args, penalty, solution.interface)
            return total, found._replace(interface=None)

        (total, found), gradient, carry = value_and_grad(value, has_aux=True)(variables, carry)
        return total, gradient, carry, found

    def _total(self, variables, args, penalty, interface) -> tuple[Array, Found]:
        cost, gap = self.problem.value(interface[-1])
        total = cost + jnp.sum(penalty.multiplier * gap)
        total = total + 0.5 * penalty.weight * jnp.sum(jnp.square(gap))
        loss = jnp.full_like(cost, jnp.nan)
        if variables.model is not None and self.loss is not None:
            loss = self.loss(args)
            total = loss + self.weight * total
        return total, Found(cost, gap, loss, interface, None)


def combine(variables: Variables, rest: Rest) -> tuple[Any, PyTree]:
    """The control and the field's arguments. Local."""
    control = eqx.combine(variables.control, rest.control)
    args = rest.args if variables.model is None else eqx.combine(variables.model, rest.args)
    return control, args


def separate(control: Any, args: PyTree, *, jointly: bool) -> tuple[Variables, Rest]:
    """The arrays to change, and the rest. Local."""
    of_control, rest_of_control = eqx.partition(control, eqx.is_inexact_array)
    if not jointly:
        return Variables(of_control), Rest(rest_of_control, args)
    of_model, rest_of_model = eqx.partition(args, eqx.is_inexact_array)
    return Variables(of_control, of_model), Rest(rest_of_control, rest_of_model)
