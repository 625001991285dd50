"""Propagators: the flow of a vector field over one time slice, fine or coarse, by diffrax."""

import abc
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Inexact, Int, Real

from nodepint_mpi.core.exogenous import hold, jumps_in, place_jumps, step_ends
from nodepint_mpi.core.noise import Increments
from nodepint_mpi.core.solvers import borrows_tolerances, check_solver, with_stage_loop
from nodepint_mpi.core.stochastic import StochasticField, through
from nodepint_mpi.core.terms import as_function
from nodepint_mpi.core.types import Field, Params, State
from nodepint_mpi.errors import ProblemError

AdjointKind = Literal["discrete", "continuous", "forward"]


class SliceResult(NamedTuple):
    """States inside a slice at the observation times, and the state at its end."""

    saves: Inexact[Array, "times *state"]
    end: Inexact[Array, "*state"]


class AbstractIntegrator(eqx.Module):
    """How a slice is stepped through: a diffrax solver and its step sizes.

    With `adjoint = "discrete"` derivatives are those of the discrete solve (checkpointed inside
    the slice); with `"continuous"` the adjoint ODE is solved backwards in time, which needs no
    memory for the slice but differs from the discrete derivative by the discretization error.
    `"forward"` is for tangents alone.
    """

    @abc.abstractmethod
    def for_tangents(self) -> "AbstractIntegrator":
        """The same steps, ready for forward-mode derivatives. Local."""

    def for_single_samples(self) -> "AbstractIntegrator":
        """The same steps, ready to be mapped over samples by `jax.vmap`. Local."""
        return self

    @abc.abstractmethod
    def integrate(
        self,
        field: Field,
        params: Params,
        start: State,
        t0: Array,
        t1: Array,
        ts: Array,
        increments: Increments | None = None,
    ) -> SliceResult:
        """Integrate `du/dt = field(t, u, params)` from `t0` to `t1`. Local.

        A solve that fails (non-finite values, more than `max_steps` steps) returns NaN. With
        `increments` of its steps the field is a `StochasticField`.
        """


