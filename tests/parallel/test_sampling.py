"""Samples of velocity fields: sweeps and states against NumPy, likelihood against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.errors import ProblemError

CENTERS = np.array([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]])
DEVIATION, N_STEPS, N = 0.3, 36, 8


def mean_velocity(t, x, means, xp):
    """Of a mixture of Gaussians along straight lines, for one x."""
    total = (t * DEVIATION) ** 2 + (1 - t) ** 2
    misses = x[None] - t * means
    exponents = -xp.sum(misses**2, axis=-1) / (2 * total)
    weights = xp.exp(exponents - xp.max(exponents))
    weights = weights / xp.sum(weights)
    slope = (t * DEVIATION**2 - (1 - t)) / total
    return weights @ (means + slope * misses)


def field(t, x, args):
    return mean_velocity(t, x, args, jnp)


def draw(**options):
    chosen = nm.Sampling(n_steps=N_STEPS, **options)
    return nm.sample(field, 2, N, chosen, args=jnp.asarray(CENTERS))


def velocities(t, states):
    return np.array([mean_velocity(t, x, CENTERS, np) for x in states])


def steps(start, first, n_steps, each=1):
    """Euler's method from step `first`, by steps of `each` fine ones."""
    width = 1 / N_STEPS
    for i in range(first, first + n_steps, each):
        start = start + each * width * velocities(i * width, start)
    return start


@pytest.fixture(scope="module")
def serial():
    return draw(method="serial")


def test_serial_is_eulers_method(serial):
    assert np.allclose(serial.samples, steps(np.asarray(serial.noise), 0, N_STEPS), atol=1e-12)
    assert abs(float(jnp.mean(serial.noise))) < 1
    assert serial.counts.evaluations == N_STEPS


def test_parareal_stops_as_published(serial):
    """SRDS: one coarse step a slice, until the samples change by 1e-3 on average."""
    n_slices = 6
    old = [np.asarray(serial.noise)]
    for n in range(n_slices):
        old.append(steps(old[-1], 6 * n, 6, each=6))
    sweeps, change = 0, 1.0
    while change >= 1e-3:
        new = [old[0]]
        for n in range(n_slices):
            coarse = steps(new[n], 6 * n, 6, each=6) - steps(old[n], 6 * n, 6, each=6)
            new.append(steps(old[n], 6 * n, 6) + coarse)
        sweeps, change, old = sweeps + 1, np.mean(np.abs(new[-1] - old[-1])), new
    drawn = draw(method="parareal")
    assert 1 < sweeps < n_slices
    assert drawn.counts.sweeps == sweeps
    assert np.allclose(drawn.samples, old[-1], atol=1e-10)
    plain, pipelined = drawn.counts.serial_steps, drawn.counts.serial_steps_pipelined
    assert (plain, pipelined) == (6 + sweeps * 12, 6 + sweeps * 6)  # 8 of 8 and 64: 136 and 72


def test_picard_stops_as_published(serial):
    """ParaDiGMS: all steps at once; what has changed by less than 1e-2 is done, from the left."""
    states = np.repeat(np.asarray(serial.noise)[None], N_STEPS + 1, axis=0)
    front = sweeps = evaluations = 0
    while front < N_STEPS:
        evaluations += N_STEPS - front
        slopes = [velocities(i / N_STEPS, states[i]) for i in range(front, N_STEPS)]
        new = states.copy()
        new[front + 1 :] = states[front] + np.cumsum(slopes, axis=0) / N_STEPS
        change = np.sqrt(np.mean((new - states)[front + 1 :] ** 2, axis=(1, 2)))
        late = np.flatnonzero(change >= 1e-2)
        front = front + max(1, late[0]) if len(late) else N_STEPS
        sweeps, states = sweeps + 1, new
    drawn = draw(method="picard")
    assert (drawn.counts.sweeps, drawn.counts.evaluations) == (sweeps, evaluations)
    assert np.allclose(drawn.samples, states[-1], atol=1e-10)


@pytest.mark.parametrize("rank", [None, 1])
def test_tangent_gives_the_serial_samples(serial, rank):
    drawn = draw(method="tangent", rank=rank, tol=1e-8)
    assert np.allclose(drawn.samples, serial.samples, atol=1e-6)
    assert drawn.largest_jump <= 1e-8
    if rank is None:
        assert drawn.counts.sweeps <= 4


@pytest.mark.mpi(max_size=2)
def test_a_sample_has_its_noise_in_any_batch():
    """Of the stochastic sampler: initial noise and increments."""
    options = nm.Sampling("sde", "serial", N_STEPS)
    args = jnp.asarray(CENTERS)
    both = nm.sample(field, 2, np.array([5, 3]), options, args=args)
    alone = nm.sample(field, 2, np.array([3]), options, args=args)
    parallel = nm.sample(
        field, 2, np.array([3]), nm.Sampling("sde", "parareal", N_STEPS, tol=1e-9), args=args
    )
    assert np.array_equal(both.noise[1], alone.noise[0])
    assert np.allclose(both.samples[1], alone.samples[0], atol=1e-12)
    assert np.allclose(parallel.samples, alone.samples, atol=1e-7)
    assert not np.allclose(both.samples[0], both.samples[1])


@pytest.mark.mpi(max_size=2)
def test_likelihood_of_a_gaussian():
    """Data of deviation 0.3 around a point: the divergence is exact, by signs too, as the slope is
    a multiple of the identity."""
    center = CENTERS[:1]
    data = center + 0.4 * np.random.default_rng(0).standard_normal((3, 2))
    squares = np.sum((data - center) ** 2, axis=1) / DEVIATION**2
    exact = -squares / 2 - np.log(2 * np.pi * DEVIATION**2)
    for n_probes, method in ((None, "parareal"), (1, "parareal"), (None, "tangent")):
        options = nm.Sampling(n_steps=400, method=method, tol=1e-8)
        args = jnp.asarray(center)
        found = nm.log_likelihood(field, data, options, args=args, n_probes=n_probes)
        assert np.allclose(found.values, exact, atol=0.06)
        assert np.allclose(found.bits_per_dimension(), -found.values / 2 / np.log(2))
    assert not np.allclose(exact, exact[0], atol=0.3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_steps": 257}, "take 255 or 272 steps"),
        ({"n_steps": 64, "n_slices": 10}, "take 60 or 70 steps"),
        ({"rank": 3}, "choose at most 2"),
        ({"method": "newton"}, "choose from"),
        ({"method": "parareal", "rank": 1}, "belongs to method 'tangent'"),
        ({"coarse_steps": 3}, "do not divide"),
        ({"end": 1.5}, "expected a time"),
    ],
)
def test_options_that_do_not_fit(options, said):
    with pytest.raises(ProblemError, match=said):
        nm.sample(field, 2, 3, nm.Sampling(**options), args=jnp.asarray(CENTERS))


def test_an_end_with_an_infinite_slope():
    path = nm.VariancePreserving()
    with pytest.raises(ProblemError, match=r"such as 0\.999"):
        nm.sample(field, 2, 3, nm.Sampling(), args=jnp.asarray(CENTERS), path=path)
