"""Stochastic equations by `nm.solve` against loops written out by hand with the same increments."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.noise import draw_increments, path_key
from nodepint_mpi.errors import ProblemError
from nodepint_mpi import Noise

pytestmark = [pytest.mark.standard_promotion]
N_SLICES, N_FINE, LAST = 6, 8, 1.5
EDGES = np.linspace(0.0, LAST, N_SLICES + 1)
EULER = diffrax.Euler()
MATRIX = np.array([[0.3, 0.1, 0.0], [0.0, 0.2, 0.4]])


def drift(t, u, args):
    return -args["rate"] * u + jnp.sin(t)


DIFFUSIONS = {
    "diagonal": (lambda t, u, args: args["sigma"] * jnp.sqrt(1 + u**2), (2,), {}),
    "scalar": (lambda t, u, args: args["sigma"] * u, (), {}),
    "general": (
        lambda t, u, args: args["sigma"] * jnp.asarray(MATRIX) * (1 + jnp.sum(u**2)), (3,),
        {"n_dims": 3},
    ),
}  # fmt: skip
ARGS = {"rate": jnp.array(0.8), "sigma": jnp.array(0.5)}
STARTS = jnp.array([[1.0, -0.5], [0.3, 0.7], [0.0, 0.2]])


def by_hand(kind, starts, args, paths=(0, 1, 2)):
    """Euler-Maruyama, step by step over the whole horizon: states at the edges."""
    diffusion, shape, _ = DIFFUSIONS[kind]
    n_steps, width = N_SLICES * N_FINE, LAST / (N_SLICES * N_FINE)
    found = []
    for start, path in zip(starts, paths, strict=True):
        noise = draw_increments(path_key(11, path), 0, n_steps, jnp.asarray(width), shape).w
        states, u = [start], start
        for n in range(n_steps):
            g = diffusion(n * width, u, args)
            moved = g @ noise[n] if kind == "general" else g * noise[n]
            u = u + width * drift(n * width, u, args) + moved
            if (n + 1) % N_FINE == 0:
                states.append(u)
        found.append(jnp.stack(states))
    return jnp.stack(found, axis=1)


def solved(comms, kind, starts, args, **options):
    diffusion, _, more = DIFFUSIONS[kind]
    given = {
        "fine": nm.FixedSteps(EULER, N_FINE), "coarse": nm.FixedSteps(EULER, 1),
        "noise": Noise(11, jnp.arange(len(starts)), kind=kind, **more), "in_axes": (0, None),
        "stopping": nm.JumpTolerance(1e-13), "comm": comms.time,
    } | options  # fmt: skip
    return nm.solve(drift, starts, EDGES, diffusion=diffusion, args=args, **given)


@pytest.mark.parametrize("kind", DIFFUSIONS)
@pytest.mark.parametrize("method", ["serial", "picard", "parareal", "tangent"])
def test_every_method_finds_the_serial_path(comms, kind, method):
    options = {"method": method}
    if method == "tangent":
        options["basis"] = nm.SharedBasis("identity")
    solution = solved(comms, kind, STARTS, ARGS, **options)
    wanted = by_hand(kind, STARTS, ARGS)
    np.testing.assert_allclose(solution.interface, wanted, rtol=0, atol=1e-12)
    assert solution.sweeps <= N_SLICES


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_the_gradient_is_that_of_the_path(comms, kind):
    def loss(starts, args):
        interface = solved(comms, kind, starts, args, check_ranks=False).interface
        return jnp.sum(interface[-1] ** 2) + jnp.sum(jnp.sin(interface[2]))

    def wanted(starts, args):
        interface = by_hand(kind, starts, args)
        return jnp.sum(interface[-1] ** 2) + jnp.sum(jnp.sin(interface[2]))

    found = jax.grad(loss, argnums=(0, 1))(STARTS, ARGS)
    expected = jax.jit(jax.grad(wanted, argnums=(0, 1)))(STARTS, ARGS)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


def test_a_path_alone_is_that_of_the_batch(comms):
    alone = solved(
        comms, "diagonal", STARTS[1], ARGS, noise=Noise(11, 1), in_axes=None
    ).interface
    np.testing.assert_allclose(alone, by_hand("diagonal", STARTS, ARGS)[:, 1], atol=1e-12)


REFUSED = [
    ({"noise": None}, "with a `diffusion` pass"),
    ({"noise": Noise(11, jnp.arange(3), calculus="stratonovich")}, "sense of Ito, and `noise` says"),
    ({"noise": Noise(11, jnp.arange(3), kind="general")}, "kind 'general', which needs it"),
    ({"noise": Noise(11, jnp.arange(3), kind="diag")}, "choose from 'diagonal'"),
    ({"noise": Noise(11, jnp.array([0, -1, 2]))}, "negative numbers"),
    ({"noise": Noise(11, 0.5)}, "must be a whole number"),
    ({"coarse": nm.FixedSteps(EULER, 3)}, "the one must divide the other"),
    ({"fine": nm.FixedSteps(diffrax.Tsit5(), 8)}, "Tsit5 is no solver of stochastic"),
    ({"fine": nm.AdaptiveSteps(diffrax.Tsit5(), 1e-6, 1e-6)}, "needs `FixedSteps"),
    ({"fine": nm.FixedSteps(diffrax.SRA1(), 8)}, "SRA1 is for additive noise"),
]


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_what_does_not_fit_is_refused(comms, change, said):
    with pytest.raises(ProblemError, match=said):
        solved(comms, "diagonal", STARTS, ARGS, **change)