class FixedSteps(AbstractIntegrator):
    """`n_steps` equal steps per slice, by diffrax's solver step by step."""

    solver: diffrax.AbstractSolver
    n_steps: int = eqx.field(static=True)
    adjoint: AdjointKind = eqx.field(static=True, default="discrete")
    checkpoints: int | None = eqx.field(static=True, default=None)
    """States kept per slice for the discrete adjoint; all `n_steps` unless given."""

    def __check_init__(self):
        check_solver(self.solver, stochastic=True)
        _check_count("n_steps", self.n_steps)
        _check_adjoint(self.adjoint, self.checkpoints)
        if borrows_tolerances(self.solver):
            raise ProblemError(
                f"The root finder of {type(self.solver).__name__} takes its tolerances from error "
                "control, which fixed steps do not have: give it its own, for instance "
                "`root_finder=diffrax.VeryChord(rtol=1e-8, atol=1e-8, norm=optimistix.max_norm)`."
            )

    def for_tangents(self):
        # diffrax's default loop over the stages has a custom reverse rule and no forward one.
        return FixedSteps(with_stage_loop(self.solver, "lax"), self.n_steps, "forward")

    def for_single_samples(self):
        if self.adjoint != "discrete":
            return self
        # The custom reverse rule, mapped over samples, makes a gradient with respect to all
        # parameters for each sample before it adds them up (measured: four times slower).
        solver = with_stage_loop(self.solver, "bounded")
        return FixedSteps(solver, self.n_steps, self.adjoint, self.checkpoints)

    def integrate(self, field, params, start, t0, t1, ts, increments=None):
        if increments is None:
            check_solver(self.solver)
        if self.adjoint == "continuous" and jumps_in(params):
            return self._step_by_step(field, params, start, t0, t1, ts)
        if self.adjoint == "continuous":
            return _diffeqsolve(
                field, params, start, t0, t1, ts, solver=self.solver,
                controller=diffrax.ConstantStepSize(), dt0=(t1 - t0) / self.n_steps,
                max_steps=self.n_steps + 2, adjoint=diffrax.BacksolveAdjoint(),
            )  # fmt: skip
        n_steps = self.n_steps

        def terms(of_step):
            return diffrax.ODETerm(field) if of_step is None else field.terms(of_step)  # type: ignore[attr-defined]

        grid = self._step_ends(t0, t1, params)
        jumps = jumps_in(params)  # then no slope of the step before is used
        # With few times, the steps these fall in are taken again; else every step is kept.
        few = self.checkpoints is None and 4 * ts.size < n_steps
        where = jnp.clip(jnp.searchsorted(grid, ts) - 1, 0, n_steps - 1)

        def step(carry, times):
            (u, state, succeeded), (left, right, of_step) = carry, times
            u, _, dense, state, result = self.solver.step(
                terms(of_step), left, right, u, hold(params, left, right), state, made_jump=jumps
            )
            succeeded = succeeded & (result == diffrax.RESULTS.successful)
            return (u, state, succeeded), (None if few else dense)

        first = terms(jax.tree.map(lambda x: x[0], increments))
        state = self.solver.init(first, grid[0], grid[1], start, hold(params, grid[0], grid[1]))
        carry, steps = (start, state, jnp.array(True)), (grid[:-1], grid[1:], increments)
        if few:
            read = jnp.zeros((ts.size, *start.shape), start.dtype)

            def step_and_read(carry, row):
                (begun, read), (times, number) = carry, row
                here = (where == number).reshape(-1, *[1] * start.ndim)
                read = jnp.where(here, begun[0], read)
                return (jax.checkpoint(step)(begun, times)[0], read), None

            rows = (steps, jnp.arange(n_steps, dtype=where.dtype))
            ((end, _, succeeded), read), _ = jax.lax.scan(step_and_read, (carry, read), rows)

            def retake(left, right, u, of_step):
                args, term = hold(params, left, right), terms(of_step)
                state = self.solver.init(term, left, right, u, args)
                return self.solver.step(term, left, right, u, args, state, made_jump=jumps)[2]

            taken = jax.tree.map(lambda x: x[where], increments)
            again = (grid[where], grid[where + 1], read, taken)
            dense = jax.vmap(retake)(*again) if ts.size else None
        elif self.checkpoints is None:
            (end, _, succeeded), dense = jax.lax.scan(jax.checkpoint(step), carry, steps)
            dense = jax.tree.map(lambda x: x[where], dense)
        else:
            (end, _, succeeded), dense = eqxi.scan(
                step, carry, steps, kind="checkpointed", checkpoints=self.checkpoints
            )
            dense = jax.tree.map(lambda x: x[where], dense)
        saves = jnp.zeros((0, *start.shape), start.dtype)
        if ts.size:
            saves = jax.vmap(self._interpolate)(ts, grid[where], grid[where + 1], dense)
        return SliceResult(_or_nan(succeeded, saves), _or_nan(succeeded, end))

    def _step_ends(self, t0, t1, params):
        grid = t0 + (t1 - t0) * (jnp.arange(self.n_steps + 1, dtype=t0.dtype) / self.n_steps)
        return step_ends(grid.at[-1].set(t1), params)

    def _step_by_step(self, field, params, start, t0, t1, ts):
        """With the adjoint equation solved step by step, from the state stored at each step's end:
        diffrax's adjoint of a whole slice would step over the jumps."""
        grid = self._step_ends(t0, t1, params)

        def step(u, times):
            left, right = times
            inside = jnp.clip(ts, left, right)
            result = _diffeqsolve(
                field, hold(params, left, right), u, left, right, inside, solver=self.solver,
                controller=diffrax.ConstantStepSize(), dt0=right - left, max_steps=3,
                adjoint=diffrax.BacksolveAdjoint(),
            )  # fmt: skip
            return result.end, result.saves

        end, saves = jax.lax.scan(step, start, (grid[:-1], grid[1:]))
        where = jnp.clip(jnp.searchsorted(grid, ts) - 1, 0, self.n_steps - 1)
        return SliceResult(saves[where, jnp.arange(ts.size)], end)

    def _interpolate(self, t, left, right, dense):
        return self.solver.interpolation_cls(t0=left, t1=right, **dense).evaluate(t)


