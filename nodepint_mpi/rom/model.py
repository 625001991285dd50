"""A reduced model: a trained field on a few directions of its state, with encoder and decoder.

    c(t0) = V^T encoder(x),   dc/dt = V^T f(t, V c),   prediction = decoder(V c(t))

It needs JAX, Equinox and diffrax, and no MPI.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Inexact, Real, Shaped

from nodepint_mpi.core import basis as bases
from nodepint_mpi.core.batch import as_numbers
from nodepint_mpi.core.propagators import AbstractIntegrator, AdaptiveSteps, FixedSteps
from nodepint_mpi.core.resolution import STEP_RESOLUTION
from nodepint_mpi.core.types import Field
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.models.networks import EncodeProcessDecode

MAX_STEPS = 2**16


class Stepper(eqx.Module):
    """One solve from `t0` on, by equal steps of length `step`, or by adaptive ones if it is None.

    The steps are those of the slices' integrator; with slices of different lengths, those of the
    shortest.
    """

    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    t0: float = eqx.field(static=True)
    step: float | None = eqx.field(static=True)
    longest_step: float = eqx.field(static=True)
    """`step`, or the length of a slice."""

    def __call__(
        self, field: Field, start: Inexact[Array, "*state"], since: Real[Array, " times"]
    ) -> Inexact[Array, "times *state"]:
        """States of `du/dt = field(t, u, None)` at times counted from `t0`, increasing. Local."""
        times = since.astype(start.real.dtype)
        last, step = times[-1], self.step
        if step is not None:  # whole steps, so that a state does not depend on the other times
            n_steps = jnp.maximum(1, jnp.ceil(last / step - 1e-4))
            last = jnp.maximum(last, n_steps * step)
            # diffrax takes the number of steps from this length, rounded up.
            step = last / n_steps * (1 + 4 * float(jnp.finfo(times.dtype).eps))

        def local_field(since, u, args):
            return field(self.t0 + since, u, args)

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(local_field), self.solver, t0=jnp.zeros_like(last), t1=last,
            dt0=step, y0=start, saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=self.controller, max_steps=MAX_STEPS,
        )  # fmt: skip
        assert solution.ys is not None  # something was saved
        return solution.ys

    def since_start(self, ts: Real[ArrayLike, " times"]) -> Real[Array, " times"]:
        """Times counted from `t0`, subtracted in double precision unless they are traced. Local.

        Raises:
            ProblemError: if their type does not resolve a step at `t0`.
        """
        dtype = np.dtype(getattr(ts, "dtype", float))
        if self.t0 and dtype in (np.float16, np.float32):
            spacing = float(np.spacing(np.asarray(abs(self.t0), dtype)))
            if spacing > STEP_RESOLUTION * self.longest_step:
                raise ProblemError(
                    f"Times near {self.t0:g} of type {dtype} are {spacing:g} apart, too far for "
                    f"steps of {self.longest_step:g}: pass double precision, outside of jit."
                )
        if isinstance(ts, Tracer):
            return jnp.asarray(ts) - self.t0
        return jnp.asarray(np.asarray(ts, dtype=float) - self.t0)


class Origin(NamedTuple):
    """What a reduced model was made from."""

    name: str
    """Of the run."""
    fingerprint: str
    optimizer_step: int
    horizon: tuple[float, float]
    times: tuple[float, ...]
    """Observation times it was trained on."""
    energy: float
    """Share of the snapshots' sum of squares that the basis holds."""
    versions: tuple[tuple[str, str], ...]


