"""Brownian motion by integers: the increments of a path from a key and the number of the fine step.

Nothing is stored, and no time enters: whoever propagates a slice, in whatever batch and on whatever
rank, draws the same bits. Coarse increments are sums of fine ones, so that a coarse propagator sees
the path of the fine one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from nodepint_mpi.errors import ProblemError

_PURPOSE = 0x4E6F6973  # apart from the keys of encoders, decoders and losses


class Increments(NamedTuple):
    """Of consecutive steps: W (steps, *noise), and space-time Levy areas H of that shape.

    H of a step from s to t is the mean over r of W_r - W_s - (r - s) / (t - s) (W_t - W_s). It is
    None where no solver needs it.
    """

    w: Float[Array, "steps *noise"]
    h: Float[Array, "steps *noise"] | None


def as_control(of_step: Increments, width: Array, use_levy: bool) -> Any:
    """The increments of one step as diffrax's solvers take them. Local."""
    if not use_levy:
        return of_step.w
    assert of_step.h is not None  # whoever draws them knows the solver
    return diffrax.SpaceTimeLevyArea(dt=width, W=of_step.w, H=of_step.h)


def path_key(seed: int, path: Int[Array, ""] | int, step: Int[Array, ""] | int | None = None):
    """The key of one path: common to all optimizer steps, or of one of them. Local."""
    return _of_path(jax.random.key(seed), path, step)


@jax.jit
def path_keys(
    seed: Key[Array, ""], paths: Int[Array, "*paths"], step: Int[Array, ""] | int | None = None
) -> Key[Array, "*paths"]:
    """The keys of several paths, of the key of a seed. Local."""
    of_paths = lambda path: _of_path(seed, path, step)  # noqa: E731
    return jax.vmap(of_paths)(paths) if paths.ndim else of_paths(paths)


def _of_path(seed, path, step):
    key = jax.random.fold_in(jax.random.fold_in(seed, _PURPOSE), path)
    return key if step is None else jax.random.fold_in(key, step)


def draw_increments(
    key: Key[Array, ""],
    first: Int[Array, ""] | int,
    n_steps: int,
    width: Float[Array, ""],
    shape: tuple[int, ...],
    *,
    levy: bool = False,
) -> Increments:
    """Increments of the steps `first` to `first + n_steps - 1`, counted over the horizon. Local.

    W of a step is normal with variance `width`, H with `width / 12`, independent of it. W is the
    same with and without H. Numbers are drawn in the precision of the run, so that a copy of the
    solve in another precision sees the same path.

    Args:
        key: Of the path.
        first: Number of the first step in the whole horizon.
        n_steps: How many.
        width: Of each of these steps, in the unit of time.
        shape: Of the Brownian motion.
        levy: Draw H too.

    Reference:
        Foster, Lyons, Oberhauser (2020), SIAM J. Numer. Anal. 58, 1393-1421, for H.
    """
    numbers = jnp.asarray(first) + jnp.arange(n_steps)
    dtype = jnp.zeros(()).dtype
    width = jnp.asarray(width, dtype)

    def draw(which, variance):
        def one(number):
            own = jax.random.fold_in(jax.random.fold_in(key, number), which)
            return jax.random.normal(own, shape, dtype)

        # Without the barrier XLA moves the scale past the last factor of the normal numbers, in
        # some programs and not in others: the last bit would depend on who draws.
        scale, normals = jax.lax.optimization_barrier((jnp.sqrt(variance), jax.vmap(one)(numbers)))
        return scale * normals

    return Increments(draw(0, width), draw(1, width / 12) if levy else None)


def sum_increments(fine: Increments, n_steps: int) -> Increments:
    """Increments of `n_steps` coarse steps from those of fine ones of equal width. Local.

    With W before each fine step, the mean of W over a coarse one is that of W + H + W / 2 of the
    fine ones.

    Args:
        fine: Of steps whose number `n_steps` divides.
        n_steps: Coarse steps.
    """
    parts = jax.tree.map(lambda x: x.reshape(n_steps, -1, *x.shape[1:]), fine)
    w = jnp.sum(parts.w, axis=1)
    if parts.h is None:
        return Increments(w, None)
    before = jnp.cumsum(parts.w, axis=1) - parts.w
    mean = jnp.mean(before + parts.w / 2 + parts.h, axis=1)
    return Increments(w, mean - w / 2)


class AbstractNoise(diffrax.AbstractTerm):
    """The diffusion term of a solver step.

    `diffusion(t, u, args)` gives what the increment is multiplied with: entry by entry if it has
    the shape of the state (noise of the state's shape, or one Brownian motion for all), else
    (*state, *noise), whose last axes are summed over.
    """

    diffusion: eqx.AbstractVar[Callable]
    is_matrix: eqx.AbstractVar[bool]

    def vf(self, t, y, args):
        return self.diffusion(t, y, args)

    def prod(self, vf, control):
        if not self.is_matrix:
            return vf * control
        return jnp.tensordot(vf, control, axes=control.ndim)


class StepNoise(AbstractNoise):
    """That of one step, whose increment is known."""

    diffusion: Callable
    w: Float[Array, "*noise"]
    h: Float[Array, "*noise"] | None
    is_matrix: bool = eqx.field(static=True)

    def contr(self, t0, t1, use_levy=False, **kwargs):
        del kwargs
        return as_control(Increments(self.w, self.h), t1 - t0, use_levy)


class GridNoise(AbstractNoise):
    """That of all steps of a grid."""

    diffusion: Callable
    path: "GridPath"
    is_matrix: bool = eqx.field(static=True)

    def contr(self, t0, t1, use_levy=False, **kwargs):
        del kwargs
        return self.path.evaluate(t0, t1, use_levy=use_levy)


class GridPath(diffrax.AbstractBrownianPath):
    """A Brownian motion that is known at the ends of the fine steps of a horizon.

    What diffrax takes for one: only steps from one of these ends to the next can be evaluated.
    """

    key: Key[Array, ""]
    ends: Float[Array, " ends"]
    shape: tuple[int, ...] = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)

    @property
    def t0(self):  # type: ignore[override]
        return self.ends[0]

    @property
    def t1(self):  # type: ignore[override]
        return self.ends[-1]

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        del left
        if t1 is None:
            raise ProblemError("This path knows its increments, over one fine step each.")
        width = jnp.asarray(t1) - jnp.asarray(t0)
        middles = (self.ends[:-1] + self.ends[1:]) / 2
        number = jnp.searchsorted(middles, t0)
        levy = issubclass(self.levy_area, diffrax.AbstractSpaceTimeLevyArea)
        drawn = draw_increments(self.key, number, 1, width, self.shape, levy=levy)
        return as_control(jax.tree.map(lambda x: x[0], drawn), width, use_levy)