class AdaptiveSteps(AbstractIntegrator):
    """Steps chosen by error control, anew in every slice."""

    solver: diffrax.AbstractAdaptiveSolver
    rtol: float = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    max_steps: int = eqx.field(static=True, default=4096)
    adjoint: AdjointKind = eqx.field(static=True, default="discrete")
    checkpoints: int | None = eqx.field(static=True, default=None)
    """States kept per slice for the discrete adjoint; diffrax's choice unless given."""

    def __check_init__(self):
        check_solver(self.solver)
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ProblemError(f"`{name}` is {value!r}; expected a number of at least zero.")
        if not self.rtol + self.atol > 0:
            raise ProblemError("`rtol` and `atol` are both zero; one must be greater.")
        _check_count("max_steps", self.max_steps)
        _check_adjoint(self.adjoint, self.checkpoints)
        if not isinstance(self.solver, diffrax.AbstractAdaptiveSolver):
            raise ProblemError(
                f"{type(self.solver).__name__} has no error estimate, so it cannot choose its "
                "steps: use fixed steps, or another solver such as Tsit5."
            )
        butcher = getattr(self.solver, "butcher", None)
        if butcher is not None and butcher.b_embedded is None:
            raise ProblemError(
                f"{type(self.solver).__name__} has no embedded error estimate, so it cannot choose "
                "its steps: use fixed steps, or another solver such as Tsit5."
            )

    def for_tangents(self):
        return AdaptiveSteps(self.solver, self.rtol, self.atol, self.max_steps, "forward")

    def integrate(self, field, params, start, t0, t1, ts, increments=None):
        if increments is not None:
            raise ProblemError("A stochastic equation needs fixed steps: `FixedSteps(solver, n)`.")
        return _diffeqsolve(
            field, params, start, t0, t1, ts, solver=self.solver,
            controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol), dt0=None,
            max_steps=self.max_steps, adjoint=self._adjoint(),
        )  # fmt: skip

    def _adjoint(self) -> diffrax.AbstractAdjoint:
        if self.adjoint == "continuous":
            return diffrax.BacksolveAdjoint()
        if self.adjoint == "forward":
            return diffrax.ForwardMode()
        return diffrax.RecursiveCheckpointAdjoint(self.checkpoints)


class Stay(AbstractIntegrator):
    """The state stays as it is: with it as coarse propagator, parareal is Picard's iteration.

    With slices of one step the sweep is  U[n+1] <- U[0] + sum of the increments of all steps, each
    from the last iterate: Picard's iteration on the integral equation.
    """

    def for_tangents(self):
        return self

    def integrate(self, field, params, start, t0, t1, ts, increments=None):
        del field, params, t0, t1, increments
        return SliceResult(jnp.broadcast_to(start, (*ts.shape, *start.shape)), start)


