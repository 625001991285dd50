"""Messages along the line, told apart by the rank that sent them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.core.partition import owned_range
from nodepint_mpi.parallel.exchange import (
    bcast_from,
    gather_slices,
    in_order,
    max_over_ranks,
    recv_left,
    recv_right,
    send_left,
    send_right,
    shift_left,
    shift_right,
    sum_over_ranks,
)


def test_everything_arrives_where_it_should(comms):
    time = comms.time
    rank, size = time.rank, time.size

    @jax.jit
    def talk(mine, fill):
        right, left = shift_right(time, mine, fill), shift_left(time, mine, fill)
        passed = recv_left(time, fill) + 1  # a chain: every rank adds one
        send_right(time, passed)
        back = recv_right(time, fill) + 1
        send_left(time, back)
        total = sum_over_ranks(time, {"a": mine, "b": (mine[:1] * 2, None)})
        return right, left, passed, back, total, max_over_ranks(time, mine), bcast_from(
            time, mine, size - 1
        )  # fmt: skip

    right, left, passed, back, total, most, last = talk(jnp.full(3, rank + 1.0), jnp.full(3, -9.0))
    np.testing.assert_array_equal(right, -9 if rank == 0 else rank)
    np.testing.assert_array_equal(left, -9 if rank == size - 1 else rank + 2)
    np.testing.assert_array_equal(passed, -9 + rank + 1)
    np.testing.assert_array_equal(back, -9 + size - rank)
    np.testing.assert_array_equal(total["a"], size * (size + 1) / 2)
    np.testing.assert_array_equal(total["b"][0], size * (size + 1))
    np.testing.assert_array_equal(most, size)
    np.testing.assert_array_equal(last, size)


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_shifts_reach_as_far_as_they_are_told(comms, distance):
    """What is sent may have another shape than what arrives: it is the sender's."""
    time = comms.time
    mine = jnp.full((1 + time.rank,), 1.0 + time.rank)

    @jax.jit
    def talk(mine):
        left, right = (jnp.full(max(1, 1 + time.rank + by), -9.0) for by in (-distance, distance))
        return shift_right(time, mine, left, distance), shift_left(time, mine, right, distance)

    for arrived, source in zip(
        talk(mine), (time.rank - distance, time.rank + distance), strict=True
    ):
        if 0 <= source < time.size:
            np.testing.assert_array_equal(arrived, np.full(1 + source, 1.0 + source))
        else:
            assert np.all(arrived == -9)


def test_what_is_put_in_order_stays_the_same(comms):
    time = comms.time

    @jax.jit
    def talk(mine):
        passed = recv_left(time, jnp.zeros_like(mine)) + mine
        send_right(time, passed)
        return in_order(time, passed), in_order(time, mine)

    passed, mine = talk(jnp.arange(3.0) + time.rank)
    before = sum(range(time.rank + 1))
    np.testing.assert_array_equal(passed, jnp.arange(3.0) * (time.rank + 1) + before)
    np.testing.assert_array_equal(mine, jnp.arange(3.0) + time.rank)


def test_sums_have_equal_bits_everywhere(comms):
    mine = jax.random.normal(jax.random.key(comms.time.rank), (1000,))
    total = np.asarray(jax.jit(lambda x: sum_over_ranks(comms.time, x))(mine))
    assert len(set(comms.control.allgather(total.tobytes()))) == 1


@pytest.mark.parametrize("n_slices", [4, 7, 9])
def test_uneven_blocks_are_gathered_in_order(comms, n_slices):
    owned = owned_range(n_slices, comms.time.size, comms.time.rank)
    block = jnp.stack([jnp.full((2, 2), float(n)) for n in owned])
    whole = jax.jit(lambda b: gather_slices(comms.time, b, n_slices))(block)
    np.testing.assert_array_equal(
        whole, np.broadcast_to(np.arange(n_slices)[:, None, None], (n_slices, 2, 2))
    )
