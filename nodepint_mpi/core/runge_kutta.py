"""Explicit Runge-Kutta methods that diffrax lacks: RK4, Chebyshev, and any Butcher tableau."""

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from numpy.typing import ArrayLike

from nodepint_mpi.errors import ProblemError


class Tableau(NamedTuple):
    """Butcher tableau of an explicit method; `a[i]` has i entries. Make one by `make_tableau`."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    b_embedded: tuple[float, ...] | None
    c: tuple[float, ...]


class AbstractExplicitRungeKutta(diffrax.AbstractAdaptiveSolver):
    """A diffrax solver from a tableau, its stages written out one by one.

    For small states this compiles and runs faster than diffrax's own loop over stages. Times
    inside a step are read from the cubic Hermite interpolant, whose slope at the end of the step
    is evaluated only where somebody reads it.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable] = diffrax.ThirdOrderHermitePolynomialInterpolation

    @property
    @abc.abstractmethod
    def butcher(self) -> Tableau:
        """The method's tableau."""

    def init(self, terms, t0, t1, y0, args) -> None:
        del terms, t0, t1, y0, args

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        tableau, h = self.butcher, terms.contr(t0, t1)
        increments = []
        for row, c in zip(tableau.a, tableau.c, strict=True):
            stage = _advance(y0, row, increments)
            increments.append(terms.vf_prod(t0 + c * (t1 - t0), stage, args, h))
        y1 = _advance(y0, tableau.b, increments)
        dense = dict(y0=y0, y1=y1, k0=increments[0], k1=terms.vf_prod(t1, y1, args, h))
        error = None
        if tableau.b_embedded is not None:
            difference = [b - e for b, e in zip(tableau.b, tableau.b_embedded, strict=True)]
            error = _advance(jax.tree.map(jnp.zeros_like, y0), difference, increments)
        return y1, error, dense, None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


class RK4(AbstractExplicitRungeKutta):
    """The classic fourth-order method of Runge and Kutta, four evaluations a step.

    No embedded method: use it with fixed steps.

    Reference:
        Hairer, Norsett, Wanner (1993), Solving Ordinary Differential Equations I, table II.1.2.
    """

    @property
    def butcher(self) -> Tableau:
        return _CLASSIC

    def order(self, terms) -> int:
        del terms
        return 4


class TableauSolver(AbstractExplicitRungeKutta):
    """An explicit Runge-Kutta method given by its tableau; made by `explicit_runge_kutta`."""

    tableau: Tableau = eqx.field(static=True)
    method_order: int = eqx.field(static=True)

    @property
    def butcher(self) -> Tableau:
        return self.tableau

    def order(self, terms) -> int:
        del terms
        return self.method_order


def explicit_runge_kutta(
    a: Sequence[ArrayLike],
    b: ArrayLike,
    *,
    order: int,
    b_embedded: ArrayLike | None = None,
) -> TableauSolver:
    """Make a diffrax solver from a Butcher tableau. Local.

    Args:
        a: Rows of the strictly lower triangle: row i has i entries, i = 0 .. stages - 1; the
            empty first row may be left out.
        b: Weights of the solution, one per stage.
        order: Order of the method, used by adaptive step control.
        b_embedded: Weights of an embedded method, for adaptive steps.

    Raises:
        ProblemError: if the tableau is not one of an explicit method.
    """
    if order < 1:
        raise ProblemError(f"`order` is {order!r}; a Runge-Kutta method has order 1 or more.")
    return TableauSolver(make_tableau(a, b, b_embedded=b_embedded), order)


def chebyshev(n_stages: int, damping: float = 4.0) -> TableauSolver:
    """A first-order method for diffusion, for steps up to about 0.7 n_stages^2 / |eigenvalue|.

    Local. Fast modes decay in every step, by more than 8 with the usual damping, as time-parallel
    iterations ask of a coarse propagator.

    Args:
        n_stages: Field evaluations of a step, at least 2.
        damping: More of it shortens the longest step.

    Reference:
        Hairer, Wanner (1996), Solving Ordinary Differential Equations II, section IV.2.
    """
    if n_stages < 2:
        raise ProblemError(f"`n_stages` is {n_stages!r}; a Chebyshev method needs 2 or more.")
    w0 = 1 + damping / n_stages**2
    polynomials = [np.polynomial.Chebyshev.basis(j) for j in range(n_stages + 1)]
    values = [polynomial(w0) for polynomial in polynomials]
    w1 = values[-1] / polynomials[-1].deriv()(w0)
    # Row j holds the state after stage j in terms of the increments so far.
    rows = np.zeros((n_stages + 1, n_stages))
    rows[1, 0] = w1 / w0
    for j in range(2, n_stages + 1):
        ratio = 2 * values[j - 1] / values[j]
        rows[j] = ratio * w0 * rows[j - 1] - values[j - 2] / values[j] * rows[j - 2]
        rows[j, j - 1] += ratio * w1
    return explicit_runge_kutta([row[:j] for j, row in enumerate(rows[:-1])], rows[-1], order=1)


def make_tableau(
    a: Sequence[ArrayLike],
    b: ArrayLike,
    *,
    b_embedded: ArrayLike | None = None,
) -> Tableau:
    """Check and complete a tableau: the abscissae are the sums of the rows. Local.

    Raises:
        ProblemError: if the sizes do not fit or the weights do not sum to one.
    """
    rows = tuple(row for row in map(_as_floats, a) if row)
    rows, weights = ((), *rows), _as_floats(b)
    embedded = None if b_embedded is None else _as_floats(b_embedded)
    if [len(row) for row in rows] != list(range(len(weights))):
        raise ProblemError(
            f"A tableau with {len(weights)} weights `b` needs rows of `a` with 1, 2, ..., "
            f"{len(weights) - 1} entries; got {[len(row) for row in rows[1:]]}."
        )
    if embedded is not None and len(embedded) != len(weights):
        raise ProblemError(
            f"`b_embedded` has {len(embedded)} entries and `b` has {len(weights)}; they must match."
        )
    for name, values in (("b", weights), ("b_embedded", embedded)):
        if values is not None and not np.isclose(sum(values), 1.0, rtol=0, atol=1e-12):
            raise ProblemError(f"The weights `{name}` sum to {sum(values)!r}; they must sum to 1.")
    return Tableau(rows, weights, embedded, tuple(float(sum(row)) for row in rows))


def _as_floats(values: ArrayLike) -> tuple[float, ...]:
    return tuple(np.asarray(values, dtype=float).tolist())


def _advance(y0: PyTree[Array], weights: Sequence[float], increments: list) -> PyTree[Array]:
    """y0 + sum_i weights[i] increments[i], leaving out the zeros."""
    used = [(w, k) for w, k in zip(weights, increments, strict=True) if w != 0]

    def add(y, *parts):
        return y + sum(w * part for (w, _), part in zip(used, parts, strict=True))

    return jax.tree.map(add, y0, *(k for _, k in used))


_CLASSIC = make_tableau([[1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6])
