"""What samples bring along on their way through the slices: inputs, features, keys, own times.

Every sample is then propagated by itself: it is read at its own times, its own inputs, features and
random key are arguments of the field, and where error control chooses the steps each sample has its
own.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Float, Inexact, PRNGKeyArray

from nodepint_mpi.core.exogenous import Inputs, Interpolation, Signal, path_of
from nodepint_mpi.core.galerkin import AbstractReduction
from nodepint_mpi.core.keys import numbers_as_keys
from nodepint_mpi.core.propagators import Propagator, SliceResult
from nodepint_mpi.core.sample_noise import SampleNoise
from nodepint_mpi.core.stochastic import NoisyArgs
from nodepint_mpi.core.types import Params
from nodepint_mpi.errors import ProblemError


class SampleArgs(eqx.Module):
    """What the field `f(t, u, args)` of one sample gets as `args`, if samples bring anything.

    `inputs.evaluate(t)` is the signal, `static` (features,) the numbers of the sample.
    """

    inputs: Inputs | None = None
    static: Inexact[Array, " features"] | None = None


class FieldArgs(NamedTuple):
    """Parameters of the field of one sample, what the sample gets with them, and its random key."""

    params: Params
    own: SampleArgs
    key: PRNGKeyArray | None = None


class SampleParams(eqx.Module):
    """Parameters of the field, with what the samples of this rank bring to its slices.

    `times` are observation times inside each slice, counted from its left edge; `keys` are random
    keys as `core.keys` writes them, and `paths` those of Brownian paths; `first` is the global
    index of the first owned slice. All but `params` is held constant by derivatives.
    """

    params: Params
    times: Float[Array, "owned samples times"] | None
    signal: Signal | None
    static: Inexact[Array, "samples features"] | None
    keys: Float[Array, "samples bytes"] | None
    paths: Float[Array, "samples *paths bytes"] | None
    first: int = eqx.field(static=True)
    interpolation: Interpolation = eqx.field(static=True)

    def of_slice(self, index: Array) -> Any:
        """Times and signal of one slice. Local."""
        part = (self.times, self.signal)
        return jax.tree.map(lambda x: jax.lax.stop_gradient(x[index - self.first]), part)


class SamplePropagator(Propagator):
    """A propagator that takes samples one by one if it is given `SampleParams`, else as ever.

    Its field has a method `of_sample(t, u, args)`, the same field for one sample with `FieldArgs`,
    and with `noise` a method `diffusion_of_sample` beside it.
    """

    noise: SampleNoise | None = eqx.field(static=True, default=None)

    def for_tangents(self):
        return type(self)(self.field, self.integrator.for_tangents(), self.noise)

    def __call__(self, params, start, t0, length, ts, index=None):
        if not isinstance(params, SampleParams):
            if self.noise is not None:  # else the drift alone would be integrated, without a word
                raise ProblemError("A stochastic model is propagated with the paths of samples.")
            return super().__call__(params, start, t0, length, ts, index)
        assert index is not None  # sweeps give it
        times, signal = params.of_slice(index)
        static = None if params.static is None else jax.lax.stop_gradient(params.static)
        if ts.shape[0] == 0:
            times = None
        field: Any = self.field  # see above
        of_sample, steps = field.of_sample, self.integrator.for_single_samples()
        if self.noise is not None:
            shape = start.shape[1 + len(self.noise.axes) :]
            of_sample = self.noise.field(of_sample, field.diffusion_of_sample, shape)
        alone = Propagator(of_sample, steps)

        def one(start, times, signal, static, key, path):
            own = SampleArgs(None, static)
            if signal is not None:
                known = path_of(params.interpolation, signal.knots, signal.values)
                own = SampleArgs(Inputs(known, t0, signal.until), static)
            key = None if key is None else numbers_as_keys(key)
            args = FieldArgs(params.params, own, key)
            seen = ts if times is None else times
            if path is None:
                return alone(args, start, t0, length, seen, index)

            def along(start, path):
                return alone(NoisyArgs(args, path), start, t0, length, seen, index)

            return (along if path.ndim == 1 else jax.vmap(along, out_axes=axes))(start, path)

        axes: Any = SliceResult(1, 0)  # type: ignore[arg-type]
        given = (times, signal, static, params.keys, params.paths)
        return jax.vmap(one, out_axes=axes)(start, *given)


class SampleReduction(AbstractReduction):
    """A reduction of a field whose samples have nothing but times of their own."""

    inner: AbstractReduction

    def reduce(self, params, basis):
        if isinstance(params, SampleParams):
            params = params.params
        return self.inner.reduce(params, basis)

    def field(self, t, c, reduced):
        return self.inner.field(t, c, reduced)