class Propagator(eqx.Module):
    """The flow of `field` over a slice, F (fine) or G (coarse). It may be a `diffrax.ODETerm`."""

    field: Field = eqx.field(static=True, converter=as_function)
    integrator: AbstractIntegrator

    n_sample_axes: ClassVar[int] = 0
    """Leading axes of a state that count samples which have nothing to do with each other."""

    def for_tangents(self) -> "Propagator":
        """The same flow, ready for forward-mode derivatives. Local."""
        return Propagator(self.field, self.integrator.for_tangents())

    def __call__(
        self,
        params: Params,
        start: State,
        t0: Real[Array, ""],
        length: Real[Array, ""],
        ts: Real[Array, " times"],
        index: Int[Array, ""] | None = None,
    ) -> SliceResult:
        """Propagate one state over one slice and read it at `ts`. Local.

        Steps are taken in the time since `t0`, so that they do not depend on where the slice lies;
        the field is given `t0` plus that time.

        Args:
            params: Parameters of the vector field.
            start: State at `t0`.
            t0: Left edge of the slice.
            length: Length of the slice.
            ts: Observation times counted from `t0`, in `[0, length]`, increasing; may be empty.
            index: Global index of the slice, for propagators that differ between slices.
        """

        def in_slice(function):
            def local(since, u, args):
                t0, params = args  # diffrax's continuous adjoint must not close over t0
                return function(jax.lax.stop_gradient(t0) + since, u, params)

            return local

        increments = None
        if isinstance(self.field, StochasticField):
            assert index is not None  # sweeps give it
            n_steps = getattr(self.integrator, "n_steps", 1)
            increments = self.field.draw(params, index, length, n_steps)
        field, zero = through(self.field, in_slice), jnp.zeros_like(length)
        params = place_jumps(params, jax.lax.stop_gradient(t0))
        return self.integrator.integrate(field, (t0, params), start, zero, length, ts, increments)


def _diffeqsolve(
    field, params, start, t0, t1, ts, *, solver, controller, dt0, max_steps, adjoint
) -> SliceResult:
    """One diffrax solve; NaN where it did not succeed."""
    n_times = ts.shape[0]
    if isinstance(adjoint, diffrax.BacksolveAdjoint) and n_times:
        saveat = diffrax.SaveAt(ts=jnp.append(ts, t1))
    elif n_times:
        inside, end = diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(t1=True)
        saveat = diffrax.SaveAt(subs=(inside, end))
    else:
        saveat = diffrax.SaveAt(t1=True)
    if isinstance(adjoint, diffrax.BacksolveAdjoint):
        field, params = _without_traced(field, params, start, t0)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field), solver, t0=t0, t1=t1, dt0=dt0, y0=start, args=params,
        saveat=saveat, stepsize_controller=controller, adjoint=adjoint, max_steps=max_steps,
        throw=False,
    )  # fmt: skip
    assert solution.ys is not None  # something was saved
    succeeded = solution.result == diffrax.RESULTS.successful
    if isinstance(solution.ys, tuple):
        saves, ends = solution.ys
    else:
        saves, ends = solution.ys[:-1], solution.ys[-1:]
    return SliceResult(_or_nan(succeeded, saves), _or_nan(succeeded, ends[0]))


def _without_traced(field: Field, params: Params, start: State, t0: Array) -> tuple[Field, Any]:
    """The field, with traced arrays without a derivative that it closes over moved to `params`.

    diffrax solves the adjoint ODE in a custom derivative, which must not close over traced arrays.
    """

    def is_traced(leaf: Any) -> bool:
        return isinstance(leaf, Tracer) and not eqx.is_inexact_array(leaf)

    converted = eqx.filter_closure_convert(field, t0, start, params)
    traced, rest = eqx.partition(converted, is_traced)
    if not jax.tree.leaves(traced):
        return field, params

    def given(t, u, args):
        traced, params = args
        return eqx.combine(traced, rest)(t, u, params)

    return given, (traced, params)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ProblemError(f"`{name}` is {value!r}; expected a whole number of at least one.")


def _check_adjoint(adjoint: Any, checkpoints: Any) -> None:
    if adjoint not in get_args(AdjointKind):
        known = ", ".join(map(repr, get_args(AdjointKind)))
        raise ProblemError(f"`adjoint` is {adjoint!r}; choose from {known}.")
    if checkpoints is not None:
        _check_count("checkpoints", checkpoints)


def _or_nan(succeeded: Bool[Array, ""], states: Array) -> Array:
    return jnp.where(succeeded, states, jnp.full_like(states, jnp.nan))
