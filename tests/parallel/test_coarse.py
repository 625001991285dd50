"""The coarse problem: its three ways against NumPy, what they send, and whole solves by them."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.problems import PROBLEMS
from nodepint_mpi.errors import ProblemError
from nodepint_mpi.parallel.coarse import Recurrence, solve_cocoordinates, solve_coordinates
from nodepint_mpi.parallel.comms import alone, make_time_comm
from nodepint_mpi.parallel.exchange import max_over_ranks
from nodepint_mpi.parallel.shared_basis import SharedBasis
from nodepint_mpi.parallel.tally import Tally, counting
from nodepint_mpi.run.timing.trace import Call, Profile, read_program
from nodepint_mpi.run.timing.waits import _partners

WAYS = get_args(Recurrence)


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


def solve_in_all_ways(comms, transfers, residuals, radius=None):
    """(starts, slices cut, lefts, rights) by each way, of all slices."""
    time = comms.time
    owned = own_slices(np.linspace(0.0, 1.0, len(residuals) + 1), time.size, time.rank)
    radius = None if radius is None else jnp.asarray(radius)

    @jax.jit
    def solve(transfers, residuals):
        found = {}
        for way in WAYS:
            forward = solve_coordinates(time, transfers, residuals, radius, owned, way)
            back = solve_cocoordinates(time, transfers, residuals, owned, way)
            n_damped = max_over_ranks(time, forward.n_damped)
            found[way] = forward.at_starts, back.at_lefts, back.at_rights, n_damped
        return found

    own = jax.device_get(solve(jnp.asarray(transfers[owned.indices]), residuals[owned.indices]))
    every = comms.control.allgather(own)
    return {
        way: [np.concatenate([part[way][i] for part in every]) for i in range(3)] + [own[way][3]]
        for way in WAYS
    }


def require_all(comms, transfers, residuals, radius=None):
    with np.errstate(all="ignore"):
        starts, n_cut = walk(transfers, residuals, radius)
        lefts, rights = walk_back(transfers, residuals)
    for found in solve_in_all_ways(comms, transfers, residuals, radius).values():
        for ours, wanted in zip(found, (starts, lefts, rights), strict=False):
            scale = np.max(np.abs(wanted[np.isfinite(wanted)]), initial=1e-300)
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-12 * scale)
        assert int(found[3]) == n_cut
    return n_cut


@pytest.mark.parametrize(
    "n_slices, rank, batch", [(4, 3, (2,)), (7, 1, ()), (9, 5, (3,)), (6, 2, (2, 2))]
)
def test_all_ways_agree_with_numpy(comms, n_slices, rank, batch):
    assert require_all(comms, *draw(n_slices, rank, batch)) == 0


def test_a_radius_that_cuts_nothing_changes_nothing(comms):
    assert require_all(comms, *draw(7, 3, (2,)), radius=1e3) == 0


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_a_radius_cuts_the_same_in_all_ways(comms, radius):
    """All slices, or some."""
    n_cut = require_all(comms, *draw(7, 3, (2,)), radius=radius)
    assert 0 < n_cut and (radius == 0.5) == (n_cut == 7)


@pytest.mark.parametrize("radius", [None, 1e3])
@pytest.mark.parametrize("where", [0, 2, 6])
def test_a_matrix_that_is_not_a_number_begins_anew_in_all_ways(comms, where, radius):
    transfers, residuals = draw(7, 3, (2,))
    transfers[where, 1, 0, 0] = np.nan
    assert require_all(comms, transfers, residuals, radius) == 1


def test_maps_that_overflow_only_when_composed_are_walked_through(comms):
    """Coordinates stay zero under matrices whose product is not finite."""
    transfers, residuals = draw(8, 2, ())
    transfers[1:7] *= 1e200
    residuals[:-1] = 0.0
    assert require_all(comms, transfers, residuals) == 0


# What P ranks send to each other in the scan: vectors and maps, from left to right.
SCAN = {2: (1, 0), 3: (2 + 1, 1), 4: (3 + 1 + 2, 2)}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("n_slices", [4, 9])
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
    for way in WAYS:
        for direction in (solve_coordinates, solve_cocoordinates):

            @jax.jit
            def solve(transfers, residuals, way=way, direction=direction):
                arguments = (None, owned) if direction is solve_coordinates else (owned,)
                with counting() as ledger:
                    solved = direction(time, transfers, residuals, *arguments, way)
                return solved, ledger.tally.as_array()

            counts = np.asarray(solve(transfers, residuals)[1])
            total = Tally(*np.sum(comms.control.allgather(counts), axis=0))
            assert (total.messages, total.words) == wanted[way], way


@pytest.mark.parametrize("way", WAYS)
def test_calls_of_ranks_are_matched_to_tell_waits(comms, way):
    """Whoever takes part in a message, by its channel, has as many calls there as the others."""
    time = comms.time
    owned = own_slices(np.linspace(0.0, 1.0, 10), time.size, time.rank)

    @jax.jit
    def solve(transfers, residuals):
        forward = solve_coordinates(time, transfers, residuals, None, owned, way)
        return forward, solve_cocoordinates(time, transfers, residuals, owned, way)

    arrays = map(jnp.asarray, draw(owned.n_owned, 2, (3,)))
    text = solve.lower(*arrays).compile().as_text()
    messages = "\n".join(line for line in text.splitlines() if " custom-call(" in line)
    ops = read_program(messages).values()
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


@pytest.mark.timeout_s(240)
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "name, way", [("tangent", "blocks"), ("tangent cut", "scan"), ("reduced", "scan")]
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


def test_a_way_that_is_not_known_is_refused():
    with pytest.raises(ProblemError, match="solved by 'tree'; choose among 'slices', 'blocks'"):
        SharedBasis("identity", recurrence="tree")  # pyright: ignore[reportArgumentType]
