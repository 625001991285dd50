#!/usr/bin/env python
"""Smoothed particle hydrodynamics of a viscous fluid on the periodic unit square, in JAX.

    tools/sph.py [--side N] [--time T]    the Taylor-Green vortex against its exact decay

Weakly compressible, with a transport velocity: particles carry momentum with the fluid's velocity
v but move with v plus a small shift that keeps them evenly spread. Without the shift they line up
along streamlines, and the vortex loses twice the energy it should. The shift is that of Adami, Hu
and Adams, except that its time constant is a number of the fluid and not the time step: the whole
is then an autonomous ODE of positions and velocities, whatever steps it is solved by.

Units: density 1, length of the square 1, largest initial speed 1. Pairs repel each other equally,
so the sum of all velocities is kept to round-off.

References:
    S. Adami, X. Y. Hu, N. A. Adams (2013), J. Comput. Phys. 241, 292-307: eqs. (8), (13)-(17);
    J. P. Morris, P. J. Fox, Y. Zhu (1997), J. Comput. Phys. 136, 214-226: the quintic spline.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from nodepint_mpi.errors import DataError

SUPPORT = 3.0
"""Reach of the quintic spline in smoothing lengths; a smoothing length is the lattice's spacing."""
ROWS_AT_ONCE = 50
"""Particles whose pairs with all others are computed together: 80,000 pairs stay in the cache."""


class Fluid(NamedTuple):
    """What does not change: particles along a side, kinematic viscosity, speed of sound.

    A speed of sound of ten times the largest velocity keeps the density within about 1 %.
    """

    n_side: int
    viscosity: float
    sound_speed: float = 10.0

    @property
    def spacing(self) -> float:
        return 1.0 / self.n_side

    @property
    def shift_time(self) -> float:
        """Time constant of the shift; the acoustic time step of Adami et al."""
        return 0.25 * self.spacing / (self.sound_speed + 1.0)

    @property
    def longest_step(self) -> float:
        """Time step of classic RK4: half of this changes no velocity by more than 1e-2 (measured on
        400 particles at t = 0.5; it is stable to about three times as much). Local."""
        return min(0.5 * self.spacing / self.sound_speed, 0.2 * self.spacing**2 / self.viscosity)


class Particles(NamedTuple):
    """Positions, not wrapped, and velocities, both (particles, 2)."""

    x: Float[Array, "particles 2"]
    v: Float[Array, "particles 2"]


def settle(key: PRNGKeyArray, n_side: int) -> Float[Array, "particles 2"]:
    """Positions without order and yet evenly spread, as a flow has them after a while. Local.

    A square lattice, too, is at rest, but breaks up in a flow, at once and with a clap of sound
    that rings on. This is a shaken one that came to rest in a thick fluid.
    """
    points = grid(n_side)
    shaken = points + 0.5 / n_side * jax.random.uniform(key, points.shape, minval=-1, maxval=1)
    fluid = Fluid(n_side, viscosity=0.05)
    times = np.array([0.0, 0.25])
    start = Particles(shaken, jnp.zeros_like(shaken))
    return simulate(fluid, start, jnp.asarray(times), n_steps=steps_between(fluid, times)).x[-1]


def begin(
    fluid: Fluid,
    x: Float[Array, "particles 2"],
    velocity: Callable[[Float[Array, "points 2"]], Float[Array, "points 2"]],
) -> Particles:
    """Settled particles in a flow without divergence, with no momentum in all. Local.

    They are moved a little, to the density that gives the pressure of an incompressible flow,
    -laplace p = sum_ij d_i u_j d_j u_i: without it there would be sound again.
    """
    n = fluid.n_side
    u = velocity(grid(n)).reshape(n, n, 2)
    line = 2 * jnp.pi * jnp.fft.fftfreq(n, 1 / n).astype(u.dtype)
    k = jnp.stack(jnp.meshgrid(line, line, indexing="ij"))
    squared = jnp.sum(k**2, axis=0).at[0, 0].set(1.0)
    stress = jnp.fft.fft2(jnp.einsum("xyi,xyj->ijxy", u, u)) / n**2
    denser = -jnp.einsum("ixy,jxy,ijxy->xy", k, k, stress) / squared / fluid.sound_speed**2
    waves = jnp.exp(1j * (x - 0.5 / n) @ k.reshape(2, -1))
    x = x + (waves @ (1j * k * (denser / squared)[None]).reshape(2, -1).T).real
    v = velocity(x)
    return Particles(x, v - jnp.mean(v, axis=0, keepdims=True))


