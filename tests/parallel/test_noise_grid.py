"""Noise and paths on grids of ranks: the same bits, and numbers of all paths together."""

import functools
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

import nodepint_mpi as nm
from nodepint_mpi.core.keys import keys_as_numbers
from nodepint_mpi.core.noise import draw_increments, path_key
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.stochastic import NoisyArgs, StochasticField
from nodepint_mpi.core.sweeps import end_times
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import world
from nodepint_mpi.parallel.dealing import part_of

N_SLICES, N_FINE, N_PATHS, LAST = 7, 6, 5, 2.1
EDGES = np.linspace(0.0, LAST, N_SLICES + 1)
GRIDS = {1: (1,), 2: (1, 2), 3: (1, 3), 4: (1, 2)}
"""Numbers of lines by numbers of ranks: 1 x 1, 2 x 1, 1 x 2, 3 x 1, 1 x 3, 4 x 1 and 2 x 2."""


class Grid(NamedTuple):
    """A line of ranks along time, the ranks of all lines with the same slices, and the share of
    the paths that this line has."""

    time: nm.TimeComm
    data: MPI.Intracomm
    n_groups: int
    group: int

    def part(self, n_paths):
        return part_of(n_paths, self.n_groups, self.group)


def grids():
    """Every grid that these ranks form, of lines that are made as a user does. Collective."""
    mpi = world()
    for n_groups in GRIDS.get(mpi.Get_size(), (1,)):
        group, place = divmod(mpi.Get_rank(), mpi.Get_size() // n_groups)
        line, data = (MPI.Intracomm(mpi.Split(*key)) for key in ((group, place), (place, group)))
        with nm.make_time_comm(line) as time:
            yield Grid(time, data, n_groups, group)
        for one in (line, data):
            one.Free()


def both_of(increments):
    """W and H in one array."""
    assert increments.h is not None
    return jnp.stack([increments.w, increments.h])


@functools.partial(jax.jit, static_argnums=(3, 4))
def drawn_by_slices(keys, indices, lengths, shape, n_steps):
    """W and H of slices, of every path, as propagators draw them:

    (2, paths, slices, steps, *noise).
    """
    field = StochasticField(max, max, shape, False, N_FINE, levy=True)

    def one(key, index, length):
        return field.draw(NoisyArgs(None, key), index, length, n_steps)

    of_slices = jax.vmap(one, in_axes=(None, 0, 0))
    found = jax.vmap(of_slices, in_axes=(0, None, None))(keys, indices, lengths)
    return both_of(found)


@pytest.mark.parametrize(("shape", "step"), [((), None), ((3,), 3), ((2, 5), None)])
def test_the_same_bits_on_every_grid(shape, step):
    """Whoever draws the increments of a slice, in whatever company: those of a loop on one rank."""
    width = jnp.asarray(EDGES[1] / N_FINE)
    n_steps = N_SLICES * N_FINE
    whole = [
        draw_increments(path_key(5, path, step), 0, n_steps, width, shape, levy=True)
        for path in range(N_PATHS)
    ]
    whole = np.stack([both_of(one) for one in whole], axis=1)
    whole = whole.reshape(2, N_PATHS, N_SLICES, N_FINE, *shape)
    width = jnp.full(N_SLICES, EDGES[1])
    for grid in grids():
        mine = grid.part(N_PATHS)
        owned = own_slices(EDGES, grid.time.size, grid.time.rank)
        index = end_times(owned, width).global_index
        paths = jnp.arange(mine.start, mine.stop)
        keys = jax.vmap(lambda path: keys_as_numbers(path_key(5, path, step)))(paths)
        fine = drawn_by_slices(keys, index, width[: owned.n_owned], shape, N_FINE)
        np.testing.assert_array_equal(fine, whole[:, mine, owned.indices])
        alone = drawn_by_slices(keys[:1], index[-1:], width[:1], shape, N_FINE)
        np.testing.assert_array_equal(alone[:, 0], fine[:, 0, -1:])
        coarse = drawn_by_slices(keys, index, width[: owned.n_owned], shape, 2)
        sums = fine[0].reshape(*fine.shape[1:3], 2, N_FINE // 2, *shape).sum(axis=3)
        np.testing.assert_allclose(coarse[0], sums, rtol=0, atol=1e-14)


def drift(t, u, args):
    return -args * u


def solved(comm, paths, args):
    return nm.solve(
        drift, jnp.ones(2), EDGES, diffusion=lambda t, u, args: 0.3 * u * args, args=args,
        noise=nm.Noise(2, paths), in_axes=(None, None), fine=nm.FixedSteps(diffrax.Euler(), N_FINE),
        coarse=nm.FixedSteps(diffrax.Euler(), 1), stopping=nm.JumpTolerance(1e-13),
        comm=comm, check_ranks=False,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def by_hand(n_paths, args):
    """Euler-Maruyama over the whole horizon: the last states, (paths, 2)."""
    width = LAST / (N_SLICES * N_FINE)

    def one(path):
        dw = draw_increments(path_key(2, path), 0, N_SLICES * N_FINE, jnp.asarray(width), (2,)).w
        step = lambda u, dw: (u - width * args * u + 0.3 * args * u * dw, None)  # noqa: E731
        return jax.lax.scan(step, jnp.ones(2), dw)[0]

    return jax.vmap(one)(jnp.arange(n_paths))


def test_paths_dealt_to_lines_of_ranks():
    """States and the sum of the lines' gradients do not depend on the grid."""
    args = jnp.array(0.9)
    wanted = by_hand(N_PATHS, args)
    gradient = jax.grad(lambda args: jnp.sum(by_hand(N_PATHS, args) ** 2))(args)
    for grid in grids():
        mine = grid.part(N_PATHS)
        paths = jnp.arange(mine.start, mine.stop)

        def loss(args, grid=grid, paths=paths):
            ends = solved(grid.time, paths, args).interface[-1]
            return jnp.sum(ends**2), ends

        (_, ends), part = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
        np.testing.assert_allclose(ends, wanted[mine], rtol=0, atol=1e-12)
        total = sum(grid.data.allgather(float(part)))
        np.testing.assert_allclose(total, gradient, rtol=1e-8)


def test_statistics_of_all_paths():
    """Moments and quantiles as NumPy's of all paths, whoever holds which."""
    values = np.random.default_rng(0).normal(3.0, 2.0, (4, 11, 3))
    for grid in grids():
        mine = grid.part(values.shape[1])
        found = nm.path_statistics(values[:, mine], quantiles=(0.05, 0.5, 1.0), comm=grid.data)
        assert found.n_paths == 11
        np.testing.assert_allclose(found.mean, values.mean(axis=1), rtol=1e-13)
        np.testing.assert_allclose(found.variance, values.var(axis=1, ddof=1), rtol=1e-12)
        np.testing.assert_allclose(
            found.quantiles, np.quantile(values, (0.05, 0.5, 1.0), axis=1), rtol=1e-13
        )
    far = 1e9 + values
    np.testing.assert_allclose(
        nm.path_statistics(far).variance, values.var(axis=1, ddof=1), rtol=1e-6
    )
    with pytest.raises(ProblemError, match="no axis of paths"):
        nm.path_statistics(np.ones(3))
