"""The coarse problem: its three ways against NumPy, what they send, and whole solves by them."""

from typing import get_args

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.problems import PROBLEMS
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.comms import alone, free_comms, make_comms, make_time_comm, world
from nodepint_mpi.parallel.counters import Tally, counting
from nodepint_mpi.parallel.exchange import max_over_ranks
from nodepint_mpi.parallel.recurrence import (
    solve_adjoint_coordinates,
    solve_both,
    solve_coordinates,
)
from nodepint_mpi.parallel.recurrence_cost import Sizes, Way, choose_way, count_seconds
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.profiling.trace import Call, Profile, read_program
from nodepint_mpi.profiling.waits import _partners

WAYS = get_args(Way)


def draw(n_slices, rank, batch, seed=0):
    random = np.random.default_rng(seed)
    transfers = random.normal(size=(n_slices, *batch, rank, rank)) / rank**0.5
    return transfers, random.normal(size=(n_slices, *batch, rank))


def bounded(end, restart, radius):
    """Cut sample by sample, and whether any was."""
    flat, fresh = end.reshape(-1, end.shape[-1]).copy(), restart.reshape(-1, end.shape[-1])
    cut = False
    for i, one in enumerate(flat):
        if not np.all(np.isfinite(one)):
            flat[i], cut = fresh[i], True
        if radius is not None and np.linalg.norm(flat[i]) > radius:
            flat[i], cut = flat[i] * radius / np.linalg.norm(flat[i]), True
    return flat.reshape(end.shape), cut


def walk(transfers, residuals, radius):
    """Coordinates at the starts, and how many slices were cut: the definition."""
    c, starts, n_cut = np.zeros_like(residuals[0]), [], 0
    for matrix, vector in zip(transfers, residuals, strict=True):
        starts.append(c)
        c, cut = bounded(np.einsum("...i,...ij->...j", c, matrix) + vector, vector, radius)
        n_cut += cut
    return np.stack(starts), n_cut


def walk_back(transfers, residuals):
    """Coordinates at the left and right edges."""
    e, lefts, rights = np.zeros_like(residuals[0]), [], []
    for matrix, vector in zip(transfers[::-1], residuals[::-1], strict=True):
        rights.append(e)
        e, _ = bounded(np.einsum("...ij,...j->...i", matrix, e) + vector, vector, None)
        lefts.append(e)
    return np.stack(lefts[::-1]), np.stack(rights[::-1])


def make_check(comms, n_slices, *, bounded=False):
    """A function that compares all ways with NumPy, and returns how many slices were cut."""
    time = comms.time
    owned = own_slices(np.linspace(0.0, 1.0, n_slices + 1), time.size, time.rank)

    @jax.jit
    def solve(transfers, residuals, radius):
        limit = radius if bounded else None
        found = {}
        for way in WAYS:
            forward = solve_coordinates(time, transfers, residuals, limit, owned, way)
            back = solve_adjoint_coordinates(time, transfers, residuals, owned, way)
            n_damped = max_over_ranks(time, forward.n_damped)
            found[way] = (forward.at_starts, *back), n_damped
            forward, back = solve_both(time, transfers, residuals, residuals, limit, owned, way)
            n_damped = max_over_ranks(time, forward.n_damped)
            found[f"{way} at once"] = (forward.at_starts, *back), n_damped
        return found

    def check(transfers, residuals, radius=np.inf):
        own = solve(transfers[owned.indices], residuals[owned.indices], radius)
        every = comms.control.allgather(jax.device_get(own))
        every = every[time.group * time.size :][: time.size]
        with np.errstate(all="ignore"):
            starts, n_cut = walk(transfers, residuals, radius if bounded else None)
            wanted = starts, *walk_back(transfers, residuals)
        for way in own:
            for i, whole in enumerate(wanted):
                ours = np.concatenate([part[way][0][i] for part in every])
                scale = np.max(np.abs(whole[np.isfinite(whole)]), initial=1e-300)
                np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-12 * scale)
            assert int(own[way][1]) == max(comms.control.allgather(n_cut))
        return n_cut

    return check


@pytest.mark.parametrize(
    "n_slices, rank, batch",
    [
        pytest.param(4, 3, (2,), marks=pytest.mark.mpi(sizes=(1, 2))),
        pytest.param(7, 1, (), marks=pytest.mark.mpi(sizes=(1, 3))),
        pytest.param(9, 4, (2, 2), marks=pytest.mark.mpi(sizes=(1, 4))),
    ],
)
def test_all_ways_agree_with_numpy(comms, n_slices, rank, batch):
    assert make_check(comms, n_slices)(*draw(n_slices, rank, batch)) == 0


