"""States, fields, args and options of every kind: solved right, or refused with their place."""

import json
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nodepint_mpi as nm
from nodepint_mpi.errors import NonFiniteError, ProblemError
from nodepint_mpi.parallel.problem import as_field, check_field, lay_out, lay_out_guess

EDGES = np.linspace(0.0, 1.0, 5)
STEPS = dict(fine=nm.FixedSteps(nm.RK4(), 16), coarse=nm.FixedSteps(nm.RK4(), 2))
FLOATS = np.float32, np.float64
WHOLE = np.int8, np.int64, np.uint16

shapes = st.sampled_from([(), (1,), (3,), (2, 2), (0,)])
values = st.integers(1, 9)


def leaves(dtypes):
    arrays = st.builds(
        lambda shape, n, dtype: np.full(shape, n, dtype), shapes, values, st.sampled_from(dtypes)
    )
    return st.one_of(arrays, arrays.map(jnp.asarray), values, values.map(float))


def trees(of):
    return st.recursive(
        of,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
        ),
        max_leaves=5,
    )


states = st.sampled_from(FLOATS).flatmap(lambda dtype: trees(leaves([dtype, *WHOLE])))


def types_of(tree):
    """The floating-point types of those leaves that have one."""
    found = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")}
    return {dtype for dtype in found if dtype.kind == "f"}


def size_of(tree):
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))


def rates_of(tree):
    """A rate for every entry: no two leaves can be mistaken for each other."""
    flat, structure = jax.tree.flatten(tree)
    return structure.unflatten([np.full(np.shape(x), -0.1 * n) for n, x in enumerate(flat)])


def decay(t, u, rates):
    return jax.tree.map(lambda rate, x: jnp.asarray(rate, x.dtype) * x, rates, u)


@pytest.mark.mpi(max_size=1)
@settings(max_examples=25)
@given(states.filter(size_of))
def test_any_state_reaches_its_field_leaf_by_leaf(u0):
    """The slope of the array is the slope of every leaf, in the one type of the state."""
    initial, layout = lay_out(u0)
    (wanted_type,) = types_of(u0) or {np.dtype(float)}
    assert initial.dtype == layout.dtype == wanted_type and initial.size == size_of(u0)
    state = layout.split(initial)
    structure = jax.tree.structure(u0)
    if not (isinstance(u0, (list, tuple)) and all(map(np.isscalar, u0))):  # a plain vector
        assert jax.tree.structure(state) == structure
    rates = rates_of(state)
    field = as_field(decay, layout)
    check_field(field, 0.0, rates)
    slopes = layout.split(field(jnp.zeros((), wanted_type), initial, rates))
    for slope, rate, x in zip(*map(jax.tree.leaves, (slopes, rates, state)), strict=True):
        assert slope.dtype == wanted_type and slope.shape == np.shape(rate)
        np.testing.assert_allclose(slope, rate * np.asarray(x), rtol=1e-6)
    guess = jax.tree.map(lambda x: np.stack([x] * 4), state)
    np.testing.assert_array_equal(lay_out_guess(guess, layout, 4), np.stack([initial] * 4))


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "u0",
    [
        [{"n": 1, "x": np.ones((1, 2), np.float32)}, (np.full(2, 2), {"y": [np.float32(1.0), 2]})],
        {"x": np.ones(2), "n": np.full((2, 1), 2, np.int32), "t": 1},
        (np.full(2, 2, np.int8), [3]),
    ],
)
def test_solutions_of_trees_are_the_closed_form(comms, u0):
    rates = rates_of(u0)
    options = dict(stopping=nm.JumpTolerance(1e-5), args=rates, comm=comms.time)
    got = nm.solve(decay, u0, EDGES, **(STEPS | options))
    assert got.status is nm.Status.CONVERGED
    for x, u, rate in zip(*map(jax.tree.leaves, (got.interface, u0, rates)), strict=True):
        growth = np.exp(np.multiply.outer(EDGES, rate))
        np.testing.assert_allclose(x, growth * np.asarray(u), rtol=3e-6)
        assert x.dtype == (types_of(u0) or {np.dtype(float)}).pop()


