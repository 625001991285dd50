"""One sweep each way from what the last left: at the same parameters it arrives at the solution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.propagators import SliceResult
from nodepint_mpi.parallel.counters import counting
from nodepint_mpi.parallel.exchange import bcast_from, sum_over_ranks
from nodepint_mpi.parallel.iterate import TimeSolver
from nodepint_mpi.parallel.line import Line
from nodepint_mpi.parallel.methods import METHODS
from nodepint_mpi.parallel.methods.base import BASIS as BASIS_KEY
from nodepint_mpi.parallel.methods.base import Parts, leave_swept, no_carry
from nodepint_mpi.parallel.warm_start import follow, follow_forward
from tests.by_hand import slice_ends

EDGES = np.array([0.0, 0.2, 0.5, 0.9, 1.2, 1.4, 1.9, 2.0])
N_SLICES, N_STEPS = len(EDGES) - 1, 6
U0, ARGS = jnp.array([1.0, 0.5]), jnp.array(2.0)
BASIS = nm.SharedBasis("pod", rank=1, n_new=1)


def field(t, u, args):
    return jnp.stack([u[1], -args * jnp.sin(u[0]) - 0.1 * u[1]])


def serial_loss(u0, args):
    """Of the states at all slice ends, by a solve that is written out."""
    return jnp.sum(jnp.sin(slice_ends(field, u0, EDGES, N_STEPS, args)[1:]))


@functools.cache  # the same for all methods
def serial_gradient():
    return jax.jit(jax.grad(serial_loss, (0, 1)))(U0, ARGS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.mpi(min(n, 2), n))
        for name, n in {"picard": 1, "parareal": 3, "tangent": 2, "reduced": 2}.items()
    ],
)
def test_it_arrives_at_the_serial_gradient(comms, name):
    comm = comms.time
    fine = nm.Propagator(field, nm.FixedSteps(nm.RK4(), N_STEPS))
    coarse = nm.Propagator(field, nm.FixedSteps(nm.RK4(), 1))
    method = METHODS[name].of(Parts(fine, coarse, basis=BASIS))
    solver = TimeSolver(fine, method, nm.JumpTolerance(1e-10), adjoint_tol=1e-10)
    owned = own_slices(EDGES, comm.size, comm.rank)

    def read_loss(result):
        return SliceResult(jnp.zeros_like(result.saves), jnp.cos(result.end)), None

    @jax.jit
    def step(args, carry):
        followed, _ = follow(Line(comm, owned, args), solver, U0, carry, read_loss)
        misfits = sum_over_ranks(comm, followed.misfits)
        gradient = bcast_from(comm, followed.initial, 0), sum_over_ranks(comm, followed.params)
        return gradient, misfits, followed.carry

    gradient, misfits, carry = step(ARGS, no_carry())
    first = float(misfits.jump() + misfits.residual())
    for _ in range(2 * N_SLICES):  # the states first, then the cotangents
        gradient, misfits, carry = step(ARGS, carry)
    last = float(misfits.jump() + misfits.residual())
    assert last < 1e-12 and first > 1e-6
    for found, right in zip(gradient, serial_gradient(), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-10)


STILL = nm.SharedBasis("pod", rank=1)
SAVED = {"picard": 2, "tangent": 3, "tangent, still": 3, "reduced": 1}
"""Messages of two ranks that a step need not send: states and cotangents that the next one sends
again; maps that are gathered once for both ways, and coordinates that are dealt out once."""


@pytest.mark.mpi(2, 2)
@pytest.mark.parametrize("name", SAVED)
def test_a_step_leaves_what_a_sweep_each_way_leaves_with_fewer_messages(comms, name):
    comm = comms.time
    fine = nm.Propagator(field, nm.FixedSteps(nm.RK4(), N_STEPS))
    coarse = nm.Propagator(field, nm.FixedSteps(nm.RK4(), 1))
    basis = STILL if "still" in name else BASIS
    method = METHODS[name.split(",")[0]].of(Parts(fine, coarse, basis=basis))
    solver = TimeSolver(fine, method, nm.JumpTolerance(1e-10), adjoint_tol=1e-10)
    owned = own_slices(EDGES, comm.size, comm.rank)

    def read_loss(result):
        return SliceResult(jnp.zeros_like(result.saves), jnp.cos(result.end)), None

    @jax.jit
    def step(args):
        line = Line(comm, owned, args)
        carry = follow(line, solver, U0, no_carry(), read_loss)[0].carry
        begun = follow_forward(line, solver, U0, carry)
        swept, (sources, _) = begun.swept, read_loss(begun.result)
        back = method.adjoint_init(line, swept.states.starts, swept.memory, sources, carry)
        rights = sources.end + back.cotangents.rights
        _, outs = begun.pull_back(SliceResult(sources.saves, rights))
        given = line, U0, swept, begun.result.end, back, outs
        with counting() as at_once:
            left = method.carry(*given, carry)
        with counting() as apart:
            wanted, memory = leave_swept(method, *given)
        basis = (left.replicated.get(BASIS_KEY), getattr(memory, "basis", None))
        messages = at_once.tally.messages, apart.tally.messages
        return left.rows, wanted.rows, basis, jnp.array(messages)

    rows, wanted, (basis_left, basis_wanted), messages = jax.device_get(step(ARGS))
    for key, right in wanted.items():
        np.testing.assert_allclose(rows[key], right, rtol=0, atol=1e-12)
    if basis_left is not None:
        np.testing.assert_allclose(basis_left, basis_wanted, rtol=0, atol=1e-12)
    at_once, apart = np.sum(comms.control.allgather(messages), axis=0)
    assert apart - at_once == SAVED[name]


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("name", METHODS)
def test_a_carry_has_the_shapes_that_are_foretold(comms, name):
    """A checkpoint is loaded into them."""
    comm = comms.time
    fine = nm.Propagator(field, nm.FixedSteps(nm.RK4(), 2))
    method = METHODS[name].of(Parts(fine, fine, basis=BASIS))
    owned = own_slices(EDGES, comm.size, comm.rank)
    like = method.carry_like(owned.n_owned, jax.ShapeDtypeStruct(U0.shape, U0.dtype))
    if not method.iterates:
        assert like == no_carry()
        return

    def step(args):
        solver = TimeSolver(fine, method, nm.JumpTolerance(1e-10), adjoint_tol=1e-10)
        return follow(
            Line(comm, owned, args), solver, U0, no_carry(),
            lambda result: (SliceResult(jnp.zeros_like(result.saves), result.end), None),
        )[0].carry  # fmt: skip

    found = jax.eval_shape(step, ARGS)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (like, found))
    assert shapes[0].replicated == shapes[1].replicated
    assert shapes[0].rows == {k: v for k, v in shapes[1].rows.items() if k in like.rows}
    assert all(len(block) == owned.n_owned for block in found.rows.values())
