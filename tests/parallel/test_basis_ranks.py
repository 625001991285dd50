"""Ranks that share the tangents of a slice: the same iterates and gradients as one rank's."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.partition import owned_range, show_grid
from nodepint_mpi.errors import LayoutError, ProblemError
from nodepint_mpi.optimal_control.paraopt import ParaOpt, solve_paraopt
from nodepint_mpi.parallel.comms import alone, free_comms, make_comms, world
from nodepint_mpi.parallel.counters import WORD_BYTES, Tally, counting
from nodepint_mpi.parallel.exchange import (
    bcast_from,
    gather_directions,
    max_over_ranks,
    sum_over_ranks,
)

N_SLICES, SIZE, RANK = 4, 5, 3
EDGES = np.linspace(0.0, 1.5, N_SLICES + 1)
START = jnp.linspace(0.2, 1.4, SIZE)
ARGS = {"pull": jnp.array(0.8), "weight": jnp.array(1.1)}
FINE = nm.FixedSteps(nm.RK4(), 3)
NEWTON = dict(basis=nm.SharedBasis("identity"), recycle=False)
JUMPS = dict(basis=nm.SharedBasis("jumps", rank=RANK, n_new=1))  # fewer new ones than ranks


def field(t, u, args):
    """A ring of pendulums."""
    neighbors = jnp.roll(u, 1) - 2 * u + jnp.roll(u, -1)
    return args["pull"] * neighbors - jnp.sin(u) * args["weight"]


def solve(comm, args=ARGS, start=START, method="tangent", **options):
    return nm.solve(field, start, EDGES, fine=FINE, args=args, method=method, comm=comm, **options)


def found_by(comm, options):
    """Iterates of two sweeps with their jumps, and a loss of them with its gradient."""

    def loss(args, start):
        two = nm.FixedSweeps(2)
        solution = solve(comm, args, start, check_ranks=False, stopping=two, **options)
        return jnp.sum(solution.interface**2), (solution.interface, solution.record.jumps)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, seen), gradient = run(ARGS, START)
    return [np.asarray(x) for x in (value, *seen, *jax.tree.leaves(gradient))]


def tracked_by(comm):
    """Values of three tracked steps, their gradients and the states at last."""

    def loss(args, carry):
        ends = solve(comm, args, check_ranks=False, carry=carry, **JUMPS).interface
        return jnp.sum(ends**2), ends

    step = jax.jit(nm.value_and_grad(loss, has_aux=True))
    args, carry, found = ARGS, nm.SolveCarry(), []
    for _ in range(3):
        (value, ends), gradient, carry = step(args, carry)
        args = jax.tree.map(lambda a, g: a - 0.01 * g, args, gradient)
        found += [value, *jax.tree.leaves(gradient)]
        found.append(ends)
    return [np.asarray(x) for x in found]


def shares(most=None):
    """How many of these ranks may share tangents."""
    size = world().size
    return [n for n in range(2, min(size, most or size) + 1) if size % n == 0]


def check_alike(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    bits = world().allgather([x.tobytes() for x in found])
    assert bits == [bits[0]] * world().size


@pytest.mark.mpi(sizes=(2, 3, 4))
@pytest.mark.parametrize("options", [NEWTON, JUMPS], ids=["identity", "jumps"])
def test_iterates_and_gradients_are_those_of_one_rank(on_one_rank, options):
    """On 1 x 2, 1 x 3, 2 x 2 and, all directions, 1 x 4 ranks along time and basis."""

    def by_one():
        with nm.make_time_comm(alone()) as comm:
            return found_by(comm, options)

    wanted = on_one_rank(by_one)
    for n_basis in shares(RANK if options is JUMPS else SIZE):
        with nm.make_time_comm(world(), n_basis=n_basis) as comm:
            assert (comm.size * n_basis, comm.n_grid) == (world().size, world().size)
            check_alike(found_by(comm, options), wanted)


@pytest.mark.mpi(sizes=(2, 3))
def test_tracked_solves_are_those_of_one_rank(on_one_rank):
    def by_one():
        with nm.make_time_comm(alone()) as comm:
            return tracked_by(comm)

    wanted = on_one_rank(by_one)
    with nm.make_time_comm(world(), n_basis=world().size) as comm:
        check_alike(tracked_by(comm), wanted)


def test_places_in_a_grid(comms):
    """Ranks that share tangents are neighbors; lines, cells and groups hold who they should."""
    size, rank = comms.control.size, comms.control.rank
    grids = [(g, b) for g in range(1, size + 1) for b in range(1, size + 1) if size % (g * b) == 0]
    for n_groups, n_basis in grids:
        grid = make_comms(world(), n_groups=n_groups, n_basis=n_basis)
        time = grid.time
        assert (time.n_groups, time.n_basis, time.n_grid) == (n_groups, n_basis, size)
        assert (time.group * time.size + time.rank) * n_basis + time.basis_rank == rank
        place = (time.group, time.rank, time.basis_rank)
        assert time.mpi.allgather(place) == [
            (time.group, r, time.basis_rank) for r in range(time.size)
        ]
        assert grid.data.allgather(place) == [
            (g, time.rank, time.basis_rank) for g in range(n_groups)
        ]
        assert time.grid.allgather(rank) == grid.control.allgather(rank) == list(range(size))
        assert {g for g, _, _ in time.control.allgather(place)} == {time.group}
        assert time.control.size == time.size * n_basis
        assert (time.basis is None) == (n_basis == 1)
        if time.basis is not None:
            first = rank - rank % n_basis
            assert time.basis.allgather(rank) == list(range(first, first + n_basis))
        free_comms(grid)
    assert show_grid(8, 1, 1) == "8" and show_grid(8, 2, 1) == "8 (2 x 4)"
    assert show_grid(8, 1, 2) == "8 (1 x 4 x 2)"


@pytest.mark.mpi(min_size=2)
def test_sums_count_the_first_of_a_cell_and_all_get_the_same_bits():
    for n_basis in shares():
        grid = make_comms(world(), n_basis=n_basis)
        time = grid.time
        mine = jnp.array([10.0 * time.rank + time.basis_rank, 0.1])

        @jax.jit
        def reduced(mine, time=time):
            line_of_own = bcast_from(time, mine, time.size - 1)
            return sum_over_ranks(time, mine), max_over_ranks(time, mine), line_of_own

        total, largest, last = map(np.asarray, reduced(mine))
        assert total[0] == sum(10.0 * r for r in range(time.size))
        assert total[1] == pytest.approx(0.1 * time.size)
        assert largest[0] == 10.0 * (time.size - 1) + n_basis - 1
        assert last[0] == 10.0 * (time.size - 1) + time.basis_rank  # each has a line of its own
        bits = grid.control.allgather((total.tobytes(), largest.tobytes()))
        assert bits == [bits[0]] * world().size
        free_comms(grid)


@pytest.mark.mpi(min_size=2)
def test_directions_are_gathered_in_order_and_counted():
    """Also where some ranks have none. A rank hands over as many as the one that has most."""
    n_owned, n_basis = 2, world().size
    with nm.make_time_comm(world(), n_basis=n_basis) as comm:
        for n in (1, n_basis, 2 * n_basis + 1):
            whole = np.arange(n_owned * n * 3.0).reshape(n_owned, n, 3)
            part = owned_range(n, n_basis, comm.basis_rank)

            @jax.jit
            def gathered(own, n=n):
                with counting() as ledger:
                    every = gather_directions(comm, own, n)
                return every, ledger.tally.as_array()

            every, tally = gathered(jnp.asarray(whole[:, part.start : part.stop]))
            np.testing.assert_array_equal(every, whole)
            widest = len(owned_range(n, n_basis, 0))
            assert tally[-2:].tolist() == [1, n_owned * widest * 3 * 8 // WORD_BYTES]


@pytest.mark.mpi(sizes=(2, 3))
def test_ranks_push_their_part_of_the_directions(comm):
    """Counted: what the busiest rank does of r directions, and the bytes of one message a sweep."""
    size = world().size
    with nm.make_time_comm(comm, n_basis=size) as line:
        found = {}
        for n_sweeps in (1, 2):
            solution = solve(line, stopping=nm.FixedSweeps(n_sweeps), **NEWTON)
            assert solution.work.fine == N_SLICES * n_sweeps
            found[n_sweeps] = Tally(*map(int, solution.work))
        most = -(-SIZE // size)
        assert found[1].tangents == N_SLICES * most and found[2].tangents == 2 * N_SLICES * most
        gathered = N_SLICES * most * SIZE * 8
        assert (found[2].words - found[1].words) * WORD_BYTES >= gathered
        assert (found[2].words - found[1].words) * WORD_BYTES < 1.5 * gathered


@pytest.mark.mpi(2, 2)
def test_what_shares_no_tangents_is_refused(comm):
    with pytest.raises(LayoutError, match="2 ranks cannot share tangents by 3"):
        nm.make_time_comm(comm, n_basis=3)
    with pytest.raises(LayoutError, match=r"2 ranks cannot form 6 lines .*`run.data_ranks` x `run"):
        make_comms(comm, n_groups=2, n_basis=3)
    with nm.make_time_comm(comm, n_basis=2) as line:
        with pytest.raises(ProblemError, match="2 ranks are to share .* Parareal has none"):
            solve(line, method="parareal", coarse=nm.FixedSteps(nm.RK4(), 1))
        with pytest.raises(ProblemError, match="2 ranks cannot share 1 directions"):
            solve(line, basis=nm.SharedBasis("jumps", rank=1, n_new=1))
        steps = nm.FixedSteps(diffrax.Euler(), 2)
        with pytest.raises(ProblemError, match="`control` does not share tangents"):
            nm.control(
                lambda t, u, args, c: c - u, jnp.ones(1), EDGES,
                control=nm.PiecewiseConstant((0.0, 0.7), jnp.zeros((2, 1))),
                cost=nm.Cost(running=lambda t, u, c: jnp.sum(c**2)), fine=steps, comm=line,
            )  # fmt: skip
        with pytest.raises(ProblemError, match="`solve_paraopt` does not share tangents"):
            solve_paraopt(
                lambda t, u, c, args: c, jnp.ones(1), EDGES, comm=line, options=ParaOpt(2),
                running=lambda t, u, c: jnp.sum(c**2), terminal=jnp.sum, n_controls=1,
            )  # fmt: skip
        serial = solve(line, method="serial")  # what others are compared with
    assert serial.status is nm.Status.CONVERGED
