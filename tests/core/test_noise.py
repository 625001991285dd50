"""Brownian increments by integers: their bits, their distribution, and sums of them."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.noise import StepNoise, draw_increments, path_key, sum_increments


def area_of(increments):
    """H, where it was drawn."""
    assert increments.h is not None
    return np.asarray(increments.h)


def test_increments_do_not_depend_on_how_they_are_drawn():
    """Sixteen steps at once, or slice by slice in any order, or one by one: the same bits."""
    key = path_key(3, 5)
    whole = draw_increments(key, 0, 16, jnp.asarray(0.25), (2,), levy=True)
    for size in (1, 4, 8):
        parts = [
            draw_increments(key, jnp.asarray(first), size, jnp.asarray(0.25), (2,), levy=True)
            for first in reversed(range(0, 16, size))
        ][::-1]
        for name in ("w", "h"):
            found = jnp.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(found, getattr(whole, name))
    alone = draw_increments(key, 0, 16, jnp.asarray(0.25), (2,))
    np.testing.assert_array_equal(alone.w, whole.w)
    assert alone.h is None


def test_paths_seeds_and_steps_have_noise_of_their_own():
    keys = [path_key(0, 0), path_key(0, 1), path_key(1, 0), path_key(0, 0, 0), path_key(0, 0, 1)]
    drawn = [np.asarray(draw_increments(key, 0, 8, jnp.asarray(1.0), ()).w) for key in keys]
    for i, one in enumerate(drawn):
        for other in drawn[i + 1 :]:
            assert np.min(np.abs(one - other)) > 1e-9


def test_variances_and_independence():
    """W has the variance of the step's width, H a twelfth of it, and they are uncorrelated."""

    def one(path):
        return draw_increments(path_key(7, path), 0, 4, jnp.asarray(0.5), (), levy=True)

    drawn = jax.vmap(one)(jnp.arange(20_000))
    w, h = np.asarray(drawn.w), area_of(drawn)
    np.testing.assert_allclose(w.var(axis=0), 0.5, rtol=0.05)
    np.testing.assert_allclose(h.var(axis=0), 0.5 / 12, rtol=0.05)
    both = np.corrcoef(np.concatenate([w, h], axis=1).T)
    assert np.max(np.abs(both - np.eye(8))) < 0.03


def test_sums_are_those_of_the_path():
    """Coarse W and H of a path that is linear inside each fine step, by its own integral."""
    key, width, n = path_key(1, 0), 0.125, 24
    fine = draw_increments(key, 0, n, jnp.asarray(width), (3,), levy=True)
    flat = fine._replace(h=jnp.zeros((n, 3)))
    path = np.concatenate([np.zeros((1, 3)), np.cumsum(np.asarray(flat.w), axis=0)])
    for n_coarse in (1, 2, 6, 24):
        found = sum_increments(flat, n_coarse)
        size = n // n_coarse
        for i in range(n_coarse):
            piece = path[i * size : (i + 1) * size + 1] - path[i * size]
            total = piece[-1]
            # The trapezoidal rule is exact for a linear path.
            mean = np.sum((piece[1:] + piece[:-1]) / 2, axis=0) / size
            np.testing.assert_allclose(found.w[i], total, atol=1e-12)
            np.testing.assert_allclose(area_of(found)[i], mean - total / 2, atol=1e-12)
    in_two = sum_increments(sum_increments(fine, 6), 2)
    at_once = sum_increments(fine, 2)
    np.testing.assert_allclose(area_of(in_two), area_of(at_once), atol=1e-12)


def test_levy_areas_of_sums_have_the_right_variance():
    def one(path):
        fine = draw_increments(path_key(2, path), 0, 16, jnp.asarray(1 / 16), (), levy=True)
        return sum_increments(fine, 1)

    drawn = jax.vmap(one)(jnp.arange(20_000))
    np.testing.assert_allclose(np.var(drawn.w), 1.0, rtol=0.05)
    np.testing.assert_allclose(np.var(area_of(drawn)), 1 / 12, rtol=0.05)
    assert abs(np.corrcoef(drawn.w[:, 0], area_of(drawn)[:, 0])[0, 1]) < 0.03


LINEAR = {
    "euler": (diffrax.Euler(), 0.5, 0.1),
    "milstein": (diffrax.ItoMilstein(), 1.0, 0.1),
    "stratonovich milstein": (diffrax.StratonovichMilstein(), 1.0, 0.1),
    "slow rk": (diffrax.SlowRK(), 1.5, 0.15),
}


def errors_of(solver, drift, diffusion, exact, levels, levy):
    """Root mean square errors at time 1 with so many steps."""

    def one(path):
        fine = draw_increments(path_key(0, path), 0, 256, jnp.asarray(1 / 256), (), levy=levy)
        wanted = exact(jnp.sum(fine.w), fine)
        found = []
        for n in levels:
            times = jnp.linspace(0.0, 1.0, n + 1)

            def step(u, row):
                left, right, of_step = row
                noise = StepNoise(diffusion=diffusion, w=of_step.w, h=of_step.h, is_matrix=False)
                terms = diffrax.MultiTerm(diffrax.ODETerm(drift), noise)
                state = solver.init(terms, left, right, u, None)
                new = solver.step(terms, left, right, u, None, state, made_jump=False)[0]
                return new, None

            rows = times[:-1], times[1:], sum_increments(fine, n)
            found.append(jax.lax.scan(step, jnp.array(1.0), rows)[0] - wanted)
        return jnp.stack(found)

    squares = jax.jit(jax.vmap(one))(jnp.arange(1000)) ** 2
    return np.sqrt(np.mean(np.asarray(squares), axis=0))


@pytest.mark.parametrize("name", LINEAR)
def test_strong_order_on_geometric_brownian_motion(name):
    """dX = -X dt + X dW against exp((mu - sigma^2 / 2) T + W_T), in either sense."""
    solver, order, within = LINEAR[name]
    shift = 0.0 if isinstance(solver, diffrax.AbstractStratonovichSolver) else 0.5
    levels = (16, 64, 256)
    errors = errors_of(
        solver, lambda t, u, args: -u, lambda t, u, args: u,
        lambda w, fine: jnp.exp(-1.0 - shift + w), levels, levy=True,
    )  # fmt: skip
    slope = np.polyfit(np.log(levels), np.log(errors), 1)[0]
    assert abs(-slope - order) < within
