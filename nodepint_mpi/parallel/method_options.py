"""The options of `solve`: what kind of thing each of them is, and the method they make."""

from typing import Any, NamedTuple, NoReturn

import diffrax
import jax
import numpy as np
from jaxtyping import PyTree
from mpi4py import MPI

from nodepint_mpi.core.propagators import AbstractIntegrator, Propagator
from nodepint_mpi.core.stopping import AbstractStopping, JumpTolerance
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import TimeComm, world_time_comm
from nodepint_mpi.parallel.methods import METHODS
from nodepint_mpi.parallel.methods.base import AbstractMethod, Parts
from nodepint_mpi.parallel.problem import ArrayField, as_field, check_field
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


def check_batch_axes(n_batch_axes: int, is_tree: bool, n_axes: int) -> None:
    """Refuse more batch axes than the state has. Local.

    Raises:
        ProblemError: with what was given and what the state is.
    """
    if n_batch_axes and is_tree:
        raise ProblemError("`n_batch_axes` is for a state that is one array, not for a tree.")
    if n_batch_axes > n_axes:
        raise ProblemError(f"`n_batch_axes` is {n_batch_axes}, but the state has {n_axes} axes.")


def default_stopping(stopping: AbstractStopping | None) -> AbstractStopping:
    """The rule of `solve` where none is given. Local."""
    return JumpTolerance(1e-8) if stopping is None else stopping


def make_method(
    options: MethodOptions, field: ArrayField, t0: float, args: PyTree
) -> AbstractMethod:
    """The method that checked options ask for, on the fields of arrays. Local.

    Raises:
        ProblemError: if an option is missing, or a field or a basis does not fit the state.
    """

    def bound(part: Any, name: str) -> Any:
        """With a field of arrays for the user's own."""
        if not isinstance(part, Propagator):
            return part
        own = as_field(part.field, field.layout, name)
        check_field(own, t0, args, name)
        return Propagator(own, part.integrator)

    def propagator(name: str) -> Propagator | None:
        steps = getattr(options, name)
        if steps is None or isinstance(steps, Propagator):
            return bound(steps, name)
        return Propagator(field, steps)

    if isinstance(options.method, AbstractMethod):
        method = jax.tree.map(
            lambda part: bound(part, "method"),
            options.method,
            is_leaf=lambda part: isinstance(part, Propagator),
        )
    else:
        method = METHODS[options.method].of(
            Parts(
                fine=Propagator(field, options.fine),
                coarse=propagator("coarse"),
                tangents=propagator("tangents"),
                basis=options.basis,
                complement=options.complement,
                recycle=options.recycle,
                precision=options.precision,
                trust=options.trust,
            )
        )
    if field.layout.is_tree and getattr(getattr(method, "basis", None), "n_batch_axes", 0):
        raise ProblemError("A state that is a tree of arrays has no batch axes to share.")
    state = jax.ShapeDtypeStruct(field.layout.shape, field.layout.dtype)
    method.carry_like(1, state)  # says if a basis does not fit the state
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
        hint = " A solver needs its steps."
    if isinstance(value, type):
        hint = f" `{value.__name__}` is a class: call it to make one."
    raise ProblemError(f"`{name}` is {_shown(value)}; expected {expected}.{hint}")
