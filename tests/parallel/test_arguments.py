"""What may stand in `args`, what gradients and jit do with it, and what is compiled again."""

import functools
import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.errors import LayoutError, ProblemError
from nodepint_mpi.parallel import ivp
from nodepint_mpi.parallel.comms import alone, make_time_comm
from nodepint_mpi.parallel.programs import MOST_PROGRAMS, Programs, SameCode

EDGES = np.linspace(0.0, 1.0, 5)
COARSE = nm.FixedSteps(nm.RK4(), 2)
BASIS = nm.SharedBasis("identity")
OPTIONS = {
    "parareal": {},
    "tangent": dict(basis=BASIS),
    "reduced": dict(basis=BASIS),
    "picard": {},
    "serial": {},
}


def decay(t, u, args):
    return -args * u


def field(t, u, args):
    """u' = -2 k u, if every array that has no derivative is what it should be."""
    is_key = jax.random.key_data(args["key"])[1] == 3
    sign = jnp.where(args["flags"][1] & is_key, -1.0, jnp.nan)
    assert args["twice"] == 2 and args["name"] == "rate"  # known while compiling
    return sign * args["k"] * args["two"][0].astype(u.dtype) * u


ARGS = {
    "two": np.array([2, 3]),
    "flags": jnp.array([False, True]),
    "key": jax.random.key(3),
    "twice": 2,
    "name": "rate",
}
RATE = 0.7
GUESS = jnp.asarray(np.exp(-1.3 * EDGES)[:, None])


# Compiling takes longer than running. The continuous adjoint is inside of a slice: once with the
# tangents of it, once without.
PAIRS = [
    pair
    for pair in itertools.product(OPTIONS, ["discrete", "continuous"])
    if pair[1] == "discrete" or pair[0] in ("tangent", "picard")
]


@pytest.mark.mpi(max_size=1)
@pytest.mark.timeout_s(240)  # programs to compile
@pytest.mark.parametrize("method, adjoint", PAIRS)
def test_gradients_with_arrays_that_have_none(comms, method, adjoint):
    """Whole numbers, booleans and keys in `args`, a guess, under grad and under jit of grad.

    The state and the guess are arrays that the jitted function closes over. Closed form:
    u(1) = u0 exp(-2 k), and its derivatives.
    """
    u0 = jnp.array([1.0])

    def end(k, u0, guess):
        return nm.solve(
            field, u0, EDGES, args=ARGS | {"k": k}, guess=guess, method=method, comm=comms.time,
            fine=nm.FixedSteps(nm.RK4(), 16, adjoint=adjoint), coarse=COARSE,
            stopping=nm.JumpTolerance(1e-11), **OPTIONS[method],
        ).interface[-1, 0]  # fmt: skip

    wanted = np.exp(-2 * RATE) * np.array([1.0, -2.0])
    value, slope = jax.jit(jax.value_and_grad(lambda k: end(k, u0, GUESS)))(RATE)
    np.testing.assert_allclose([value, slope], wanted, rtol=1e-6)
    if (method, adjoint) == ("parareal", "discrete"):
        bars = jax.grad(end, (0, 1, 2))(RATE, u0, GUESS)
        np.testing.assert_allclose(jnp.concatenate(bars[1:], axis=None)[1:], 0.0)
        np.testing.assert_allclose([bars[0], bars[1][0]], wanted[::-1], rtol=1e-6)


@pytest.fixture
def count_traces(monkeypatch):
    """How often `solve` has been traced."""
    traced = []
    own_slices = ivp.own_slices
    monkeypatch.setattr(
        ivp, "own_slices", lambda *args, **more: traced.append(1) or own_slices(*args, **more)
    )
    return lambda: len(traced)


