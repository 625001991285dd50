"""What is said of a solve or a gradient that failed or is off, also where it is traced."""

import functools
import logging
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, PyTree

from nodepint_mpi.core.backward import backward_drift, is_continuous
from nodepint_mpi.core.exogenous import jumps_in
from nodepint_mpi.core.propagators import Propagator
from nodepint_mpi.core.types import Block
from nodepint_mpi.errors import NonFiniteError
from nodepint_mpi.parallel.exchange import max_over_ranks
from nodepint_mpi.parallel.judge import SweepRecord
from nodepint_mpi.parallel.line import Line

ADJOINT_FAILURE = (
    "The adjoint solve failed: the pull-back of a slice returned NaN or infinity, or ran out of "
    "steps. Use smaller steps or raise `max_steps`; `throw=False` returns NaN."
)

DRIFT_TOL = 1e-6
"""Largest relative error of a state integrated backward that passes without a warning."""

ADJOINT_DRIFT = (
    "The continuous adjoint is inaccurate: a state integrated backward over a slice misses its "
    "stored start by %.1e of the largest state, and the gradient may be off by as much. "
    "Use `adjoint='discrete'`, smaller steps, or shorter slices."
)

_log = logging.getLogger(__name__)


def require_solved(
    states: PyTree[Array],
    record: SweepRecord,
    edges: np.ndarray,
    u0: PyTree,
    *,
    n_batch_axes: int = 0,
    by_sample: bool = False,
) -> PyTree[Array]:
    """The states, or an error that names slice, time and entry of the state. Local.

    Where the record is traced, under `jax.jit`, the compiled program raises when it runs: JAX then
    reports the same message as a `JaxRuntimeError`.

    Args:
        states: At the edges, and at other times.
        record: Of the solve.
        edges: Slice boundaries.
        u0: The initial state as the caller gave it.
        n_batch_axes: Leading axes of the state that count samples.
        by_sample: Whether the leaves of `u0` have an axis of samples in front, and the leaves of
            a sample are one after another in the flattened state.

    Raises:
        NonFiniteError: if the fine solve of a slice failed from a solved start.
    """
    shapes = jax.tree.map(jnp.shape, u0, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    names = [
        (jax.tree_util.keystr(path), shape)
        for path, shape in jax.tree_util.tree_leaves_with_path(
            shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
        )
    ]

    if by_sample:
        names = [(path, shape[1:]) for path, shape in names]

    def fail(broken: Any, entry: Any) -> NoReturn:
        slice_, entry, sample = int(broken), int(entry), ""
        if by_sample and entry >= 0:
            number, entry = divmod(entry, sum(int(np.prod(shape, dtype=int)) for _, shape in names))
            sample = f" of sample {number}"
        raise NonFiniteError(
            describe_failure(slice_, entry, edges, names, n_batch_axes, sample=sample)
        )

    if not isinstance(record.broken, Tracer):
        if not bool(record.finite):
            fail(record.broken, record.broken_entry)
        return states
    return _or_raise(states, record.finite, fail, record.broken, record.broken_entry)


def or_adjoint_failure(tree: PyTree[Array], finite: Bool[Array, ""], throw: bool) -> PyTree[Array]:
    """A gradient that is NaN where its solve failed; an error there if asked. Local, inside jit."""

    def fail() -> NoReturn:
        raise NonFiniteError(ADJOINT_FAILURE)

    def guard(bar: Array) -> Array:
        return _or_raise(bar, finite, fail) if throw else jnp.where(finite, bar, jnp.nan)

    return jax.tree.map(guard, tree)


def warn_of_drift(
    line: Line, fine: Propagator, starts: Block, ends: Block, *, again: bool = True
) -> None:
    """Log a warning if the continuous adjoint is off. Collective over the line, inside jit.

    The estimate is how far the state, integrated backward over a slice, is from its stored start,
    relative to the largest state: see `core.backward`. The first rank logs it; without `again`,
    as in the steps of a training, once for every power of ten.
    """
    if not is_continuous(fine) or type(fine) is not Propagator:  # others move the start
        return
    if jumps_in(line.params):  # then every step is pulled back from its stored end
        return
    comm = line.comm
    drift = backward_drift(fine, line.params, starts, ends, line.owned)
    local = jnp.stack([drift, jnp.max(jnp.abs(starts))])
    drift, scale = max_over_ranks(comm, local)
    if comm.rank == 0 and comm.group == 0 and comm.basis_rank == 0:
        tol = max(DRIFT_TOL, 100 * float(jnp.finfo(ends.dtype).eps))
        log = functools.partial(_log_drift if again else _log_drift_once, tol)
        jax.debug.callback(log, drift / jnp.where(scale > 0, scale, 1.0))


def _log_drift(tol: float, drift: Any) -> None:
    if drift > tol:
        _log.warning(ADJOINT_DRIFT, float(drift))


def _log_drift_once(tol: float, drift: Any) -> None:
    if drift > tol:
        _log_power(10.0 ** math.ceil(math.log10(drift)) if np.isfinite(drift) else math.inf)


@functools.cache
def _log_power(bound: float) -> None:
    _log.warning(ADJOINT_DRIFT, bound)


def describe_failure(
    broken: int,
    entry: int,
    edges: np.ndarray,
    names: list[tuple[str, tuple[int, ...]]],
    n_batch_axes: int = 0,
    sample: str = "",
) -> str:
    """What failed, and where in time and in the state. Local.

    Args:
        broken: Index of the slice.
        entry: First entry of the flattened state that was not finite; -1 if all were not.
        edges: Slice boundaries.
        names: Path and shape of every leaf of the state.
        n_batch_axes: Leading axes of the state that count samples.
        sample: Which sample, in words, where that is known otherwise.
    """
    where = "in all entries of the state"
    if entry >= 0:
        for name, shape in names:
            size = int(np.prod(shape, dtype=int))
            if entry < size:
                index = [str(int(i)) for i in np.unravel_index(entry, shape)]
                samples, rest = index[:n_batch_axes], index[n_batch_axes:]
                where = (
                    f"first in entry [{', '.join(rest)}] of the state{' ' + name if name else ''}"
                )
                where += f" of sample {', '.join(samples)}" if samples else sample
                break
            entry -= size
    return (
        f"The fine propagator failed in slice {broken} (of 0 to {len(edges) - 2}; t from "
        f"{edges[broken]:.17g} to {edges[broken + 1]:.17g}), {where}: it returned NaN or infinity "
        "from a solved start, or ran out of steps. Check the field, use smaller steps, or raise "
        "`max_steps`; `throw=False` returns the states before it, and NaN after."
    )


def _or_raise(
    values: PyTree[Array], finite: Bool[Array, ""], fail: Any, *found: Array
) -> PyTree[Array]:
    """The values, which are not to be had where the callback raises."""
    flag = jax.ShapeDtypeStruct((), np.dtype(bool))
    finite = jax.lax.cond(
        finite,
        lambda: jnp.array(True),
        lambda: jax.pure_callback(fail, flag, *map(jax.lax.stop_gradient, found)),
    )
    return jax.tree.map(lambda value: jnp.where(finite, value, jnp.nan), values)