@pytest.mark.mpi(sizes=(1, 2, 4))
def test_a_radius_cuts_the_same_in_all_ways(comms):
    check, (transfers, residuals) = make_check(comms, 7, bounded=True), draw(7, 3, (2,))
    assert check(transfers, residuals, 1e3) == 0
    assert 0 < check(transfers, residuals, 2.0) < 7
    assert check(transfers, residuals, 0.5) == 7
    transfers[2, 1, 0, 0] = np.nan
    assert check(transfers, residuals, 1e3) == 1


@pytest.mark.mpi(sizes=(1, 3))
def test_a_matrix_that_is_not_a_number_begins_anew_in_all_ways(comms):
    check = make_check(comms, 7)
    for where in (0, 2, 6):
        transfers, residuals = draw(7, 3, (2,))
        transfers[where, 1, 0, 0] = np.nan
        assert check(transfers, residuals) == 1


@pytest.mark.mpi(sizes=(1, 2, 4))
def test_maps_that_overflow_only_when_composed_are_walked_through(comms):
    """Coordinates stay zero under matrices whose product is not finite."""
    transfers, residuals = draw(8, 2, ())
    transfers[1:7] *= 1e200
    residuals[:-1] = 0.0
    assert make_check(comms, 8)(transfers, residuals) == 0


@pytest.mark.mpi(4, 4)
def test_lines_of_ranks_stay_in_step_where_one_has_to_cut():
    comms = make_comms(world(), n_groups=2)
    transfers, residuals = draw(7, 3, (2,), seed=comms.time.group)
    check = make_check(comms, 7, bounded=True)
    assert (check(transfers, residuals * 0.01**comms.time.group, 2.0) > 0) == (
        comms.time.group == 0
    )
    jax.effects_barrier()
    free_comms(comms)


# What P ranks send to each other in the scan: vectors and maps, from left to right.
SCAN = {2: (1, 0), 3: (2 + 1, 1), 4: (3 + 1 + 2, 2)}


