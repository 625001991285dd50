"""The reduced field: a vector field seen on a basis, dc/dt = V^T f(t, V c)."""

import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Inexact

from nodepint_mpi.core.basis import lift, project
from nodepint_mpi.core.types import Field, Params


class AbstractReduction(eqx.Module):
    """How parameters and a basis become a field of coordinates (*batch, rank).

    `reduce` is called once for a solve and `field` at every stage, so what the first has
    multiplied out is not multiplied again.
    """

    @abc.abstractmethod
    def reduce(self, params: Params, basis: Inexact[Array, "rank *sample"]) -> Any:
        """Parameters of the reduced field. Local."""

    @abc.abstractmethod
    def field(self, t: Array, c: Inexact[Array, "*batch rank"], reduced: Any) -> Array:
        """V^T f(t, V c). Local."""


class Galerkin(AbstractReduction):
    """For any field of states: a stage costs what one of the full field does, and two products."""

    full: Field = eqx.field(static=True)

    def reduce(self, params, basis):
        return params, basis

    def field(self, t, c, reduced):
        params, basis = reduced
        return project(basis, self.full(t, lift(basis, c), params))


class ProjectedProcessor(AbstractReduction):
    """For a processor with a method `on_basis(basis)` that gives a processor of coordinates.

    Where it begins and ends in linear layers they take up the basis, and a stage costs the same
    whatever the size of the state.
    """

    static: Any = eqx.field(static=True)

    def reduce(self, params, basis):
        return eqx.combine(params, self.static).on_basis(basis)

    def field(self, t, c, reduced):
        return jax.vmap(lambda sample: reduced(t, sample, None))(c)