def taylor_green(
    x: Float[Array, "points 2"], t: float, viscosity: float
) -> Float[Array, "points 2"]:
    """The exact velocity of the decaying vortices, of largest speed 1 at t = 0. Local."""
    a, b = 2 * jnp.pi * x[:, 0], 2 * jnp.pi * x[:, 1]
    decay = jnp.exp(-8 * jnp.pi**2 * viscosity * t)
    return decay * jnp.stack([-jnp.cos(a) * jnp.sin(b), jnp.sin(a) * jnp.cos(b)], axis=-1)


def sheared_vortices(
    x: Float[Array, "points 2"], shear: Float[Array, "2"]
) -> Float[Array, "points 2"]:
    """The vortices at t = 0 in the shear flow (a sin 2 pi y, b sin 2 pi x). Local."""
    return taylor_green(x, 0.0, 0.0) + shear[None] * jnp.sin(2 * jnp.pi * x[:, ::-1])


def check_options(*, n_side: int, n_grid: int, viscosity: float, shear_max: float) -> None:
    """The options that recipes of flows of these vortices have in common. Local.

    Raises:
        DataError: for numbers out of range.
    """
    if n_side < 8 or n_grid < 1 or not viscosity > 0 or not 0 <= shear_max <= 1:
        raise DataError(
            "n_side must be at least 8, n_grid at least 1, viscosity positive and shear_max from 0 "
            f"to 1, given {n_side}, {n_grid}, {viscosity}, {shear_max}"
        )


def kinetic_energy(v: Float[Array, "particles 2"]) -> Float[Array, ""]:
    """Of all particles together; their mass is 1. Local."""
    return 0.5 * jnp.mean(jnp.sum(v**2, axis=-1))


def kernel(q: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The quintic spline in two dimensions, at distance q smoothing lengths, times their square."""
    third, second, first = (jnp.maximum(reach - q, 0.0) for reach in (3.0, 2.0, 1.0))
    return 7 / (478 * jnp.pi) * (third**5 - 6 * second**5 + 15 * first**5)


def kernel_slope(q: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The kernel's derivative with respect to q."""
    third, second, first = (jnp.maximum(reach - q, 0.0) for reach in (3.0, 2.0, 1.0))
    return -35 / (478 * jnp.pi) * (third**4 - 6 * second**4 + 15 * first**4)


def separation(
    target: Float[Array, "2"], sources: Float[Array, "2 sources"]
) -> Float[Array, "2 sources"]:
    """Shortest ways from all sources to one target on the periodic square. Local."""
    gap = target[:, None] - sources
    return gap - jnp.round(gap)


def slope(fluid: Fluid, particles: Particles) -> Particles:
    """The vector field: rates of change of positions and velocities. Local.

    Volumes come from the sum of kernels, V_i = 1 / sum_j W_ij, the pressure from
    p = c^2 (density - 1), and with m = spacing^2 the mass of a particle

        dv_i/dt = 1/m sum_j (V_i^2 + V_j^2) dW/dr (-p_ij e_ij + viscosity v_ij / r_ij)
        dx_i/dt = v_i - shift_time c^2/m sum_j (V_i^2 + V_j^2) dW/dr e_ij

    where e_ij is the unit vector from j to i and p_ij the mean of the pressures weighted by the
    other one's density.
    """
    (x, v), (x_t, v_t) = particles, jax.tree.map(jnp.transpose, particles)
    h, n = fluid.spacing, len(x)
    mass = 1.0 / n

    def number_density(x_i):
        return jnp.sum(kernel(_length(separation(x_i, x_t)) / h)) / h**2

    crowding = jax.lax.map(number_density, x, batch_size=min(ROWS_AT_ONCE, n))
    volume, density = 1 / crowding, mass * crowding
    pressure = fluid.sound_speed**2 * (density - 1)

    def pairs(row):
        x_i, v_i, volume_i, density_i, pressure_i = row
        gap = separation(x_i, x_t)
        distance = _length(gap)
        shared = (density * pressure_i + density_i * pressure) / (density_i + density)
        # dW/dr over r: finite, and multiplied by zero, for a particle with itself
        strength = (volume_i**2 + volume**2) / mass * kernel_slope(distance / h) / h**3 / distance
        force = -shared[None] * gap + fluid.viscosity * (v_i[:, None] - v_t)
        away = fluid.sound_speed**2 * fluid.shift_time
        return v_i - away * (gap @ strength), force @ strength

    rows = (x, v, volume, density, pressure)
    return Particles(*jax.lax.map(pairs, rows, batch_size=min(ROWS_AT_ONCE, n)))


@partial(jax.jit, static_argnames=("fluid", "n_steps"))
def simulate(fluid: Fluid, start: Particles, times: Array, *, n_steps: int) -> Particles:
    """States at all `times`, the first of which is that of `start`. Local.

    Args:
        fluid: What does not change.
        start: Positions and velocities at `times[0]`.
        times: Increasing.
        n_steps: Steps of RK4 between two times; see `steps_between`.

    Returns:
        Positions and velocities (times, particles, 2), the first those of `start`.
    """

    def step(u, dt):
        k1 = slope(fluid, u)
        k2 = slope(fluid, _add(u, k1, dt / 2))
        k3 = slope(fluid, _add(u, k2, dt / 2))
        k4 = slope(fluid, _add(u, k3, dt))
        mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        return _add(u, mean, dt), None

    def between(u, span):
        u, _ = jax.lax.scan(step, u, jnp.full(n_steps, span / n_steps, u.x.dtype))
        return u, u

    _, later = jax.lax.scan(between, start, jnp.diff(times))
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, later)