@pytest.mark.parametrize(
    "n_slices",
    [
        pytest.param(4, marks=pytest.mark.mpi(sizes=(2, 3))),
        pytest.param(9, marks=pytest.mark.mpi(sizes=(2, 4))),
    ],
)
def test_what_is_sent_is_counted_and_depends_on_slices_in_one_way_only(comms, n_slices):
    time, rank, samples = comms.time, 3, 2
    owned = own_slices(np.linspace(0.0, 1.0, n_slices + 1), time.size, time.rank)
    transfers, residuals = map(jnp.asarray, draw(owned.n_owned, rank, (samples,)))
    widest, n_others = -(-n_slices // time.size), time.size - 1
    vector = samples * rank * 2  # words of 4 bytes
    maps = (rank + 1) * vector
    n_vectors, n_maps = SCAN[time.size]
    agreed = time.size, time.size  # one number of each rank, messages and words
    wanted = {
        "slices": (n_others + 1, n_others * widest * (maps + vector)),
        "blocks": (n_others + 1 + agreed[0], n_others * (maps + vector) + agreed[1]),
        "scan": (n_vectors + n_maps + agreed[0], n_vectors * vector + n_maps * maps + agreed[1]),
    }

    @jax.jit
    def solve(transfers, residuals):
        counts = {}
        for way in WAYS:
            with counting() as forward:
                solve_coordinates(time, transfers, residuals, None, owned, way)
            with counting() as back:
                solve_adjoint_coordinates(time, transfers, residuals, owned, way)
            with counting() as both:
                solve_both(time, transfers, residuals, residuals, None, owned, way)
            counts[way] = [each.tally.as_array() for each in (forward, back, both)]
        return counts

    # At once a vector goes along with every map, and one more comes back; agreed is once.
    more = n_others * vector
    at_once = {
        "slices": (n_others + 1, wanted["slices"][1] + 2 * widest * more),
        "blocks": (wanted["blocks"][0], wanted["blocks"][1] + 2 * more),
        "scan": tuple(2 * each - once for each, once in zip(wanted["scan"], agreed, strict=True)),
    }
    for way, counts in jax.device_get(solve(transfers, residuals)).items():
        for own, expected in zip(counts, (wanted, wanted, at_once), strict=True):
            total = Tally(*np.sum(comms.control.allgather(own), axis=0))
            assert (total.messages, total.words) == expected[way], way


@pytest.mark.mpi(max_size=3)
@pytest.mark.parametrize("way", WAYS)
def test_calls_of_ranks_are_matched_to_tell_waits(comms, way):
    """Whoever takes part in a message, by its channel, has as many calls there as the others."""
    time = comms.time
    owned = own_slices(np.linspace(0.0, 1.0, 10), time.size, time.rank)

    @jax.jit
    def solve(transfers, residuals):
        forward = solve_coordinates(time, transfers, residuals, None, owned, way)
        return forward, solve_adjoint_coordinates(time, transfers, residuals, owned, way)

    arrays = map(jnp.asarray, draw(owned.n_owned, 2, (3,)))
    ops = read_program(solve.lower(*arrays).compile().as_text() or "").values()
    calls = [Call(op.phase, op.channel, 1.0, 1.0) for op in ops if op.phase and op.channel]
    assert (len(calls) > 0) == (time.size > 1)
    groups = list(_partners(comms.control.allgather(Profile({}, calls)), 1))
    assert all(len({len(numbers) for numbers in members}) <= 1 for members in groups)
    matched = {each for members in groups for numbers in members for each in numbers}
    assert matched == {
        (rank, i)
        for rank, n_calls in enumerate(comms.control.allgather(len(calls)))
        for i in range(n_calls)
    }


FINE, COARSE = nm.FixedSteps(nm.RK4(), 6), nm.FixedSteps(nm.RK4(), 2)
METHODS = {
    "tangent": dict(method="tangent", recycle=False, tangents=COARSE, trust=None),
    "tangent cut": dict(method="tangent", recycle=False, tangents=COARSE, trust=1e-4),
    "reduced": dict(method="reduced"),
}


TWO, THREE = pytest.mark.mpi(2, 2), pytest.mark.mpi(3, 3)  # more of them compile for longer


@pytest.mark.timeout_s(240)
@pytest.mark.parametrize(
    "name, way",
    [
        pytest.param("tangent", "blocks", marks=TWO),
        pytest.param("tangent cut", "scan", marks=THREE),
        pytest.param("reduced", "scan", marks=TWO),
    ],
)
def test_solutions_and_gradients_are_those_of_one_rank(comms, on_one_rank, name, way):
    problem, edges = PROBLEMS["fitzhugh_nagumo"], np.linspace(0.0, 6.0, 8)
    args = {name: jnp.asarray(value) for name, value in problem.args.items()}

    def solve(comm, way):
        def loss(initial):
            solution = nm.solve(
                problem.field, initial, edges, args=args, comm=comm, fine=FINE, coarse=COARSE,
                basis=SharedBasis("identity", recurrence=way), stopping=nm.FixedSweeps(2),
                adjoint_tol=1e-12, **METHODS[name],
            )  # fmt: skip
            return jnp.sum(jnp.sin(solution.interface)), solution

        gradient, solution = jax.grad(loss, has_aux=True)(jnp.asarray(problem.initial))
        return jax.device_get((gradient, solution.interface, solution.record.n_damped))

    gradient, interface, n_damped = solve(comms.time, way)
    wanted = on_one_rank(lambda: solve(make_time_comm(alone()), "slices"))
    np.testing.assert_allclose(interface, wanted[1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient, wanted[0], rtol=1e-10)
    assert n_damped == wanted[2] and (n_damped > 0) == (name == "tangent cut")


def test_a_way_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would refuse it, too
    with pytest.raises(ProblemError, match="recurrence 'tree'; choose from 'auto', 'slices'"):
        SharedBasis("identity", recurrence="tree")  # pyright: ignore[reportArgumentType]


@pytest.mark.mpi(max_size=1)
def test_few_ranks_walk_through_all_slices_and_many_compose():
    def chosen(n_ranks, n_slices, rank=16, **sizes):
        return choose_way(Sizes(n_ranks, n_slices, rank, **sizes))

    assert [chosen(n, 64, n_samples=40) for n in (1, 2, 4, 8, 64)] == ["slices"] * 3 + ["scan"] * 2
    assert {
        chosen(2, n, rank, n_samples=n_samples)
        for n in (8, 1024)
        for rank in (1, 16, 64)
        for n_samples in (1, 64)
    } == {"slices"}  # composing takes longer than it saves
    assert chosen(512, 512) == chosen(4096, 4096, n_lines=8) == "scan"
    # Each step of the walk costs something, however little there is to do, and so does a message.
    assert chosen(16, 16, 1) == "slices" and chosen(512, 512, 1) == "scan"


@pytest.mark.mpi(max_size=1)
def test_what_a_way_takes_grows_with_the_logarithm_of_the_ranks_by_scan_alone():
    few, many = (count_seconds(Sizes(n, n, 16, n_samples=8)) for n in (256, 4096))
    # Sixteen times the maps, but for messages along a tree, whose depth grows from 8 to 12.
    assert many["slices"] == pytest.approx(16 * few["slices"], rel=0.1)
    assert many["blocks"] == pytest.approx(16 * few["blocks"], rel=0.2)
    # 11 rounds of composing for 7, and the ranks agree along trees of 12 levels for 8.
    assert 11 / 7 > many["scan"] / few["scan"] > 12 / 8