@pytest.mark.mpi(max_size=1)
def test_numbers_and_equal_code_do_not_compile_again(comms, count_traces):
    """Floats of every kind, functions made anew, states that are trees."""

    def solve(rate, decay=decay, u0=(1.0,)):
        solution = nm.solve(
            decay, u0, EDGES, args=rate, comm=comms.time, fine=COARSE, coarse=COARSE
        )
        return jax.tree.leaves(solution.interface)[0][-1]

    for rate in (0.5, 0.25, np.float64(0.75).item()):
        np.testing.assert_allclose(solve(rate), [np.exp(-rate)], rtol=1e-5)
    assert count_traces() == 1

    def made(power, factor=1.0):
        def inner(u):
            return factor * u**power

        return lambda t, u, args: -args * inner(u)

    for rate in (0.5, 0.25):
        np.testing.assert_allclose(solve(rate, made(1)), [np.exp(-rate)], rtol=1e-5)
        np.testing.assert_allclose(solve(rate, made(2)), [1 / (1 + rate)], rtol=1e-5)
    assert count_traces() == 3  # one for each power
    np.testing.assert_allclose(solve(0.5, made(1, 2.0)), [np.exp(-1.0)], rtol=1e-5)
    np.testing.assert_allclose(solve(0.5, made(1, 1)), [np.exp(-0.5)], rtol=1e-5)
    assert count_traces() == 5

    def swap(t, u, args):
        return {"x": u["v"], "v": -u["x"]}

    for x in (1.0, 2.0):
        v = solve(1.0, swap, {"v": 0.0, "x": x})
        np.testing.assert_allclose(v, -x * np.sin(1.0), rtol=1e-5)
    assert count_traces() == 6


@pytest.mark.mpi(max_size=1)
def test_whole_numbers_stay_known_to_the_field(comms):
    """As exponents, in loops and in branches; and each is a program of its own."""

    def polynomial(t, u, args):
        return -sum(args["scale"] for _ in range(args["n"])) * (u if args["linear"] else u**2)

    for n, linear, wanted in [(1, True, np.exp(-0.5)), (2, True, np.exp(-1)), (2, False, 0.5)]:
        args = {"n": n, "scale": 0.5, "linear": linear}
        solution = nm.solve(
            polynomial, 1.0, EDGES, args=args, comm=comms.time, fine=COARSE, coarse=COARSE
        )
        np.testing.assert_allclose(solution.interface[-1], wanted, rtol=1e-5)


@pytest.mark.mpi(max_size=1)
def test_code_is_the_same_only_if_all_that_it_reads_is():
    def with_cells(value):
        return lambda t, u, args: value

    shared = np.ones(2)
    pairs = [(1.0, 1.0), ("a", "a"), ((1, "a"), (1, "a")), (shared, shared), (None, None)]
    for one, other in pairs:
        assert SameCode(with_cells(one)) == SameCode(with_cells(other))
    pairs = [(1.0, 2.0), (1, 1.0), (0.0, -0.0), (True, 1), (np.ones(2), np.ones(2)), ([], [])]
    for one, other in pairs:
        assert SameCode(with_cells(one)) != SameCode(with_cells(other))
    inner = with_cells(1.0), with_cells(1.0), with_cells(2.0)
    assert SameCode(with_cells(inner[0])) == SameCode(with_cells(inner[1]))
    assert SameCode(with_cells(inner[0])) != SameCode(with_cells(inner[2]))
    partials = [functools.partial(decay, args=rate) for rate in (1.0, 1.0, 2.0)]
    assert SameCode(partials[0]) == SameCode(partials[1]) != SameCode(partials[2])

    cell = 1.0

    def changing(t, u, args):
        return cell

    before = SameCode(changing)
    cell = 2.0
    assert before != SameCode(changing)


FACTOR = 1.0
FACTORS = {"rate": 1.0}
ROW = np.ones(2)


def by_a_global(t, u, args):
    return -FACTOR * u


def by_a_helper(t, u, args):
    return by_a_global(t, u, args)


def by_a_dictionary(t, u, args):
    return -FACTORS["rate"] * u


def by_an_array(t, u, args):
    return -ROW[0] * u


class Called:
    def __call__(self, t, u, args):
        return by_a_helper(t, u, args)


