"""Coarse walks in two levels: against matrices multiplied by hand, and against one level."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.levels import GroupCount, Grouping, choose_grouping
from nodepint_mpi.errors import ProblemError
from tests.parallel.test_saved_times import ARGS, EDGES, STEPS, TS, U0, loss_of, pendulum, plain

pytestmark = pytest.mark.timeout_s(300)  # several programs to compile

N = 7
UNEVEN = np.array([0.0, 0.3, 0.5, 1.0, 1.2, 1.6, 1.7, 2.2])
MATRIX = np.array([[-0.4, 1.5], [-1.0, -0.1]])
START = np.array([1.0, -0.5])
WEIGHTS = np.random.default_rng(0).normal(size=(N + 1, 2))
COARSENING = {1: 3, 2: 3, 3: 5, 4: 3}
"""By the number of ranks: groups begin inside of blocks, and on some ranks none does."""


def linear(t, u, args):
    return jnp.asarray(MATRIX) @ u


EULER = nm.FixedSteps(diffrax.Euler(), 1)


def two_levels(*levels, field=linear, **options):
    return nm.Parareal(nm.Propagator(field, EULER), levels=nm.Levels(*levels), **options)


def euler(n_steps, length):
    return np.linalg.matrix_power(np.eye(2) + length / n_steps * MATRIX, n_steps)


class ByHand:
    """Parareal for the linear equation, as products of matrices; `coarsening` None: one level."""

    def __init__(self, coarsening, cycles=1):
        lengths = np.diff(UNEVEN)
        self.fine = [euler(8, length) for length in lengths]
        self.coarse = [euler(1, length) for length in lengths]
        self.cycles, self.firsts = cycles, np.arange(0, N, coarsening or 1)
        ends = np.append(self.firsts[1:], N)
        self.groups = list(zip(self.firsts, ends, strict=True))
        self.coarsest = [euler(1, UNEVEN[b] - UNEVEN[a]) for a, b in self.groups]
        self.is_one = coarsening is None

    def states(self, n_sweeps):
        """At all edges after so many sweeps."""
        u = [START]
        for n in range(N) if self.is_one else ():
            u.append(self.coarse[n] @ u[n])
        if not self.is_one:
            firsts = [START]
            for h in self.coarsest[:-1]:
                firsts.append(h @ firsts[-1])
            u = self._within(lambda n, v: self.coarse[n] @ v, firsts)
        for front in range(n_sweeps):
            u = self._sweep(np.array(u), front)
        return np.array(u)

    def _sweep(self, old, front):
        def advance(n, v):
            if n < front:
                return old[n + 1]
            change = self.coarse[n] @ (v - old[n]) if n > front else 0.0
            return self.fine[n] @ old[n] + change

        if self.is_one:
            u = [START]
            for n in range(N):
                u.append(advance(n, u[n]))
            return u
        firsts = [old[n] for n in self.firsts]
        for _ in range(self.cycles):
            new = [START]
            for g, (a, b) in enumerate(self.groups[:-1]):
                v = firsts[g]
                for n in range(a, b):
                    v = advance(n, v)
                new.append(v + (self.coarsest[g] @ (new[g] - firsts[g]) if a > front else 0.0))
            firsts = new
        return self._within(advance, firsts)

    def _within(self, advance, firsts):
        u, v = [], firsts[0]
        for first, (a, b) in zip(firsts, self.groups, strict=True):
            v = first
            for n in range(a, b):
                u.append(v)
                v = advance(n, v)
        return [*u, v]

    def gradient(self, tol):
        """Of sum(WEIGHTS * states) by the first state, from cotangents that agree to `tol`."""
        sources = WEIGHTS[1:]
        cotangents = np.zeros((N + 1, 2))  # at edges, without what the loss reads there
        cotangents = self._back(
            lambda n, right: self.coarse[n].T @ (right + sources[n]), cotangents
        )
        n_sweeps = 0
        while True:
            outs = np.array([self.fine[n].T @ (cotangents[n + 1] + sources[n]) for n in range(N)])
            residual = np.abs(outs - cotangents[:N])[1:].max()
            if residual <= tol * max(np.abs(outs).max(), np.abs(sources).max()):
                return WEIGHTS[0] + outs[0], n_sweeps
            old, n_sweeps = cotangents, n_sweeps + 1
            cotangents = self._back(
                lambda n, right, old=old, outs=outs: (
                    outs[n] + self.coarse[n].T @ (right - old[n + 1])
                ),
                old,
            )

    def _back(self, retreat, old):
        new = np.zeros((N + 1, 2))
        if self.is_one:
            for n in reversed(range(N)):
                new[n] = retreat(n, new[n + 1])
            return new
        rights = [old[b] for _, b in self.groups]
        for _ in range(self.cycles):
            corrected, change = [np.zeros(2)], np.zeros(2)
            for g in reversed(range(1, len(self.groups))):
                a, b = self.groups[g]
                left = rights[g]
                for n in reversed(range(a, b)):
                    left = retreat(n, left)
                left = left + self.coarsest[g].T @ change
                change = left - rights[g - 1]
                corrected.insert(0, left)
            rights = corrected
        for right, (a, b) in zip(rights, self.groups, strict=True):
            left = right
            for n in reversed(range(a, b)):
                left = retreat(n, left)
                new[n] = left
        for right, (_, b) in zip(rights, self.groups, strict=True):
            new[b] = right
        return new


def solve_linear(comm, method, start, n_sweeps, **options):
    return nm.solve(
        linear, start, UNEVEN, fine=nm.FixedSteps(diffrax.Euler(), 8), method=method, comm=comm,
        stopping=nm.FixedSweeps(n_sweeps), **options,
    )  # fmt: skip


def states_and_gradient(comm, method, n_sweeps, tol):
    def loss(start):
        solution = solve_linear(comm, method, start, n_sweeps, adjoint_tol=tol)
        return jnp.sum(solution.interface * WEIGHTS), solution.interface

    gradient, states = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(START))
    return states, gradient


@pytest.mark.mpi(max_size=4)
def test_iterates_both_ways_are_those_of_matrices_multiplied_by_hand(comms):
    """With one cycle, which is not exact: on any number of ranks."""
    coarsening = COARSENING[comms.time.size]
    by_hand, tol = ByHand(coarsening), 1e-3
    wanted, n_back = by_hand.gradient(tol)
    assert n_back >= 1
    states, gradient = states_and_gradient(comms.time, two_levels(coarsening), 2, tol)
    np.testing.assert_allclose(states, by_hand.states(2), rtol=0, atol=1e-13)
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-13)
    assert np.max(np.abs(by_hand.states(2) - ByHand(None).states(2))) > 1e-4


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("coarsening, n_sweeps", [(2, 0), (3, 1)])
def test_as_many_cycles_as_groups_are_the_walk_through_all_slices(comms, coarsening, n_sweeps):
    method = two_levels(coarsening, -(-N // coarsening))
    for tol in (1e9, 1e-2):  # iteration 0 of the adjoint, and a sweep or more
        states, gradient = states_and_gradient(comms.time, method, n_sweeps, tol)
        exact = ByHand(None)
        np.testing.assert_allclose(states, exact.states(n_sweeps), rtol=0, atol=1e-13)
        np.testing.assert_allclose(gradient, exact.gradient(tol)[0], rtol=0, atol=1e-13)


@pytest.mark.mpi(2, 2)
def test_a_guess_is_a_start_like_any_other(comms):
    """What H made of its states is found where it is needed: as many cycles are exact from it."""
    guess = np.random.default_rng(1).normal(size=(N + 1, 2))
    guess[0] = START
    found = solve_linear(comms.time, two_levels(3, 3), START, 1, guess=guess)
    wanted = [START]
    fine, coarse = ByHand(None).fine, ByHand(None).coarse
    for n in range(N):
        change = coarse[n] @ (wanted[n] - guess[n]) if n else 0.0
        wanted.append(fine[n] @ guess[n] + change)
    np.testing.assert_allclose(found.interface, wanted, rtol=0, atol=1e-13)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("n_sweeps", [2, 5])
def test_after_k_sweeps_the_first_k_slices_are_serial(comms, n_sweeps):
    found = solve_linear(comms.time, two_levels(3), START, n_sweeps)
    serial = [START]
    for matrix in ByHand(None).fine:
        serial.append(matrix @ serial[-1])
    error = np.max(np.abs(found.interface - np.array(serial)), axis=1)
    assert np.all(error[: n_sweeps + 1] <= 1e-14) and error[-1] > 1e-9


@pytest.mark.mpi(max_size=1)
def test_a_coarsest_propagator_that_fails_is_left_out(comms):
    """Its steps are long: what it cannot pass stays as the walk within the groups has it."""

    def broken(t, u, args):
        return u * jnp.nan

    levels = nm.Levels(3, coarsest=nm.Propagator(broken, EULER))
    method = nm.Parareal(nm.Propagator(linear, EULER), levels=levels)
    found = solve_linear(comms.time, method, START, N)
    np.testing.assert_allclose(found.interface, ByHand(None).states(N), rtol=0, atol=1e-13)
    assert int(found.record.n_guarded) > 0


@pytest.mark.mpi(max_size=2)
def test_tracked_steps_at_the_same_parameters_arrive_at_the_gradient_of_diffrax(comms):
    """With one cycle: what it leaves out vanishes from step to step, both ways."""
    coarse = nm.Propagator(pendulum, nm.FixedSteps(nm.RK4(), 2))
    method = nm.Parareal(coarse, levels=nm.Levels(3))

    def loss(params, carry):
        solution = nm.solve(
            pendulum, params["u0"], EDGES, args=params["args"], ts=TS, carry=carry, method=method,
            comm=comms.time, fine=nm.FixedSteps(nm.RK4(), STEPS),
        )  # fmt: skip
        return loss_of(solution.ys)

    step, params = nm.value_and_grad(loss), {"u0": U0, "args": ARGS}
    value, gradient, carry = step(params, nm.SolveCarry())
    for _ in range(3 * len(EDGES)):
        value, gradient, carry = step(params, carry)
    (_, ys), wanted = plain(tuple(TS))
    assert carry.jump <= 1e-12 and carry.residual <= 1e-12
    np.testing.assert_allclose(value, loss_of(ys), rtol=1e-11)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10),
        gradient,
        {"u0": wanted[0], "args": wanted[1]},
    )


@pytest.mark.mpi(max_size=1)
def test_numbers_of_a_block_are_those_counted_one_by_one():
    for n_slices, m in ((7, 3), (8, 2), (9, 4), (5, 7)):
        grouping, firsts = Grouping(n_slices, m), list(range(0, n_slices, m))
        assert grouping.n_groups == len(firsts)
        for first in range(n_slices):
            for n_owned in range(1, n_slices - first + 1):
                after = first + n_owned
                begin = [n for n in firsts if first <= n < after]
                wanted: dict[GroupCount, int] = {
                    "pulled": sum(n not in (firsts[0], firsts[-1]) for n in begin),
                    "sends_right": int(after < n_slices and after not in firsts),
                    "sends_left": int(first not in firsts),
                    "relays_right": int(bool(begin) and begin[-1] != firsts[-1]),
                    "relays_left": int(bool(begin) and begin[0] > 0),
                }
                for what, number in wanted.items():
                    assert grouping.number_of(what, first, n_owned) == number
                for front in range(-1, n_slices):
                    passed = sum(n > front and n != firsts[-1] for n in begin)
                    assert grouping.number_of("passed", first, n_owned, front) == passed


@pytest.mark.mpi(max_size=1)
def test_two_levels_are_taken_where_a_sweep_is_half_as_deep():
    def choose(n_slices, number=None, coarsening=None, cycles=1):
        return choose_grouping(n_slices, number=number, coarsening=coarsening, cycles=cycles)

    assert choose(32) is None and choose(4096) == Grouping(4096, 45)
    assert choose(32, coarsening=4) == Grouping(32, 4)
    assert choose(32, number=2) == Grouping(32, 4)
    assert choose(4096, number=1) is None
    assert choose(3, number=2, coarsening=8) is None  # one group
    assert choose(128) is not None and choose(128, cycles=3) is None


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(coarsening=1), "`coarsening` is 1; expected a whole number of at least 2"),
        (dict(cycles=0), "`cycles` is 0; expected a whole number of at least 1"),
        (dict(number=3), "`number` of levels is 3; expected 1, 2 or None"),
    ],
)
def test_levels_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ProblemError, match=message):
        nm.Levels(**options)


def predator_and_prey(t, u, args):
    return jnp.stack([1.5 * u[0] - u[0] * u[1], u[0] * u[1] - 3.0 * u[1]])


def heat(t, u, args):
    """Four sine waves on a rod."""
    return -0.5 * jnp.arange(1.0, 5.0) ** 2 * u


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "field, start", [(predator_and_prey, [5.0, 3.0]), (heat, [1.0, -1.0, 0.5, 1.0])]
)
def test_one_or_two_cycles_take_as_many_sweeps_as_one_level(comms, field, start):
    """With two steps over a group of four slices: one alone is next to the limit of stability."""
    coarse, coarsest = (nm.Propagator(field, nm.FixedSteps(nm.RK4(), n)) for n in (1, 2))

    def n_sweeps(levels):
        solution = nm.solve(
            field, jnp.array(start), np.linspace(0.0, 2.0, 25), fine=nm.FixedSteps(nm.RK4(), 8),
            method=nm.Parareal(coarse, levels=levels), stopping=nm.JumpTolerance(1e-7),
            comm=comms.time,
        )  # fmt: skip
        assert solution.status is nm.Status.CONVERGED
        return int(solution.sweeps)

    one = n_sweeps(None)
    assert n_sweeps(nm.Levels(4, 1, coarsest)) <= one + 1
    assert n_sweeps(nm.Levels(4, 2, coarsest)) == one
