"""The options of `solve`: what kind of thing each of them is, and the method they make."""

from typing import Any, NamedTuple, NoReturn

import diffrax
import jax
import numpy as np
from jaxtyping import PyTree
from mpi4py import MPI

from nodepint_mpi.core.each_sample import EachSample, SampleField
from nodepint_mpi.core.propagators import AbstractIntegrator, Propagator
from nodepint_mpi.core.solvers import check_solver
from nodepint_mpi.core.stochastic import StochasticField
from nodepint_mpi.core.stopping import AbstractStopping, JumpTolerance
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import TimeComm, world_time_comm
from nodepint_mpi.parallel.methods import METHODS
from nodepint_mpi.parallel.methods.base import BASIS, AbstractMethod, Parts
from nodepint_mpi.parallel.noise import Noise, StochasticPart, check_diffusion
from nodepint_mpi.parallel.problem import ArrayField, StateLayout, as_field, check_field
from nodepint_mpi.parallel.samples import Samples
from nodepint_mpi.parallel.shared_basis import SharedBasis

_PRECISIONS = "float16", "bfloat16", "float32", "float64"
_STEPS = "`FixedSteps(solver, n_steps)` or `AdaptiveSteps(solver, rtol, atol)`"


class MethodOptions(NamedTuple):
    """What the caller of `solve` said about propagators and method, by the same names."""

    method: Any
    fine: Any
    coarse: Any = None
    tangents: Any = None
    basis: Any = None
    complement: Any = False
    recycle: Any = True
    precision: Any = None
    trust: Any = 0.5


class Numbers(NamedTuple):
    """What the caller of `solve` said about when and how to iterate, by the same names."""

    stopping: Any
    adjoint_tol: Any
    slices_at_once: Any
    throw: Any
    n_batch_axes: Any


def check_comm(comm: Any) -> TimeComm:
    """The line of ranks to solve on. Local, but for the line of the world the first time.

    Raises:
        ProblemError: if it is something else, or has been freed.
    """
    if comm is None:
        return world_time_comm()
    if not isinstance(comm, TimeComm):
        line = "a line of ranks from `make_time_comm`, or None for the whole world"
        made = "`nm.make_time_comm(comm)`, made once, a line of ranks"
        _refuse("comm", comm, made if isinstance(comm, MPI.Comm) else line)
    if comm.is_free:
        raise ProblemError("`comm` has been freed; make another with `make_time_comm`.")
    return comm


def check_basis_ranks(
    comm: TimeComm,
    method: AbstractMethod,
    state: jax.ShapeDtypeStruct,
    *,
    have_others: bool = False,
) -> None:
    """Refuse ranks that share tangents where some of them would have none. Local.

    With `have_others` they share something besides, and a method without tangents passes.

    `Serial`, which others are compared with, passes: these ranks then all do the same.

    Raises:
        ProblemError: if the method has no tangents, or fewer than there are such ranks.
    """
    if comm.n_basis == 1 or not method.iterates:
        return
    if not method.shares_tangents:
        if have_others:
            return
        raise ProblemError(
            f"{comm.n_basis} ranks are to share the tangents of every slice, and "
            f"{type(method).__name__} has none: take `method='tangent'`, or one basis rank."
        )
    basis = method.carry_like(1, state).replicated.get(BASIS)
    if basis is not None and len(basis) < comm.n_basis:
        raise ProblemError(
            f"{comm.n_basis} ranks cannot share {len(basis)} directions: take at most as many "
            "basis ranks as the basis has directions."
        )


def require_one_basis_rank(comm: TimeComm, name: str) -> None:
    """Refuse ranks that share tangents where nobody looks for them. Local.

    Raises:
        ProblemError: with the name of what was called.
    """
    if comm.n_basis > 1:
        raise ProblemError(
            f"`{name}` does not share tangents among ranks: give it a line with one basis rank, "
            "`make_time_comm(mpi)`."
        )


def check_method_options(options: MethodOptions) -> None:
    """Refuse options of a wrong kind. Local.

    Raises:
        ProblemError: with the option, what it is and what was expected.
    """
    if not isinstance(options.fine, AbstractIntegrator):
        _refuse("fine", options.fine, _STEPS)
    for name in ("coarse", "tangents"):
        value = getattr(options, name)
        if not isinstance(value, (AbstractIntegrator, Propagator, type(None))):
            _refuse(name, value, f"{_STEPS}, or `Propagator(field, steps)`")
    _check_method(options)
    if not isinstance(options.basis, (SharedBasis, type(None))):
        _refuse("basis", options.basis, "a basis such as `SharedBasis('pod', rank=8, n_new=2)`")
    for name in ("complement", "recycle"):
        _check_flag(name, getattr(options, name))
    if options.precision is not None and options.precision not in _PRECISIONS:
        _refuse("precision", options.precision, f"None or one of {', '.join(_PRECISIONS)}")
    if options.trust is not None and not (_is_number(options.trust) and options.trust > 0):
        _refuse("trust", options.trust, "None or a number greater than zero")


def check_numbers(numbers: Numbers) -> None:
    """Refuse numbers of a wrong kind. Local.

    Raises:
        ProblemError: with the option, what it is and what was expected.
    """
    if not isinstance(numbers.stopping, (AbstractStopping, type(None))):
        _refuse("stopping", numbers.stopping, "a rule such as `JumpTolerance(1e-6)`")
    if not (_is_number(numbers.adjoint_tol) and numbers.adjoint_tol >= 0):
        _refuse("adjoint_tol", numbers.adjoint_tol, "a number of at least zero")
    n = numbers.slices_at_once
    if n is not None and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
        _refuse("slices_at_once", n, "None or a whole number of at least one")
    _check_flag("throw", numbers.throw)
    n = numbers.n_batch_axes
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
        _refuse("n_batch_axes", n, "a whole number of at least zero")


