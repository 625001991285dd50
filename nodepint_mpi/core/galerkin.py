"""The reduced field: a vector field seen on a basis, dc/dt = V^T f(t, V c).

Of a stochastic one, dc = V^T f(t, V c) dt + V^T g(t, V c) dW, with the path of the full one.
"""

import abc
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from nodepint_mpi.core.basis import lift, project
from nodepint_mpi.core.each_sample import EachSample, GivenField
from nodepint_mpi.core.propagators import AbstractIntegrator, Propagator
from nodepint_mpi.core.stochastic import NoisyArgs, StochasticField
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

    def propagator(self, integrator: AbstractIntegrator) -> Propagator:
        """The reduced flow, given what `reduce` returns. Local."""
        return Propagator(self.field, integrator)


class Galerkin(AbstractReduction):
    """For any field of states: a stage costs what one of the full field does, and two products."""

    full: Field = eqx.field(static=True)

    def reduce(self, params, basis):
        reduced = params, basis
        return NoisyArgs(reduced, params.key) if isinstance(params, NoisyArgs) else reduced

    def propagator(self, integrator):
        full: Any = self.full
        if isinstance(full, StochasticField):
            return Propagator(_noise_on_basis(full), integrator)
        if isinstance(full, GivenField) and isinstance(full.alone, StochasticField):
            # All samples share the basis, and the key of a sample comes last, as in its arguments.
            axes = (*full.axes, None, full.axes[-1])
            others = None if full.others is None else NoisyArgs((full.others, None), None)
            return EachSample(GivenField(_noise_on_basis(full.alone), axes, others), integrator)
        return super().propagator(integrator)

    def field(self, t, c, reduced):
        params, basis = reduced
        return project(basis, self.full(t, lift(basis, c), params))


def _noise_on_basis(full: StochasticField) -> StochasticField:
    """Drift and diffusion of coordinates, driven by the Brownian motion of the full field."""

    def drift(t, c, reduced):
        params, basis = reduced.args
        return project(basis, full.drift(t, lift(basis, c), params))

    def diffusion(t, c, reduced):
        params, basis = reduced.args
        g = full.diffusion(t, lift(basis, c), params)
        if full.is_matrix:
            of_basis, of_state = list(range(1, basis.ndim)), list(range(basis.ndim - 1))
            return jnp.tensordot(basis, g, axes=(of_basis, of_state))
        return basis * g[None] if full.shape else project(basis, g)

    is_matrix = full.is_matrix or bool(full.shape)
    return replace(full, drift=drift, diffusion=diffusion, is_matrix=is_matrix)


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