def steps_between(fluid: Fluid, times: np.ndarray) -> int:
    """Steps of RK4 that the longest of the spans needs. Local."""
    return max(1, int(np.ceil(np.max(np.diff(times)) / fluid.longest_step - 1e-9)))


def velocity_at(
    points: Float[Array, "points 2"], particles: Particles, spacing: float
) -> Float[Array, "points 2"]:
    """The velocity there: the kernel's mean over the particles (Shepard's interpolation). Local."""

    def at(point):
        weight = kernel(_length(separation(point, particles.x.T)) / spacing)
        return weight @ particles.v / jnp.sum(weight)

    return jax.vmap(at)(points)


def seen_on_grid(
    states: Particles, n_grid: int, spacing: float
) -> Float[Array, "times velocities"]:
    """The velocity at the points of a grid, at all times, y running fastest. Local."""
    points = grid(n_grid)
    on_grid = jax.lax.map(lambda u: velocity_at(points, u, spacing), states)
    return on_grid.reshape(len(on_grid), -1)


def grid(n_side: int) -> Float[Array, "points 2"]:
    """The centres of a square's `n_side`^2 equal squares, row by row. Local."""
    line = (jnp.arange(n_side, dtype=float) + 0.5) / n_side
    return jnp.stack(jnp.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)


def _length(gap: Float[Array, "2 *pairs"]) -> Float[Array, "*pairs"]:
    """Of vectors; never zero, by which one could not divide."""
    return jnp.sqrt(gap[0] ** 2 + gap[1] ** 2 + 1e-18)


def _add(u: Particles, rate: Particles, dt: Array | float) -> Particles:
    return jax.tree.map(lambda a, b: a + dt * b, u, rate)


def main() -> None:
    """Print the vortex's energy beside the exact one, and what the forces leave of momentum."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--side", type=int, default=40, help="particles along a side [40]")
    parser.add_argument("--time", type=float, default=0.5, help="time to run to [0.5]")
    parser.add_argument("--viscosity", type=float, default=0.01, help="kinematic viscosity [0.01]")
    parser.add_argument("--seed", type=int, default=0, help="of the displacements [0]")
    options = parser.parse_args()
    fluid = Fluid(options.side, options.viscosity)
    x = settle(jax.random.key(options.seed), fluid.n_side)
    start = begin(fluid, x, lambda x: taylor_green(x, 0.0, fluid.viscosity))
    times = np.linspace(0.0, options.time, 6)
    began = time.perf_counter()
    states = simulate(fluid, start, jnp.asarray(times), n_steps=steps_between(fluid, times))
    jax.block_until_ready(states)
    print(f"{fluid.n_side**2} particles, {time.perf_counter() - began:.1f} s")
    print("time   energy   exact    ratio   largest momentum")
    energies = jax.vmap(kinetic_energy)(states.v).tolist()
    for t, v, energy in zip(times, states.v, energies, strict=True):
        exact = 0.25 * np.exp(-16 * np.pi**2 * fluid.viscosity * t)
        momentum = float(jnp.max(jnp.abs(jnp.mean(v, axis=0))))
        print(f"{t:4.2f}  {energy:7.5f}  {exact:7.5f}  {energy / exact:6.3f}   {momentum:.1e}")
    if not np.isfinite(energies[-1]):
        sys.exit("tools/sph.py: the solution blew up")


if __name__ == "__main__":
    main()