def check_tracked(
    numbers: Numbers, guess: Any, method: AbstractMethod, noise: Noise | None = None
) -> None:
    """Refuse options that a solve with a carry does not take. Local.

    Raises:
        ProblemError: with the option, or the method that carries nothing.
    """
    if noise is not None and noise.step is not None:
        raise ProblemError(
            "`noise.step` makes other paths in each step, and `carry` starts from the states of "
            "the last one: leave one of them out."
        )
    for name, value in {"guess": guess, "stopping": numbers.stopping}.items():
        if value is not None:
            raise ProblemError(
                f"`{name}` is given together with `carry`: a tracked solve does one sweep from "
                f"what is carried. Leave `{name}` out."
            )
    if not method.iterates:
        raise ProblemError(
            f"{type(method).__name__} does no sweeps and so carries nothing: leave `carry` out, or "
            "take another `method` such as 'parareal'."
        )


def default_stopping(stopping: AbstractStopping | None) -> AbstractStopping:
    """The rule of `solve` where none is given. Local."""
    return JumpTolerance(1e-8) if stopping is None else stopping


class Fields(NamedTuple):
    """What makes fields of arrays of the user's own: layout of the state, of one sample if there
    are `samples`; a time and `args` to check them with; the array of all states."""

    layout: StateLayout
    t0: float
    args: PyTree
    state: jax.ShapeDtypeStruct
    samples: Samples | None
    stochastic: StochasticPart | None = None

    def bind(self, field: Any, name: str = "field") -> ArrayField | StochasticField | SampleField:
        """The field of arrays, checked. Local.

        Raises:
            ProblemError: if it does not fit the state.
        """
        drift = as_field(field, self.layout, name)
        args = self.args if self.samples is None else self.samples.args_of_one(self.args)
        if self.stochastic is None:
            check_field(drift, self.t0, args, name)
            own = drift
        else:
            check_field(drift, self.t0, args.args, name)
            own = self.stochastic.field(drift, self.layout)
            check_diffusion(own, self.layout, self.t0, args)
        return own if self.samples is None else SampleField(own, self.samples.axes)

    def propagator(self, field: Field, steps: AbstractIntegrator) -> Propagator:
        """The propagator of a bound field. Local."""
        return Propagator(field, steps) if self.samples is None else EachSample(field, steps)


def make_method(options: MethodOptions, fields: Fields, field: Field) -> AbstractMethod:
    """The method that checked options ask for, on the fields of arrays. Local.

    Raises:
        ProblemError: if an option is missing, or a field or a basis does not fit the state.
    """

    def bound(part: Any, name: str) -> Any:
        """With a field of arrays for the user's own."""
        if not isinstance(part, Propagator):
            return part
        return fields.propagator(fields.bind(part.field, name), part.integrator)

    def propagator(name: str) -> Propagator | None:
        steps = getattr(options, name)
        if steps is None or isinstance(steps, Propagator):
            return bound(steps, name)
        return fields.propagator(field, steps)

    if isinstance(options.method, AbstractMethod):
        method = jax.tree.map(
            lambda part: bound(part, "method"),
            options.method,
            is_leaf=lambda part: isinstance(part, Propagator),
        )
    else:
        method = METHODS[options.method].of(
            Parts(
                fine=fields.propagator(field, options.fine),
                coarse=propagator("coarse"),
                tangents=propagator("tangents"),
                basis=options.basis,
                complement=options.complement,
                recycle=options.recycle,
                precision=options.precision,
                trust=options.trust,
            )
        )
    n_shared = getattr(getattr(method, "basis", None), "n_batch_axes", 0)
    if n_shared and fields.layout.is_tree and fields.samples is None:
        raise ProblemError("A state that is a tree of arrays has no batch axes to share.")
    method.carry_like(1, fields.state)  # says if a basis does not fit the state
    return method


def _check_method(options: MethodOptions) -> None:
    """A name, or a method that is whole; options belong to a name."""
    method = options.method
    if isinstance(method, AbstractMethod):
        for name, default in MethodOptions._field_defaults.items():
            if getattr(options, name) is not default and getattr(options, name) != default:
                raise ProblemError(
                    f"`{name}` is an option of methods given by name; give it to "
                    f"`{type(method).__name__}` when you make it."
                )
    elif not isinstance(method, str) or method not in METHODS:
        *known, last = map(repr, METHODS)
        raise ProblemError(
            f"`method` is {_shown(method)}; choose {', '.join(known)} or {last}, or pass a method "
            "such as `Parareal(Propagator(field, steps))`."
        )


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        _refuse(name, value, "True or False")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return (
        repr(value)
        if isinstance(value, (str, int, float, type(None)))
        else f"a {type(value).__name__}"
    )


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    hint = ""
    if isinstance(value, diffrax.AbstractSolver):
        check_solver(value)
        solver = f"diffrax.{type(value).__name__}()"
        hint = (
            " A solver does not say how many steps it takes through a slice: write "
            f"`{name}=nm.FixedSteps({solver}, n_steps)`"
        )
        if isinstance(value, diffrax.AbstractAdaptiveSolver):
            hint += f" or `{name}=nm.AdaptiveSteps({solver}, rtol=1e-6, atol=1e-9)`"
        hint += "."
    if isinstance(value, type):
        hint = f" `{value.__name__}` is a class: call it to make one."
    raise ProblemError(f"`{name}` is {_shown(value)}; expected {expected}.{hint}")