@pytest.mark.mpi(max_size=1)
@settings(max_examples=50)
@given(trees(leaves(FLOATS)), trees(leaves([*FLOATS, *WHOLE])))
def test_two_precisions_in_a_state_are_refused(one, other):
    u0 = [one, {"other": other}]
    if len(types_of(u0)) < 2:
        u0 = [np.ones(2, np.float32), u0, np.ones(2)]
    with pytest.raises(ProblemError, match=r"float(32|64) and `u0.*is float(32|64)|is empty"):
        lay_out(u0)


changes = st.sampled_from(["type", "shape", "missing", "tuple", "complex"])


@pytest.mark.mpi(max_size=1)
@settings(max_examples=50)
@given(states.filter(size_of), changes, st.data())
def test_a_slope_that_is_not_like_the_state_is_refused(u0, change, data):
    initial, layout = lay_out(u0)
    n = data.draw(st.integers(0, len(layout.paths) - 1))
    other = {np.dtype("f4"): np.float64, np.dtype("f8"): np.float32}[layout.dtype]

    def field(t, u, args):
        flat, structure = jax.tree.flatten(u)
        if change == "missing":
            return {f"{i}": x for i, x in enumerate(flat)}
        if change == "tuple":
            return (u,)
        wrong = {
            "type": lambda x: x.astype(other),
            "shape": lambda x: jnp.stack([x, x]),
            "complex": lambda x: x + jnp.asarray(0j, jnp.result_type(x.dtype, jnp.complex64)),
        }
        flat[n] = wrong[change](flat[n])
        return structure.unflatten(flat)

    place = f"`u{layout.paths[n]}`" if change not in ("missing", "tuple") else ""
    with jax.numpy_dtype_promotion("standard"), pytest.raises(ProblemError) as refused:
        check_field(as_field(field, layout), 0.0, None)
    assert not layout.is_tree or place in str(refused.value)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "u0, message",
    [
        (np.array([True]), "type bool"),
        ({"a": True, "b": 1.0}, r"`u0\['a'\]` is of type bool"),
        ({"a": "text"}, r"`u0\['a'\]` is of type <U4"),
        (jax.random.key(0), "real numbers"),
        (np.ones(2, np.float16), "cannot send"),
        ([jnp.ones(2), jnp.ones(2, jnp.bfloat16)], r"`u0\[1\]` is of type bfloat16"),
        ({"a": 1j}, "complex"),
        ({}, "empty"),
        (None, "empty"),
    ],
)
def test_states_that_are_no_real_numbers_are_refused(u0, message):
    with pytest.raises(ProblemError, match=message):
        lay_out(u0)


@pytest.mark.mpi(max_size=1)
def test_the_place_of_a_number_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteError, match=r"`u0\['b'\]\[1\]` holds NaN"):
        lay_out({"a": 1.0, "b": [np.ones(2), np.array([1.0, np.inf])]})


@pytest.mark.mpi(max_size=1)
def test_whole_numbers_in_a_slope_are_converted(comms):
    """u' = 1 with the slope written as a whole number; a state of whole numbers alone."""
    solution = nm.solve(
        lambda t, u, args: jnp.ones_like(u, int), 3, EDGES, comm=comms.time, **STEPS
    )
    np.testing.assert_allclose(solution.interface, 3 + EDGES, rtol=1e-14)


@pytest.mark.mpi(max_size=1)
def test_a_coarse_field_of_its_own_is_one_of_the_same_trees(comms):
    def field(t, u, args):
        return {"x": u["v"], "v": -u["x"]}

    options = STEPS | dict(coarse=nm.Propagator(field, nm.FixedSteps(nm.RK4(), 4)))
    u0 = {"x": 1.0, "v": 0.0}
    solution = nm.solve(field, u0, EDGES, comm=comms.time, **options)
    np.testing.assert_allclose(solution.interface["x"], np.cos(EDGES), atol=1e-6)
    wrong = nm.Propagator(lambda t, u, args: (u["v"], -u["x"]), options["coarse"].integrator)
    with pytest.raises(ProblemError, match="The field of `coarse` returned the structure"):
        nm.solve(field, u0, EDGES, comm=comms.time, **(options | dict(coarse=wrong)))


