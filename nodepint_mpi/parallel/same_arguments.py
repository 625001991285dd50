"""Whether all ranks of a line pass equal arguments, found out before anything is computed."""

import socket
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree
from mpi4py import MPI

from nodepint_mpi.errors import AgreementError
from nodepint_mpi.parallel.fingerprint import fingerprint

_MOST_RANKS = 4
_LONGEST = 60


def is_traced(*trees: PyTree) -> bool:
    """Whether this is a trace, in which values cannot be seen. Local.

    `jax.jit`, `jax.vmap`, `jax.lax.scan` and the like trace. `jax.grad` alone does not: it runs
    the code on numbers, which are found beneath its tracers.
    """
    if isinstance(jnp.zeros(()), Tracer):
        return True
    return any(isinstance(leaf, Tracer) for leaf in map(value_of, jax.tree.leaves(trees)))


def require_same_arguments(control: MPI.Intracomm, arguments: Mapping[str, Any]) -> None:
    """Make sure that all ranks pass equal arguments. Collective over `control`, outside of jit.

    Nothing of it may be traced, see `is_traced`. One reduction of 16 bytes as long as all is well.

    Raises:
        AgreementError: on all ranks, with the first argument that differs, where, and which ranks.
    """
    if control.Get_size() == 1:
        return
    values = {name: jax.tree.map(value_of, value) for name, value in arguments.items()}
    digest = fingerprint(values) >> 8  # fits a signed number, and so does its negative
    jax.effects_barrier()  # what is in flight uses MPI too
    extremes = np.array([digest, -digest])
    control.Allreduce(MPI.IN_PLACE, extremes, op=MPI.MAX)
    if extremes[0] == -extremes[1]:
        return
    mine = {name: (fingerprint(value), text) for name, value, text in _described(values)}
    everywhere = control.allgather((socket.gethostname(), mine))
    raise AgreementError(
        _explain([host for host, _ in everywhere], [all_ for _, all_ in everywhere])
    )


def value_of(leaf: Any) -> Any:
    """The number beneath a derivative's tracer, if it is known; anything else as it is. Local."""
    return jax.lax.stop_gradient(leaf) if isinstance(leaf, Tracer) else leaf


def _described(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Every argument leaf by leaf: its name, what to compare, and how to show it."""
    for name, value in values.items():
        leaves, structure = jax.tree_util.tree_flatten_with_path(value)
        for path, leaf in leaves:
            yield f"`{name}{jax.tree_util.keystr(path)}`", leaf, _shown(leaf)
        if jax.tree.structure(0) != structure:  # then what is not a leaf counts as well
            yield f"`{name}`", value, _shortened(str(value))


def _shown(leaf: Any) -> str:
    if isinstance(leaf, (jax.Array, np.ndarray)) and leaf.size != 1:
        return f"{leaf.dtype}{list(leaf.shape)}"
    code = getattr(leaf, "__code__", None)
    if code is not None:
        where = f"{code.co_filename}, line {code.co_firstlineno}"
        return f"{getattr(leaf, '__qualname__', leaf)} ({where})"
    return _shortened(str(leaf))


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _explain(hosts: list[str], held: list[dict[str, tuple[int, str]]]) -> str:
    """The message: the first leaf that differs from rank 0's, and where."""
    names = list(dict.fromkeys(name for theirs in held for name in theirs))
    nothing = (0, "nothing")
    odd = [name for name in names if len({theirs.get(name, nothing)[0] for theirs in held}) > 1]
    if not odd:
        return "The arguments of `solve` differ between ranks. Pass equal arguments on every rank."
    name = odd[0]
    values = [theirs.get(name, nothing) for theirs in held]
    ranks = [rank for rank, value in enumerate(values) if value[0] != values[0][0]]
    listed = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:_MOST_RANKS])
    listed += f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
    there, here = values[ranks[0]][1], values[0][1]
    what = f"{there} there, {here} on rank 0" if there != here else f"{here}, with other contents"
    return (
        f"The arguments of `solve` differ between ranks: {name} on {listed} is not that of rank 0 "
        f"({what}). Every rank must pass equal arguments and run the same code: compute or read "
        "them alike on all ranks, or broadcast them from one. `check_ranks=False` turns this "
        "comparison off."
    )