class ReducedModel(eqx.Module):
    """A field of r coordinates, and the way from an input to predictions.

    For a batch: `jax.vmap(rom.solve, in_axes=(0, None))(xs, ts)`.
    """

    basis: Float[Array, "rank *sample"]
    energies: Float[Array, " rank"]
    encoder: Callable
    processor: Callable
    """The field on the basis if `is_projected`, else the full one."""
    decoder: Callable
    stepper: Stepper
    is_projected: bool = eqx.field(static=True)
    origin: Origin = eqx.field(static=True)

    def project(self, u: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
        """V^T u: (..., *sample) -> (..., rank). Local."""
        return bases.project(self.basis, u)

    def lift(self, c: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
        """V c: (..., rank) -> (..., *sample). Local."""
        return bases.lift(self.basis, c)

    def field(self, t: Any, c: Inexact[Array, " rank"], args: Any) -> Inexact[Array, " rank"]:
        """dc/dt = V^T f(t, V c). Local."""
        t = jnp.asarray(t, c.dtype)
        if self.is_projected:
            return self.processor(t, c, args)
        return self.project(self.processor(t, self.lift(c), args))

    def states(
        self, x: Shaped[Array, "..."], ts: Real[ArrayLike, " times"]
    ) -> Inexact[Array, "times *sample"]:
        """States V c(t) at `ts` of one input. Local."""
        start = self.project(self.encoder(as_numbers(x, self.basis.dtype)))
        return self.lift(self.stepper(self.field, start, self.stepper.since_start(ts)))

    def solve(
        self, x: Shaped[ArrayLike, "..."], ts: Real[ArrayLike, " times"]
    ) -> Inexact[Array, "times *prediction"]:
        """Predictions at `ts` for one input. Local.

        Args:
            x: What the encoder takes, such as the first observation.
            ts: Increasing, not before the horizon's start; may go on after its end. Late times
                need double precision: a NumPy array or a list, outside of jit.

        Raises:
            ProblemError: if the times are traced and their type does not resolve a step there.
        """
        return self._solve_since(jnp.asarray(x), self.stepper.since_start(ts))

    @eqx.filter_jit
    def _solve_since(self, x: Array, since: Array) -> Array:
        start = self.project(self.encoder(as_numbers(x, self.basis.dtype)))
        return jax.vmap(self.decoder)(self.lift(self.stepper(self.field, start, since)))

    def __repr__(self) -> str:
        rank, size = self.basis.shape[0], self.basis[0].size
        how = "independent of the state's size" if self.is_projected else "evaluated on the state"
        first, last = self.origin.horizon
        return (
            f"ReducedModel({self.origin.name!r}, {rank} of {size} directions, "
            f"energy {self.origin.energy:.9f}, field {type(self.processor).__name__} {how}, "
            f"t = {first:g} to {last:g}, {self.basis.dtype.name}, "
            f"optimizer step {self.origin.optimizer_step})"
        )


def make_stepper(integrator: AbstractIntegrator, edges: Float[Any, " edges"]) -> Stepper:
    """The integrator of slices as one solve over the horizon. Local.

    Args:
        integrator: What steps through one slice.
        edges: Boundaries of the slices.
    """
    t0, shortest = float(edges[0]), float((edges[1:] - edges[:-1]).min())
    match integrator:
        case FixedSteps():
            controller = diffrax.ConstantStepSize()
            step = shortest / integrator.n_steps
            return Stepper(integrator.solver, controller, t0, step, step)
        case AdaptiveSteps():
            controller = diffrax.PIDController(rtol=integrator.rtol, atol=integrator.atol)
            return Stepper(integrator.solver, controller, t0, None, shortest)
    raise ProblemError(f"A reduced model cannot step by {type(integrator).__name__}.")


def reduce_model(
    model: EncodeProcessDecode,
    basis: Float[Array, "rank *sample"],
    energies: Float[Array, " rank"],
    *,
    stepper: Stepper,
    origin: Origin,
) -> ReducedModel:
    """A model on a basis, by its processor's own `on_basis(basis)` where it has one. Local."""
    processor: Any = model.processor
    is_projected = hasattr(processor, "on_basis")
    if is_projected:
        processor = processor.on_basis(basis)
    return ReducedModel(
        basis, energies, model.encoder, processor, model.decoder, stepper, is_projected, origin
    )