CALLED = Called()


@pytest.mark.parametrize("field", [by_a_global, by_a_helper, by_a_dictionary, by_an_array, CALLED])
def test_a_solve_sees_the_globals_of_its_field_as_they_are_now(comms, monkeypatch, field):
    def end():
        solved = nm.solve(field, 1.0, EDGES, comm=comms.time, fine=COARSE, coarse=COARSE)
        return float(solved.interface[-1])

    before = end()
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    monkeypatch.setitem(FACTORS, "rate", 2.0)
    ROW[0] = 2.0
    try:
        assert end() == pytest.approx(before**2, rel=1e-4)
    finally:
        ROW[0] = 1.0


@pytest.mark.mpi(max_size=1)
def test_a_bounded_number_of_programs_is_kept_and_the_rest_let_go(monkeypatch):
    """Functions that are really different: the oldest program goes, with all that it holds."""
    kept, made = Programs(most=2), []
    for key in (1, 2, 1, 3, 1):  # 2 is the least recently used when 3 comes
        assert kept.get(key, lambda key=key: made.append(key) or abs) is abs
    assert made == [1, 2, 3] and len(kept) == 2
    kept.get(2, lambda: made.append(2) or abs)
    assert made == [1, 2, 3, 2]

    with make_time_comm(alone()) as comm:
        assert comm.programs._most == MOST_PROGRAMS
        monkeypatch.setattr(comm.programs, "_most", 2)
        seen = []
        for _ in range(4):
            constant = jnp.ones(1)  # of its own: another program
            held = weakref.ref(constant)
            seen.append(held)
            nm.solve(
                lambda t, u, args, c=constant: -c * u, constant, EDGES, comm=comm, method="picard",
                fine=COARSE,
            )  # fmt: skip
            del constant
        gc.collect()
        assert len(comm.programs) == 2
        assert [held() is None for held in seen] == [True, True, False, False]
    gc.collect()
    assert all(held() is None for held in seen)


@pytest.mark.mpi(max_size=2)
def test_a_line_can_be_given_back(comms):
    """With what was compiled for it; what was computed stays."""
    with make_time_comm(comms.control) as line:
        solution = nm.solve(decay, 1.0, EDGES, args=1.0, comm=line, fine=COARSE, coarse=COARSE)
        assert len(line.programs) == 1 and not line.is_free
    assert line.is_free and len(line.programs) == 0
    np.testing.assert_allclose(solution.interface[-1], np.exp(-1.0), rtol=1e-5)
    line.free()  # a second time does nothing
    with pytest.raises(ProblemError, match="has been freed"):
        nm.solve(decay, 1.0, EDGES, args=1.0, comm=line, fine=COARSE, coarse=COARSE)
    with pytest.raises(LayoutError, match="on purpose"), make_time_comm(comms.control) as line:
        raise LayoutError("on purpose, on all ranks")
    assert line.is_free
    with pytest.raises(ProblemError, match="cannot be freed"):
        nm.world_time_comm().free()


@pytest.mark.mpi(max_size=1)
def test_more_lines_than_mpi_has_room_for_one_after_another():
    """65,531 communicators at a time; a line takes two."""
    for _ in range(33_000):
        make_time_comm(alone()).free()


@pytest.mark.mpi(max_size=2)
def test_times_that_are_traced_are_refused(comms):
    with pytest.raises(ProblemError, match="`edges` is traced"):
        jax.jit(
            lambda edges: (
                nm.solve(
                    decay, 1.0, edges, args=1.0, comm=comms.time, fine=COARSE, coarse=COARSE
                ).interface
            )
        )(EDGES)


@pytest.mark.mpi(max_size=2)
def test_an_argument_that_cannot_be_compared_is_refused(comms):
    with pytest.raises(ProblemError, match="holds a set"):
        nm.solve(
            lambda t, u, args: -u, 1.0, EDGES, args=({1, 2},), comm=comms.time, fine=COARSE,
            coarse=COARSE,
        )  # fmt: skip
