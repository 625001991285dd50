"""A network of oscillators on a long horizon, steered by plain diffrax and by our sweeps.

theta_i' = omega_i + coupling / d * sum_j K_ij sin(theta_j - theta_i) + (B c)_i: groups of
oscillators are pushed so that all follow a pace. Written with two products by K, a step costs
8 d^2 multiplications for RK4.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from nodepint_mpi.bench.control_contestant import TimedCase
from nodepint_mpi.core.controls import PiecewiseLinear
from nodepint_mpi.core.costs import Cost
from nodepint_mpi.core.propagators import FixedSteps, Propagator
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.core.stopping import JumpTolerance
from nodepint_mpi.optimal_control.gradients import with_gradient
from nodepint_mpi.optimal_control.objective import Objective, Penalty, combine, separate
from nodepint_mpi.optimal_control.optimize import minimize_lbfgs, minimize_optax
from nodepint_mpi.optimal_control.steered import Steered, state_control_problem
from nodepint_mpi.parallel.comms import TimeComm
from nodepint_mpi.parallel.tracking import SolveCarry

Timed = tuple[list[float], list[np.ndarray], list[int], float]
"""Seconds when each point was evaluated, the points, sweeps of each, and seconds of compiling."""

N_CALLS = 9
COUPLING, PACE, ENERGY = 1.5, 1.0, 0.02


def oscillators(case: TimedCase) -> tuple[Callable, np.ndarray]:
    """The field `field(t, u, c, args)` and the initial phases. Local."""
    draw = np.random.default_rng(0)
    coupling = COUPLING / case.d * draw.uniform(0.0, 2.0, (case.d, case.d))
    own = draw.normal(PACE, 0.4, case.d)
    groups = np.eye(case.n_controls)[np.arange(case.d) % case.n_controls]

    def field(t: Any, u: Array, c: Array, args: Any) -> Array:
        del t, args
        sines, cosines = jnp.sin(u), jnp.cos(u)
        pulls = cosines * (coupling @ sines) - sines * (coupling @ cosines)
        return jnp.asarray(own) + pulls + jnp.asarray(groups) @ c

    return field, draw.uniform(-2.0, 2.0, case.d)


def pacing_cost(case: TimedCase) -> Cost:
    """Mean square of the distance to the pace, on the circle, and the energy of the pushes."""

    def running(t: Array, u: Array, c: Array) -> Array:
        away = jnp.mean(1 - jnp.cos(u - PACE * t))
        return (away + ENERGY * jnp.sum(jnp.square(c))) / case.horizon

    return Cost(running=running)


class Oscillators:
    """The problem, and both ways to find its control. Collective over `comm` to use."""

    def __init__(self, case: TimedCase, comm: TimeComm):
        self.case, self.comm = case, comm
        self.field, self.start = oscillators(case)
        self.nodes = np.linspace(0.0, case.horizon, case.n_nodes)
        first = PiecewiseLinear(self.nodes, np.zeros((case.n_nodes, case.n_controls)))
        self.variables, self.rest = separate(first, None, jointly=False)
        self.cost_of = jax.jit(self._plain_cost)

    def _plain_cost(self, values: Array) -> Array:
        """The cost of values at the nodes, by one serial diffrax solve over the horizon."""
        case, cost = self.case, pacing_cost(self.case)
        assert cost.running is not None

        def field(t: Any, state: Array, values: Array) -> Array:
            c = PiecewiseLinear(self.nodes, values)(t, state)
            along = cost.running(t, state[:-1], c)  # type: ignore[misc]
            return jnp.append(self.field(t, state[:-1], c, None), along)

        n = case.n_slices * case.fine_steps
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), RK4(), 0.0, case.horizon, case.horizon / n,
            jnp.append(jnp.asarray(self.start), 0.0), values, max_steps=n + 2,
            adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=n),
        )  # fmt: skip
        assert solution.ys is not None
        return solution.ys[-1, -1]

    def plain(self, optimizer: str, steps: int) -> Timed:
        """By diffrax and `jax.grad` in one process. Local."""
        compiled = jax.jit(jax.value_and_grad(self._plain_cost))

        def evaluate(point: PyTree, carry: Any) -> tuple[Array, PyTree, Any, int]:
            value, slope = compiled(point.control.values)
            return value, self._like(slope), carry, 1

        return self._run(evaluate, optimizer, steps)

    def ours(self, optimizer: str, steps: int) -> Timed:
        """By converged solves with L-BFGS, else by tracked ones. Collective."""
        objective = Objective(self.steered(optimizer != "lbfgs"))
        none = Penalty(jnp.zeros(0), jnp.zeros(()))

        def converged(point: PyTree, guess: Any) -> tuple[Array, PyTree, Any, int]:
            value, slope, found = objective.converged(point, self.rest, none, guess)
            return value, slope, found.interface, int(found.sweeps)  # type: ignore[arg-type]

        def tracked(point: PyTree, carry: Any) -> tuple[Array, PyTree, Any, int]:
            carry = SolveCarry() if carry is None else carry
            value, slope, carry, _ = objective.tracked(point, self.rest, none, carry)
            return value, slope, carry, 1

        return self._run(converged if optimizer == "lbfgs" else tracked, optimizer, steps)

    def steered(self, tracking: bool) -> Steered:
        """What is solved by sweeps. Local."""
        case = self.case
        first = PiecewiseLinear(self.nodes, np.zeros((case.n_nodes, case.n_controls)))
        options: dict[str, Any] = {
            "fine": with_gradient(FixedSteps(RK4(), case.fine_steps), "dp"),
            "coarse": FixedSteps(diffrax.Euler(), 1), "method": "parareal",
        }  # fmt: skip
        if not tracking:
            options |= {"stopping": JumpTolerance(1e-5), "adjoint_tol": 1e-4}
        edges = np.linspace(0.0, case.horizon, case.n_slices + 1)
        return state_control_problem(
            self.field, jnp.asarray(self.start), edges, pacing_cost(case), first, None, options,
            self.comm,
        )  # fmt: skip

    def costs(self, width: int) -> dict[str, float]:
        """Least seconds of a slice on this core, `width` of them at once. Local.

        Of pull-backs with the forward steps before them. The coarse ones follow each other.
        """
        problem = self.steered(True)
        fine = Propagator(problem.field, problem.options["fine"])
        coarse = Propagator(problem.field, problem.options["coarse"])
        length, empty = jnp.asarray(self.case.horizon / self.case.n_slices), jnp.zeros(0)
        starts = jnp.tile(problem.initial, (width, 1))

        def all_ends(propagator: Propagator, control: Any, starts: Array) -> Array:
            times = length * jnp.arange(width)
            return jax.vmap(
                lambda u, t: propagator((control, None), u, t, length, empty).end
            )(starts, times)  # fmt: skip

        def walked(control: Any, starts: Array) -> Array:
            def advance(u: Array, t: Array) -> tuple[Array, None]:
                return coarse((control, None), u, t, length, empty).end, None

            return jax.lax.scan(advance, starts[0], length * jnp.arange(width))[0]

        def pulled(ends: Callable) -> Callable:
            def back(control: Any, starts: Array) -> Any:
                found, pull_back = jax.vjp(ends, control, starts)
                return pull_back(jnp.ones_like(found))

            return back

        fine_ends = partial(all_ends, fine)
        wanted = {
            "fine_s": fine_ends, "pulled_s": pulled(fine_ends), "coarse_s": walked,
            "copulled_s": pulled(walked),
        }  # fmt: skip
        control = combine(self.variables, self.rest)[0]
        return {name: _least_s(of, control, starts) / width for name, of in wanted.items()}

    def _like(self, values: Array) -> PyTree:
        _, unravel = ravel_pytree(self.variables)
        return unravel(jnp.ravel(values))

    def _run(self, evaluate: Callable, optimizer: str, steps: int) -> Timed:
        """Minimize, with a clock that starts when everything is compiled."""
        seconds: list[float] = []
        points: list[Any] = []
        sweeps: list[int] = []
        began, memory = time.perf_counter(), None

        def watched(point: PyTree, carry: Any) -> tuple[Array, PyTree, Any]:
            value, slope, carry, n_sweeps = evaluate(point, carry)
            value = jax.block_until_ready(value)
            seconds.append(time.perf_counter() - began)
            points.append(point.control.values)
            sweeps.append(n_sweeps)
            return value, slope, carry

        def remembered(point: PyTree) -> tuple[Array, PyTree]:
            nonlocal memory
            value, slope, memory = watched(point, memory)
            return value, slope

        rules = {
            "adam": optax.adam(self.case.rate, b1=0.9, b2=0.99),
            "quasi-newton": optax.chain(optax.scale_by_lbfgs(10), optax.scale(-1.0)),
        }

        def minimize(steps: int) -> None:
            if optimizer in rules:
                minimize_optax(watched, self.variables, rules[optimizer], steps=steps)
            else:
                minimize_lbfgs(
                    remembered, self.variables, steps=steps, tol=1e-7, comm=self.comm.control
                )

        minimize(2)
        compiled_s = time.perf_counter() - began
        for noted in (seconds, points, sweeps):
            noted.clear()
        self.comm.control.Barrier()
        began, memory = time.perf_counter(), None
        minimize(steps)
        return seconds, [np.asarray(point) for point in points], sweeps, compiled_s


def _least_s(of: Callable, *arguments: Any) -> float:
    """The least seconds of some calls, for the machine may be busy with others. Local."""
    compiled, found = jax.jit(of), []
    jax.block_until_ready(compiled(*arguments))
    for _ in range(N_CALLS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        found.append(time.perf_counter() - began)
    return min(found)