@pytest.mark.mpi(max_size=1)
def test_tangents_in_another_precision_of_a_field_that_keeps_its_own(comms):
    matrix = jnp.asarray([[0.0, 1.0], [-1.0, 0.0]])  # double precision, whatever u is

    with jax.numpy_dtype_promotion("standard"):
        solution = nm.solve(
            lambda t, u, args: matrix @ u, jnp.array([1.0, 0.0]), EDGES, comm=comms.time,
            method="tangent", basis=nm.SharedBasis("identity"), precision="float32", **STEPS,
        )  # fmt: skip
    np.testing.assert_allclose(solution.interface[:, 0], np.cos(EDGES), atol=1e-6)


@pytest.mark.mpi(max_size=1)
def test_a_field_that_branches_on_a_number_says_how_to(comms):
    def field(t, u, args):
        return -u if args["rate"] > 0 else u

    with pytest.raises(ProblemError, match="`jnp.where`"):
        nm.solve(field, 1.0, EDGES, args={"rate": 1.0}, comm=comms.time, **STEPS)
    solution = nm.solve(field, 1.0, EDGES, args={"rate": 1}, comm=comms.time, **STEPS)
    np.testing.assert_allclose(solution.interface, np.exp(-EDGES), rtol=1e-6)


# Types are checked at run time under pytest, but not where a user calls.
WRONG_KINDS = """
import json, diffrax, numpy as np, jax.numpy as jnp, nodepint_mpi as nm
from mpi4py import MPI
from nodepint_mpi.errors import NodepintError

def decay(t, u, args): return -u
S = nm.FixedSteps(nm.RK4(), 2)
def solve(field=decay, u0=(1.0,), edges=(0.0, 0.5, 1.0), **options):
    nm.solve(field, u0, edges, **(dict(fine=S, coarse=S) | options))
freed = nm.make_time_comm(MPI.COMM_SELF)
freed.free()
cases = {
    "`n_steps` is 2.5": lambda: nm.FixedSteps(nm.RK4(), 2.5),
    "`n_steps` is True": lambda: nm.FixedSteps(nm.RK4(), True),
    "`solver` is the class Tsit5": lambda: nm.FixedSteps(diffrax.Tsit5, 2),
    "`solver` is a str": lambda: nm.FixedSteps("tsit5", 2),
    "root finder of Kvaerno5": lambda: nm.FixedSteps(diffrax.Kvaerno5(), 2),
    "root finder of ImplicitEuler": lambda: nm.FixedSteps(diffrax.ImplicitEuler(), 2),
    "`adjoint` is 'exact'": lambda: nm.FixedSteps(nm.RK4(), 2, adjoint="exact"),
    "Euler has no error estimate": lambda: nm.AdaptiveSteps(diffrax.Euler(), 1e-3, 1e-3),
    "`rtol` is 'small'": lambda: nm.AdaptiveSteps(diffrax.Tsit5(), "small", 1e-3),
    "`max_steps` is 1.5": lambda: nm.AdaptiveSteps(diffrax.Tsit5(), 1e-3, 1e-3, max_steps=1.5),
    "`fine` is a Tsit5": lambda: solve(fine=diffrax.Tsit5()),
    "write `fine=nm.FixedSteps(diffrax.Tsit5(), n_steps)`": lambda: solve(fine=diffrax.Tsit5()),
    "`coarse=nm.FixedSteps(diffrax.Euler(), n_steps)`.": lambda: solve(coarse=diffrax.Euler()),
    "EulerHeun is a solver for stochastic": lambda: solve(fine=diffrax.EulerHeun()),
    "KenCarp4 is a solver for": lambda: nm.FixedSteps(diffrax.KenCarp4(), 2),
    "`carry` is a SolveCarry; pass the one that": lambda: solve(carry=nm.SolveCarry()),
    "`carry` is a NoneType; pass `nm.SolveCarry": lambda: nm.value_and_grad(solve)((1.0,), None),
    "`fine` is a Propagator": lambda: solve(fine=nm.Propagator(decay, S)),
    "`fine` is a _MetaAbstractSolver": lambda: solve(fine=diffrax.Tsit5),
    "`coarse` is a Tsit5": lambda: solve(coarse=diffrax.Tsit5()),
    "`coarse` is 4": lambda: solve(coarse=4),
    "A MultiTerm of diffrax": lambda: solve(diffrax.MultiTerm(diffrax.ODETerm(decay))),
    "`field` is a str": lambda: solve("decay"),
    "`stopping` is 1e-06": lambda: solve(stopping=1e-6),
    "`basis` is 'pod'": lambda: solve(method="tangent", basis="pod"),
    "`method` is a type": lambda: solve(method=int),
    "`comm` is a Intracomm": lambda: solve(comm=MPI.COMM_WORLD),
    "`comm` is 'world'": lambda: solve(comm="world"),
    "`comm` has been freed": lambda: solve(comm=freed),
    "`recycle` is 'yes'": lambda: solve(recycle="yes"),
    "`trust` is -1": lambda: solve(trust=-1),
    "`precision` is 'single'": lambda: solve(precision="single"),
    "`adjoint_tol` is None": lambda: solve(adjoint_tol=None),
    "`slices_at_once` is 0": lambda: solve(slices_at_once=0),
    "sweeps is 2.5": lambda: solve(stopping=nm.FixedSweeps(2.5)),
    "`tol` is '1e-6'": lambda: solve(stopping=nm.JumpTolerance("1e-6")),
    "`args[0]` is an array of type": lambda: solve(args=[np.array(["a"])]),
    "`edges`": lambda: solve(edges="abc"),
    "`guess`": lambda: solve(guess="abc"),
    "holds a set": lambda: solve(args=({1, 2},)),
}
found = {}
for name, case in cases.items():
    try:
        case()
        found[name] = "accepted"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.mark.mpi(max_size=1)
def test_wrong_kinds_are_refused_where_types_are_not_checked(mpirun):
    done = mpirun(1, sys.executable, "-c", WRONG_KINDS)
    assert done.returncode == 0, done.stderr
    wrong = {
        name: text
        for name, text in json.loads(done.stdout.splitlines()[-1]).items()
        if not (text.startswith("ProblemError: ") and name in text)
    }
    assert not wrong, "\n".join(f"{name}: {text[:300]}" for name, text in wrong.items())


@pytest.mark.mpi(max_size=1)
def test_ode_terms_of_diffrax_are_fields(comms):
    """A term, a controlled one, and the field of a propagator: closed forms."""
    control = diffrax.LinearInterpolation(jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0]))
    controlled = diffrax.ControlTerm(lambda t, u, rate: -rate * u, control).to_ode()
    decays = diffrax.ODETerm(lambda t, u, rate: -rate * u)
    steps = nm.FixedSteps(nm.RK4(), 20)
    for term, wanted in ((decays, np.exp(-0.5)), (controlled, np.exp(-1.0))):
        solution = nm.solve(
            term, jnp.ones(1), np.linspace(0, 1, 5), args=0.5, fine=steps, comm=comms.time,
            coarse=nm.Propagator(decays, nm.FixedSteps(nm.RK4(), 1)),
        )  # fmt: skip
        np.testing.assert_allclose(solution.interface[-1], wanted, rtol=1e-7)


BROWNIAN = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (1,), jax.random.key(0))


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "term, message",
    [
        (diffrax.ControlTerm(decay, BROWNIAN), r"`ControlTerm\(f, control\).to_ode\(\)`"),
        (diffrax.MultiTerm(diffrax.ODETerm(decay)), "Sum the parts in one function"),
    ],
)
def test_terms_of_other_equations_are_refused(comms, term, message):
    with pytest.raises(ProblemError, match=message):
        nm.solve(term, jnp.ones(1), EDGES, args=0.5, comm=comms.time, **STEPS)


@pytest.mark.mpi(max_size=1)
def test_a_term_made_of_traced_arrays_is_refused(comms):
    steps = nm.FixedSteps(nm.RK4(), 2)

    def loss(values):
        control = diffrax.LinearInterpolation(jnp.array([0.0, 1.0]), values)
        term = diffrax.ControlTerm(decay, control).to_ode()
        return nm.solve(
            term, jnp.ones(1), np.linspace(0, 1, 5), args=0.5, fine=steps, coarse=steps,
            comm=comms.time,
        ).interface[-1, 0]  # fmt: skip

    with pytest.raises(ProblemError, match="Pass these in `args`"):
        jax.jit(loss)(jnp.ones(2))
